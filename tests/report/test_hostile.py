"""Names and tokens that attack a format are shown as text, in markdown, LaTeX and HTML.

`test_browser` opens the same report in Chromium.
"""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile import NAMES, hostile_report
from markdown_it import MarkdownIt
from test_latex import typeset

from reseed.errors import ReseedError
from reseed.report.format import one_line
from reseed.report.markup import (
    Span,
    is_link_target,
    latex_inline,
    latex_text,
    markdown_block,
    markdown_code,
    markdown_inline,
    markdown_table,
    markdown_text,
    spans,
)
from reseed.report.page.content import ReportData
from reseed.report.page.render import document, tag
from reseed.report.page.write import write_report
from reseed.report.table import Table
from reseed.study.publish import model_card

LINKS = ["https://arxiv.org/abs/2501.16615", "http://a.b:80/c?d=e&f#g", "latents.html", "#tables",
         "../data/a-b.csv", "figures/x.svg"]  # fmt: skip
NOT_LINKS = ["javascript:alert(1)", "JavaScript:alert(1)", "data:text/html,x", "vbscript:x",
             "file:///etc/passwd", "//elsewhere.example", "/etc/passwd", "\x01javascript:x",
             "java\tscript:x", "https:", "https://a b", 'x" onclick="y', "x\\y", "a}b",
             ""]  # fmt: skip


def markdown_parser() -> MarkdownIt:
    """Return a parser of another project, which makes a link of every target."""
    made = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    made.validateLink = lambda url: True
    return made


PARSER = markdown_parser()


def read(markdown: str) -> tuple[str, list[str]]:
    """Return the text that a reader of the markdown sees, and the kinds of its inline elements."""
    text, kinds = "", []
    for token in PARSER.parse(markdown):
        kinds.append(token.type)
        for inner in token.children or ():
            kinds.append(inner.type)
            text += inner.content if inner.type in ("text", "code_inline") else ""
    return text, kinds


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    parts = [
        *"\\`*_[]()<>|~#+-=.!&:;$%^{}\"' \n\t",
        "a",
        "b1",
        "](",
        "]:",
        "&lt;",
        "<b",
        "1. ",
        "**",
    ]
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("target", LINKS)
def test_addresses_and_relative_paths_are_links(target: str) -> None:
    assert is_link_target(target)
    assert spans(f"[x]({target})") == [Span("link", "x", target)]
    assert tag("a", "x", href=target).startswith('<a href="')


@pytest.mark.parametrize("target", NOT_LINKS)
def test_other_targets_are_shown_as_text(target: str) -> None:
    text = f"[x]({target})"
    assert not is_link_target(target)
    assert all(span.kind == "plain" for span in spans(text))
    assert tag("a", "x", href=target) == "<a>x</a>"
    assert tag("img", src=target) == "<img>"
    assert "link_open" not in read(markdown_inline(text))[1]
    assert "href" not in latex_inline(text)


def words(text: str) -> str:
    return " ".join(text.split())


def test_markdown_shows_every_character_as_itself() -> None:
    for text in [*NAMES, *random_texts(300)]:
        check_markdown(text)


def check_markdown(text: str) -> None:
    shown = words(one_line(text))
    for whole in (f"x {markdown_text(text)} y", f"- {markdown_text(text)}: `run`"):
        seen, kinds = read(whole)
        expected = f"x {shown} y" if whole[0] == "x" else f"{shown}: run"
        assert words(seen).replace(" ", "") == expected.replace(" ", "")
        allowed = {"text", "inline", "code_inline", "paragraph_open", "paragraph_close",
                   "bullet_list_open", "bullet_list_close", "list_item_open",
                   "list_item_close"}  # fmt: skip
        assert set(kinds) <= allowed, whole
    if shown.strip("`"):
        assert words(read(f"x {markdown_code(text)}")[0]) == words(f"x {shown}")


@pytest.mark.parametrize("text", NAMES)
def test_a_markdown_table_keeps_its_columns(text: str) -> None:
    made = markdown_table(Table((text, "n"), ((text, "0.5 [0.4, 0.6] *"),), 1, "", (text,)))
    kinds = [token.type for token in PARSER.parse(made)]
    assert kinds.count("th_open") == kinds.count("td_open") == 2
    assert "| 0.5 [0.4, 0.6] * |" in made  # an interval needs no backslash
    assert not {"image", "html_inline", "html_block"} & set(read(made)[1])


def test_a_code_block_of_markdown_cannot_be_left() -> None:
    (token,) = PARSER.parse(markdown_block("a\n```\n<b>\n````\nc"))
    assert (token.type, token.content) == ("fence", "a\n```\n<b>\n````\nc\n")


def test_latex_prints_every_character_as_itself() -> None:
    for text in [*NAMES, *random_texts(300)]:
        shown = one_line(text).replace("--", "–").replace('"', "''")
        assert typeset(latex_text(text)) == shown


class Page(HTMLParser):
    """Elements of an HTML page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_loads_only_what_has_its_nonce() -> None:
    made = [Page(document("t", [tag("p", body)], ["a.js"])) for body in ("x", "y")]
    nonces = []
    for page in made:
        (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
        assert policy is not None
        nonces.append(re.findall("'nonce-(.*?)'", policy))
        assert policy.startswith("default-src 'none';")
        loaded = [a for name, a in page.elements if name in ("script", "link")]
        assert len(loaded) == 3
        assert {a["nonce"] for a in loaded} == set(nonces[-1])
    assert nonces[0] != nonces[1]


@pytest.fixture(scope="module")
def report(make_cell, tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return hostile_report(make_cell, tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("format", ["html", "md", "tex"])
def test_a_report_of_hostile_names_contains_only_our_own_markup(
    format: str, report: ReportData, tmp_path: Path
) -> None:
    text = write_report(report, tmp_path / "report", format).read_text()
    if format == "html":
        page = Page(text)
        ours = "a body button caption code details div h1 h2 head header html li link main meta nav"
        ours += " p pre script section span strong summary table tbody td th thead title tr ul"
        assert {name for name, _ in page.elements} <= set(ours.split())
        keys = {key for _, attributes in page.elements for key in attributes}
        assert not any(key.startswith("on") or key == "style" for key in keys)
        assert all(is_link_target(a["href"] or "") for _, a in page.elements if "href" in a)
        seen = words(one_line(page.text))
        assert [
            name for name in NAMES if words(one_line(name)) not in seen and "`" not in name
        ] == []
    elif format == "md":
        for markdown in (text, (report.sweep.path / "summary.md").read_text()):
            kinds = read(markdown)[1]
            assert not {"image", "html_inline", "html_block"} & set(kinds)
            links = [
                inner.attrs["href"]
                for token in PARSER.parse(markdown)
                for inner in token.children or ()
                if inner.type == "link_open"
            ]
            assert all(is_link_target(str(link)) for link in links)
            heads = [token for token in PARSER.parse(markdown) if token.type == "heading_open"]
            assert len(heads) == len(re.findall("^#+ ", markdown, re.MULTILINE))
    else:
        for source in (text, (report.sweep.path / "summary.tex").read_text()):
            assert not re.search(r"\\(input|write|end\{document\}\s*\S)|\^\^", source)
            bare = re.sub(r"\\[{}\\%]", "", source)
            assert bare.count("{") == bare.count("}")
            assert source.count(r"\begin{tabular}") == source.count(r"\end{tabular}")


def test_a_card_on_the_hub_shows_names_as_text() -> None:
    name = " ".join(NAMES)
    sae = SimpleNamespace(num_latents=8, d_in=4, config=SimpleNamespace(name="topk"))
    run = SimpleNamespace(
        signature="0123456789ab",
        metrics={"tokens": 5, "fvu": 0.25},
        record={
            "experiment": {"hookpoint": {"module": name}, "layer": 1, "seed": 0,
                           "dataset": {"context_length": name}},
            "labels": {"model": name, "dataset": name},
            "sparsity": name,
            "tokens": 10,
            "identity": {"sae": {"k": name}, "training": {"lr": 1}},
        },
    )  # fmt: skip
    card = model_card(run, sae, 'me/saes/"); import os', "sparsify")  # type: ignore[arg-type]
    body = card.split("---", 2)[2]
    text, kinds = read(body)
    assert not {"link_open", "image", "html_inline", "html_block"} & set(kinds)
    assert kinds.count("tr_open") == 2 + 4
    assert words(text).count(words(one_line(name))) == 6
    assert 'reseed.load_sae("hub:me/saes/\\"); import os")' in card


def test_a_report_replaces_reports_only(report: ReportData, tmp_path: Path) -> None:
    out, link = tmp_path / "report", tmp_path / "link"
    write_report(report, out, "md")
    link.symlink_to(out)
    (out / "report.pdf").touch()  # made from the report
    write_report(report, link, "tex")
    assert link.is_symlink()
    assert not (out / "report.pdf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "report"]
    (out / "notes.txt").touch()
    with pytest.raises(ReseedError, match=r"notes.txt is not part of the report in .*Move it"):
        write_report(report, out, "md")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.json").write_text('{"format": "of another program"}')
    with pytest.raises(ReseedError, match="so it is not a report and is not overwritten"):
        write_report(report, mine, "md")
    assert [path.name for path in mine.iterdir()] == ["report.json"]
