"""``reseed report``: the self-contained folder that it writes, and its errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from reseed.cli import report, run

FEW = ["training.tokens=1024", "comparison.activation_tokens=0", "comparison.null_draws=1"]
CONTEXTS = ["evaluation=contexts", "evaluation.tokens=500", "evaluation.top=3"]
CITED = ("https://arxiv.org/abs/2501.16615", "https://arxiv.org/abs/2409.14507")


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compare three seeds of two architectures, with contexts, and return the project."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = [o for o in tiny_overrides if not o.startswith("training.tokens")]
        line = ["comparison=seeds", *line, *FEW, *CONTEXTS, "sae=topk,relu", "seed=0,1,2"]
        assert run.main(line) == 0
    return folder


@pytest.fixture
def project(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def sweep(project: Path) -> Path:
    (found,) = Path("sweeps").glob("seeds-*")
    return found


class Links(HTMLParser):
    """Addresses and anchors of a page, and the count of each element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.counts: dict[str, int] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attributes:
            if name in ("href", "src") and value is not None:
                self.addresses.append(value)
            if name == "id" and value is not None:
                self.anchors.add(value)


def data_of(path: Path) -> tuple[str, object]:
    """Return the key and value of a data file."""
    found = re.fullmatch(r"reseed\.data\((\"[^\"]+\"),(.*)\)\n", path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1]), json.loads(found[2])


def test_a_comparison_writes_its_report(project: Path, sweep: Path) -> None:
    assert (sweep / "report" / "index.html").is_file()
    assert json.loads((sweep / "report" / "report.json").read_text()) == {
        "sweep": sweep.name, "format": "html",
    }  # fmt: skip


def test_every_link_names_an_existing_file_or_anchor(sweep: Path) -> None:
    for page in ("index.html", "latents.html"):
        found = Links(sweep / "report" / page)
        assert len(found.addresses) > 5
        for address in found.addresses:
            if address.startswith("#"):
                assert address[1:] in found.anchors
            elif address not in CITED:
                assert (sweep / "report" / address).is_file(), address


def test_every_figure_is_included_with_its_numbers(sweep: Path) -> None:
    found = Links(sweep / "report" / "index.html")
    drawn = {path.stem for path in sweep.glob("*.svg")}
    assert {Path(a).stem for a in found.addresses if a.endswith(".svg")} == drawn
    assert found.counts["figure"] == found.counts["figcaption"] == len(drawn)
    text = (sweep / "report" / "index.html").read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    for caption in captions:
        assert "n = 3 seeds" in caption
        assert 'href="data/' in caption


def test_every_run_has_its_latents_and_contexts(sweep: Path) -> None:
    root = sweep / "report" / "latents"
    key, found = data_of(root / "runs.js")
    assert key == "runs"
    assert isinstance(found, dict)
    table = pd.read_parquet(sweep / "latents.parquet")
    assert [run["id"] for run in found["runs"]] == list(dict.fromkeys(table["run"]))
    for i, run_ in enumerate(found["runs"]):
        own = table[table["run"] == run_["id"]]
        _, columns = data_of(root / f"{i}.js")
        assert isinstance(columns, dict)
        assert columns["firing"] == own["firing"].tolist()
        assert columns["shared_with"] == own["shared_with"].tolist()
        others = [found["runs"][other]["id"] for other in run_["others"]]
        assert others == list(own["others"].iloc[0])
        assert columns["partner_decoder"] == [
            [int(partners[k]) for partners in own["partner_decoder"]] for k in range(len(others))
        ]
        shards = [data_of(path)[1] for path in sorted((root / str(i)).iterdir())]
        assert sum(len(shard) for shard in shards if isinstance(shard, list)) == run_["latents"]


def test_contexts_equal_those_of_the_evaluation(sweep: Path) -> None:
    from reseed.store.contexts import Contexts

    root = sweep / "report" / "latents"
    _, found = data_of(root / "runs.js")
    assert isinstance(found, dict)
    about = found["runs"][0]
    (stored,) = [r for r in Path("outputs").iterdir() if r.name == about["id"]]
    contexts = Contexts.of(stored)
    assert contexts is not None
    _, shard = data_of(root / "0" / "0.js")
    _, texts = data_of(root / f"tokens-{about['vocabulary']}.js")
    assert isinstance(shard, list)
    assert isinstance(texts, dict)
    for latent in (0, 17, 63):
        own, packed = contexts.latent(latent), shard[latent]
        assert packed["max"] == pytest.approx(own.largest, rel=5e-3)
        assert len(packed["c"]) == len(own.contexts)
        for context, (quantile, peak, position, ids, flat) in zip(
            own.contexts, packed["c"], strict=True
        ):
            assert (quantile is None) == (context.kind == "top")
            assert (peak, position, ids) == (context.peak, context.position, [*context.tokens])
            assert [texts[str(i)] for i in ids] == contexts.text(context.tokens)
            values = dict(zip(flat[::2], flat[1::2], strict=True))
            for at, activation in enumerate(context.activations):
                assert values.get(at, 0) == pytest.approx(activation, rel=5e-3)


def test_the_report_names_its_runs_and_settings(sweep: Path) -> None:
    text = (sweep / "report" / "index.html").read_text()
    for run_ in Path("outputs").iterdir():
        assert run_.name in text
    for said in ("Settings that differ between cells", "sae.k", "torch",
                 "Settings of the comparison", "training.tokens: 1024",
                 "reseed run comparison=seeds"):  # fmt: skip
        assert said in text
    assert "runtime.progress" not in re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)


Said = Callable[[Sequence[str]], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def of(arguments: Sequence[str]) -> str:
        capsys.readouterr()
        report.main(list(arguments))
        return "".join(capsys.readouterr())

    return of


def test_markdown_links_only_to_files_beside_it(sweep: Path, said: Said, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    assert said([sweep.name, "--format", "md", "--out", str(out)]).strip() == str(out / "report.md")
    text = (out / "report.md").read_text()
    links = [link for link in re.findall(r"\]\((\S+?)\)", text) if link not in CITED]
    assert len(links) > 10
    for link in links:
        assert (out / link).is_file(), link


@pytest.mark.slow
def test_tex_compiles(sweep: Path, said: Said) -> None:
    said([sweep.name, "--format", "tex"])
    folder = sweep / "report-tex"
    text = (folder / "report.tex").read_text()
    for name in re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", text):
        assert (folder / name).read_bytes().startswith(b"%PDF")
    if shutil.which("pdflatex") is None:
        pytest.skip("needs LaTeX to compile it: apt-get install texlive-latex-recommended")
    summary = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{%s}"
    (folder / "paper.tex").write_text(
        summary % (sweep / "summary.tex").resolve() + r"\end{document}"
    )
    for name in ("report", "paper"):
        made = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", name],
            cwd=folder, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout[-2000:]


def test_a_report_replaces_only_an_earlier_report(sweep: Path, said: Said, tmp_path: Path) -> None:
    out = tmp_path / "there"
    said([sweep.name, "--out", str(out)])
    (out / "old.js").write_text("of an earlier report")
    said([sweep.name, "--out", str(out)])
    assert not (out / "old.js").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    told = said([sweep.name, "--out", str(mine)])
    assert "mine has no report.json, so it is not a report and is not overwritten" in told
    assert (mine / "thesis.txt").read_text() == "years"
    told = said([sweep.name, "--out", str(mine / "thesis.txt")])
    assert "is a file, but a report is a folder" in told


def test_a_sweep_that_was_not_compared_has_no_report(said: Said, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("")
    assert "its runs have not been compared, so there is nothing" in said([str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reseed report takes one sweep; got none"),
        (["a", "b"], "reseed report takes one sweep; got a, b"),
        (["nothing"], "there is no sweep nothing in sweeps/"),
        (["seeds", "--format", "pdf"], "--format: invalid choice: 'pdf'"),
        (["seeds", "--out"], "--out: expected one argument"),
    ],
)
def test_invalid_arguments_are_refused(
    sweep: Path, said: Said, arguments: list[str], message: str
) -> None:
    assert message in said(arguments)
