"""A report as a self-contained folder: nothing in it is loaded from elsewhere.

report/
    index.html  latents.html     (html)     or   report.md   or   report.tex
    figures/<name>.svg, .png     (html, md)      figures/<name>.pdf (tex)
    data/                        the numbers of figures and tables
    latents/                     (html) data of the latent browser, `page.latent_browser`
    style.css  *.js              (html)
    report.json                  name of the sweep, and the format
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from reseed.errors import ReseedError
from reseed.report.cell_labels import Cell
from reseed.report.evaluation_figures import evaluation_drawings
from reseed.report.evaluation_results import Runs
from reseed.report.figures import comparison_drawings, save_figures
from reseed.report.page.content import BROWSER, ReportData, report_sections
from reseed.report.page.latent_browser import write_browser
from reseed.report.page.render import (
    Html,
    Section,
    document,
    joined,
    markdown,
    section_html,
    tag,
    tex,
)
from reseed.report.table_files import figure_tables
from reseed.system.files import atomic_folder

RECORD = "report.json"
_SCRIPTS = ("page.js", "dom.js", "latents/runs.js", "list.js", "latent.js", "browser.js")
_NUMBERS = ("summary.csv", "pairs.csv", "latents.parquet", "strata.csv", "pairings.csv",
            "matrix.csv", "evaluations.csv", "letters.csv")  # fmt: skip
"""Files of a sweep's folder that a report copies."""
_NAMES = ("figures", "data", "latents", ".DS_Store")
_SUFFIXES = (".html", ".js", ".css")
"""Contents of a report's folder, beside ``report.*``, of which LaTeX writes more."""


def write_report(report: ReportData, out: Path, format: str = "html") -> Path:
    """Write the report in place of an earlier one. On failure the earlier one stays.

    Args:
        format: html, md or tex.

    Returns:
        the file to open.

    Raises:
        ReseedError: ``out`` holds something that is not a report.
    """
    _check_replaceable(out)
    writer = {"html": _write_html, "md": _write_markdown, "tex": _write_tex}[format]

    def fill(folder: Path) -> None:
        _write_data(report, folder / "data")
        writer(report, folder)
        record = {"sweep": report.sweep.path.name, "format": format}
        (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")

    # The folder behind a link is replaced, not the link.
    atomic_folder(out.resolve() if out.is_symlink() else out, fill)
    return out / {"html": "index.html", "md": "report.md", "tex": "report.tex"}[format]


def figure_drawings(cells: Sequence[Cell], runs: Runs) -> dict[str, Callable[[], Figure]]:
    """Return name → drawing function of all figures of a sweep."""
    return comparison_drawings(cells) | evaluation_drawings(cells, runs)


def _write_html(report: ReportData, folder: Path) -> None:
    _copy_figures(report, folder)
    sections = report_sections(report, browser=True)
    (folder / "index.html").write_text(_index(report, sections), encoding="utf-8")
    write_browser_page(report, folder)


def write_browser_page(report: ReportData, folder: Path) -> None:
    """Write the latent browser, its data, and the assets that all pages load."""
    write_browser(report.cells, report.runs, report.contexts, folder)
    (folder / BROWSER).write_text(_browser_page(report), encoding="utf-8")
    with as_file(files("reseed.report.page") / "assets") as assets:
        for asset in assets.iterdir():
            shutil.copyfile(asset, folder / asset.name)


def _write_markdown(report: ReportData, folder: Path) -> None:
    _copy_figures(report, folder)
    text = markdown(_title(report), report_sections(report, browser=False))
    (folder / "report.md").write_text(text, encoding="utf-8")


def _write_tex(report: ReportData, folder: Path) -> None:
    drawn = {
        n: draw
        for n, draw in figure_drawings(report.cells, report.runs).items()
        if n in report.figures
    }
    save_figures(drawn, folder / "figures", kinds=("pdf",))
    text = tex(_title(report), report_sections(report, browser=False))
    (folder / "report.tex").write_text(text, encoding="utf-8")


def _copy_figures(report: ReportData, folder: Path) -> None:
    (folder / "figures").mkdir()
    for name in report.figures:
        for kind in ("svg", "png"):
            shutil.copyfile(
                report.sweep.path / f"{name}.{kind}", folder / "figures" / f"{name}.{kind}"
            )


def _write_data(report: ReportData, folder: Path) -> None:
    folder.mkdir()
    made: dict[str, Callable[[], pd.DataFrame]] = figure_tables(report.cells, report.runs)
    for name in report.data:
        if name in made:
            made[name]().to_csv(folder / name, index=False)
        else:
            shutil.copyfile(report.sweep.path / name, folder / name)


def data_file_names(folder: Path, cells: Sequence[Cell], runs: Runs) -> tuple[str, ...]:
    """Return the files of ``data/``: those to copy from the sweep's folder, and those to make."""
    there = [name for name in _NUMBERS if (folder / name).is_file()]
    return (*there, *figure_tables(cells, runs))


def _check_replaceable(out: Path) -> None:
    """Raise `ReseedError` unless ``out`` is missing, empty, or holds a report and nothing else."""
    if out.exists() and not out.is_dir():
        raise ReseedError(f"{out} is a file, but a report is a folder: choose another path")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not _is_report(out):
        raise ReseedError(
            f"{out} has no {RECORD}, so it is not a report and is not overwritten. Choose another "
            "folder, or remove this one"
        )
    for path in sorted(out.iterdir()):
        own = path.name in _NAMES or path.suffix in _SUFFIXES or path.name.startswith("report.")
        if not own:
            raise ReseedError(
                f"{path} is not part of the report in {out}, which is replaced as a whole. Move "
                "it, or choose another folder"
            )


def _is_report(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and set(record) == {"sweep", "format"}


def _title(report: ReportData) -> str:
    return f"{report.name}: would another seed have found the same latents?"


def _index(report: ReportData, sections: Sequence[Section]) -> Html:
    links = [tag("a", section.title, href=f"#{section.name}") for section in sections]
    body = [
        _header(report, tag("a", "Browse latents", href=BROWSER, class_="button")),
        tag("nav", *links, aria_label="Sections", class_="sections"),
        tag("main", *map(section_html, sections), id="main"),
    ]
    return document(f"reseed: {report.name}", body, ["page.js"])


def _browser_page(report: ReportData) -> Html:
    """Return the empty page that ``browser.js`` fills."""
    silent = tag("noscript", tag("p", "The latent browser needs JavaScript. Its numbers are in "
                                 "data/latents.parquet, too."))  # fmt: skip
    body = [
        _header(report, tag("a", "Report", href="index.html", class_="button")),
        tag("main", silent, id="main", tabindex="-1"),
    ]
    return document(f"Latents of {report.name}", body, _SCRIPTS)


def _header(report: ReportData, link: Html) -> Html:
    skip = tag("a", "Skip to content", href="#main", class_="skip")
    theme = tag("button", "Theme", type="button", id="theme", title="light or dark (t)")
    name = tag("h1", report.name, " ", tag("span", report.sweep.path.name, class_="of"))
    return tag("header", skip, name, tag("div", joined([link, theme], " "), class_="actions"))
