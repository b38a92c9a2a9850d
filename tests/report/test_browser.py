"""The report in a browser: filtered, sorted and opened without an error or a network request.

If ``REPORT_SCREENSHOTS`` names a folder, screenshots are stored there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import pandas as pd
import pytest
from chromium import Chromium
from hostile import hostile_report
from large import hostile_contexts, large_cell

from reseed.cli import run
from reseed.report.page.content import ReportData
from reseed.report.page.render import document, tag
from reseed.report.page.write import write_browser_page, write_report
from reseed.store.sweeps import Sweep

pytestmark = pytest.mark.slow

WIDTHS = (1400, 390)
READY = "document.getElementById('main').dataset.ready === location.hash"
ROWS = "document.querySelectorAll('.list tbody tr')"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def report_of(folder: Path, line: list[str]) -> Path:
    """Train, compare and evaluate in a folder, and return the report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.main([*line, "evaluation=contexts", "runtime.progress=false"]) == 0
    (report,) = folder.glob("sweeps/*/report")
    return report


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    line = ["comparison=quickstart", "training.tokens=65536", "dataset.held_out_tokens=16384",
            "sae.num_latents=256", "comparison.activation_tokens=2048",
            "evaluation.tokens=16384"]  # fmt: skip
    return report_of(tmp_path_factory.mktemp("quickstart"), line)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    line = ["comparison=seeds", "model=path", f"model.path={real_data}/models/stories260K",
            "dataset=text_files", f"dataset.path={real_data}/text/tinystories_valid.txt", "layer=2",
            "training.tokens=65536", "dataset.held_out_tokens=8192", "sae.num_latents=256",
            "sae=topk", "seed=0,1,2", "comparison.activation_tokens=2048",
            "evaluation.tokens=8192"]  # fmt: skip
    return report_of(tmp_path_factory.mktemp("stories"), line)


def test_the_quickstart_report_works_in_a_browser(chromium: Chromium, quickstart: Path) -> None:
    used(chromium, quickstart, "quickstart")


@pytest.mark.real
def test_the_report_of_a_user_s_model_works_in_a_browser(chromium: Chromium, stories: Path) -> None:
    used(chromium, stories, "stories")


def used(chromium: Chromium, report: Path, name: str) -> None:
    """Use the report as a reader does; fail on any error or request to a network."""
    chromium.troubles.clear()
    chromium.requests.clear()
    chromium.window(1400, 900)
    chromium.open(report / "index.html")
    chromium.evaluate("for (const i of document.images) i.loading = 'eager'")
    chromium.wait("[...document.images].every((i) => i.complete && i.naturalWidth)")
    filtered_and_sorted(chromium, report)
    opened_with_its_partner(chromium, report)
    by_keyboard(chromium, report)
    for width in WIDTHS:
        for dark in (False, True):
            looked_at(chromium, report, width, dark, name)
    assert chromium.troubles == []
    elsewhere = [a for a in chromium.requests if not a.startswith(("file:", "about:", "data:"))]
    assert elsewhere == []


def listed(chromium: Chromium, report: Path, fragment: str = "") -> None:
    chromium.open(report / "latents.html", fragment)
    chromium.wait(f"{ROWS}.length")


def column(chromium: Chromium, head: str) -> list[str]:
    """Return the entries of a column of the list."""
    chromium.wait(READY)
    return chromium.evaluate(
        "(() => { const heads = [...document.querySelectorAll('.list thead th')];"
        f"const at = heads.findIndex((h) => h.textContent === '{head}');"
        f"return [...{ROWS}].map((row) => row.cells[at].textContent) }})()"
    )


def choose(chromium: Chromium, name: str, value: str) -> None:
    chromium.evaluate(
        f"(() => {{ const s = document.getElementById('{name}'); s.value = '{value}';"
        "s.dispatchEvent(new Event('change')) })()"
    )
    chromium.wait(READY)


def click_head(chromium: Chromium, head: str, sort: str) -> None:
    chromium.evaluate(
        "[...document.querySelectorAll('.list thead button')]"
        f".find((b) => b.textContent === '{head}').click()"
    )
    chromium.wait(f"document.querySelector('th[aria-sort]').textContent === '{head}'")
    chromium.wait(f"document.querySelector('th[aria-sort={sort}]')")


def filtered_and_sorted(chromium: Chromium, report: Path) -> None:
    listed(chromium, report)
    table = pd.read_parquet(report / "data" / "latents.parquet")
    others = table["others"].map(len).max()
    count = "document.querySelector('.count').textContent"
    assert chromium.evaluate(count) == f"{len(table):,} latents"
    choose(chromium, "kind", "orphan")
    shared = column(chromium, "shared")
    assert set(shared) == {f"0 of {others}"}
    orphans = int((table["live"] & (table["shared_with"] == 0)).sum())
    assert chromium.evaluate(count) == f"{orphans:,} latents"

    choose(chromium, "kind", "all")
    choose(chromium, "density", "dense")
    choose(chromium, "reproducible", "low")
    tokens = float(chromium.evaluate("reseed.runs[0].tokens"))
    kept = (table["firing"] > 0.1 * tokens) & (table["reproducibility"] < 0.2)
    assert chromium.evaluate(count).split()[0] == f"{kept.sum():,}"
    choose(chromium, "density", "any")
    choose(chromium, "reproducible", "any")
    click_head(chromium, "density", "descending")
    densest = column(chromium, "latent")[0]
    firing = table["firing"] / (table["firing"].max())
    assert int(densest) in set(table[firing == firing.max()]["latent"])
    click_head(chromium, "density", "ascending")
    assert column(chromium, "density")[0] == "never" or firing.min() > 0

    # Every passage found contains the text that was searched for.
    listed(chromium, report, "#list?kind=shared")
    word = chromium.evaluate("document.querySelector('.list mark').textContent").strip(" ↵→")
    chromium.evaluate(
        "(() => { const s = document.getElementById('text');"
        f"s.value = {word!r}; s.dispatchEvent(new Event('input')) }})()"
    )
    chromium.wait("location.hash.includes('text=')")
    found = column(chromium, "fires most on")
    assert found
    assert all(word.lower() in passage.lower() for passage in found)


def shown_number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.00995 else f"{value:.1g}"


def opened_with_its_partner(chromium: Chromium, report: Path) -> None:
    table = pd.read_parquet(report / "data" / "latents.parquet")
    own = table[table["shared_with"] == table["shared_with"].max()].iloc[0]
    chromium.open(report / "latents.html", f"#latent/{own['run']}/{own['latent']}")
    chromium.wait("document.querySelector('.columns')")
    heads = "[...document.querySelectorAll('.column > h3')].map((h) => h.textContent)"
    shown = chromium.evaluate(heads)
    assert len(shown) == 1 + len(own["others"])
    for head, partner, is_shared in zip(
        shown[1:], own["partner_decoder"], own["shared"], strict=True
    ):
        assert head.removesuffix(" *").endswith(f": {partner}")
        assert head.endswith(" *") == is_shared
    told = "[...document.querySelectorAll('.column > .match')].map((p) => p.textContent)"
    for match, r in zip(chromium.evaluate(told)[1:], own["pearson"], strict=True):
        assert ("Pearson –" if np.isnan(r) else f"Pearson {shown_number(r)}, Jaccard ") in match
    assert chromium.evaluate("document.querySelectorAll('.context mark.peak').length") > 2
    chromium.evaluate("document.querySelector('.column > h3 a').click()")
    partner = own["partner_decoder"][0]
    chromium.wait(f"location.hash === '#latent/{own['others'][0]}/{partner}'")
    chromium.wait(f"document.querySelector('h2').textContent === 'Latent {partner}'")


def by_keyboard(chromium: Chromium, report: Path) -> None:
    listed(chromium, report)
    first, second, third = column(chromium, "latent")[:3]
    chromium.press("j")
    chromium.press("Enter")
    chromium.wait(f"document.querySelector('h2')?.textContent === 'Latent {second}'")
    chromium.press("j")
    chromium.wait(f"document.querySelector('h2')?.textContent === 'Latent {third}'")
    chromium.press("k")
    chromium.press("k")
    chromium.wait(f"document.querySelector('h2')?.textContent === 'Latent {first}'")
    chromium.press("Escape")
    chromium.wait(f"{ROWS}.length")
    chromium.press("?")
    chromium.wait("document.querySelector('dialog[open]')")
    chromium.evaluate("document.querySelector('dialog button').click()")
    chromium.press("/")
    chromium.wait("document.activeElement.id === 'text'")
    chromium.press("Escape")
    chromium.press("t")
    chromium.wait("document.documentElement.dataset.theme")
    chromium.press("t")
    chromium.evaluate("localStorage.clear()")


def looked_at(chromium: Chromium, report: Path, width: int, dark: bool, name: str) -> None:
    """Check that nothing is wider than the window, and that text has enough contrast."""
    chromium.window(width, 900 if width > 600 else 844, dark)
    places = {"index": ("index.html", ""), "list": ("latents.html", ""), "latent": ("", "")}
    for what, (page, _) in places.items():
        if page:
            chromium.open(report / page)
        else:
            chromium.press("Enter")
            chromium.wait("document.querySelector('.columns')")
        if page == "latents.html":
            chromium.wait(f"{ROWS}.length")
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        assert contrast(chromium) > 4.5
        if folder := os.environ.get("REPORT_SCREENSHOTS"):
            colours = "dark" if dark else "light"
            chromium.screenshot(Path(folder) / f"{name}-{what}-{width}-{colours}.png")


def contrast(chromium: Chromium) -> float:
    """Return the contrast ratio of ink on paper, by the formula of WCAG 2."""
    pairs = chromium.evaluate(
        "(() => { const s = getComputedStyle(document.documentElement);"
        "const of = (n) => s.getPropertyValue(n).trim();"
        "return ['--ink', '--soft', '--accent'].map((n) => [of(n), of('--paper')]) })()"
    )

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    found = [sorted(map(luminance, pair)) for pair in pairs]
    return min((high + 0.05) / (low + 0.05) for low, high in found)


def test_hostile_names_and_tokens_run_nothing_and_load_nothing(
    chromium: Chromium, make_cell, tmp_path: Path
) -> None:
    write_report(hostile_report(make_cell, tmp_path, figures=True), tmp_path / "report")
    report = tmp_path / "report"
    name = hostile.NAMES[0]
    chromium.troubles.clear()
    chromium.requests.clear()
    chromium.dialogs.clear()
    chromium.window(1400, 900)
    chromium.open(report / "index.html")
    chromium.evaluate("for (const i of document.images) i.loading = 'eager'")
    chromium.wait("document.images.length && [...document.images].every((i) => i.complete)")
    assert chromium.evaluate("[...document.images].every((i) => i.naturalWidth)")
    assert name in chromium.evaluate("document.body.textContent")
    links = chromium.evaluate("[...document.links].map((a) => a.protocol)")
    assert set(links) <= {"file:", "https:"}

    listed(chromium, report)
    assert name in chromium.evaluate("document.body.textContent")
    chromium.press("Enter")
    chromium.wait("document.querySelector('.columns')")
    seen = chromium.evaluate("document.body.textContent")
    assert name in seen
    assert "</script>" in seen
    by_keyboard(chromium, report)
    assert chromium.dialogs == []
    assert chromium.troubles == []  # a refusal of the security policy would be one
    outside = [a for a in chromium.requests if not a.startswith((report.as_uri(), "about:"))]
    assert outside == []


@pytest.mark.parametrize(
    "attack",
    [
        "document.body.innerHTML += '<img src=x onerror=\"window.ran=1\">'",
        "document.body.append(made('script', {text: 'window.ran=1'}))",
        "document.body.append(made('script', {src: 'evil.js'}))",
        "document.body.innerHTML += '<a id=evil href=\"javascript:window.ran=1\">x</a>';"
        "document.getElementById('evil').click()",
        "document.body.innerHTML += '<style>body { opacity: 0 }</style>';"
        "window.ran = getComputedStyle(document.body).opacity === '0' || undefined",
        "fetch('https://elsewhere.example').then(() => window.ran = 1, () => 0)",
    ],
)
def test_the_policy_of_a_page_stops_markup_that_was_not_escaped(
    chromium: Chromium, tmp_path: Path, attack: str
) -> None:
    page = document("page", [tag("main", "text")], ["page.js"])
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "evil.js").write_text("window.ran = 1")
    for name in ("style.css", "theme.js", "page.js"):
        (tmp_path / name).touch()
    chromium.open(tmp_path / "index.html")
    chromium.troubles.clear()
    make = "const made = (name, values) => Object.assign(document.createElement(name), values);"
    chromium.evaluate(f"{{ {make} {attack} }}")
    chromium.wait("new Promise((done) => setTimeout(() => done(true), 200))")
    assert chromium.evaluate("window.ran") is None
    assert any("Content Security Policy" in trouble for trouble in chromium.troubles)
    chromium.troubles.clear()


LATENTS, SEEDS = 4_096, 8


def test_eight_saes_of_4096_latents_load_quickly_and_tokens_stay_text(
    chromium: Chromium, make_cell, tmp_path: Path
) -> None:
    knobs, cell = large_cell(make_cell, LATENTS, SEEDS)
    contexts = hostile_contexts(tmp_path / "contexts", LATENTS)
    own = dict.fromkeys(cell.runs["run"], contexts)
    sweep = Sweep(tmp_path / "large-0123")
    of = ReportData(sweep, [(knobs, cell)], {}, (), (), (), own)
    report = tmp_path / "report"
    report.mkdir()
    begun = time.perf_counter()
    write_browser_page(of, report)
    written = time.perf_counter() - begun
    chromium.troubles.clear()
    chromium.window(1400, 900)
    begun = time.perf_counter()
    listed(chromium, report)
    opened = time.perf_counter() - begun
    count = f"{LATENTS * SEEDS:,} latents"
    assert chromium.evaluate("document.querySelector('.count').textContent") == count
    begun = time.perf_counter()
    chromium.press("n")
    chromium.wait("location.hash.includes('page=2')")
    chromium.wait(READY)
    turned = time.perf_counter() - begun
    begun = time.perf_counter()
    chromium.press("Enter")
    chromium.wait("document.querySelector('.columns')")
    read = time.perf_counter() - begun
    print(f"written {written:.1f} s, list {opened:.2f} s, page {turned:.2f} s, latent {read:.2f} s")
    size = sum(path.stat().st_size for path in report.rglob("*") if path.is_file())
    print(f"{size / 2**20:.0f} MiB")
    assert opened < 5  # a second where nothing else runs
    assert turned < 1
    shown = chromium.evaluate("document.querySelector('.columns').textContent")
    assert "</script>" in shown
    assert "<b>bold</b>" in shown
    assert chromium.evaluate("document.querySelectorAll('.columns b, .columns script').length") == 0
    assert chromium.troubles == []
