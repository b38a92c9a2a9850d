"""What a report says, in which order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reseed.config import ReseedError
from reseed.contexts import Contexts
from reseed.report.axes import Cell
from reseed.report.captions import caption, data_files, title
from reseed.report.differences import differences
from reseed.report.evaluations import Runs
from reseed.report.page.blocks import Block, Folded, Items, Paragraph, Picture, Section, Table
from reseed.report.page.provenance import provenance
from reseed.report.page.warnings import warnings
from reseed.report.pairings import by_value
from reseed.report.references import reference_table
from reseed.report.sections import sections
from reseed.report.tables import first_tables, more_tables
from reseed.sweeps import Sweep

STABILITY, ABSORPTION = "https://arxiv.org/abs/2501.16615", "https://arxiv.org/abs/2409.14507"
BROWSER = "latents.html"
_SIZE = re.compile(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"')


@dataclass(frozen=True, eq=False)
class Material:
    """What a report is made from.

    Attributes:
        cells: with the results of evaluations.
        runs: those that were evaluated.
        incomplete: a line for each cell that lacks runs.
        figures: names of those that are drawn, in order.
        data: files of ``data/``.
        contexts: of runs by their ids.
    """

    sweep: Sweep
    cells: Sequence[Cell]
    runs: Runs
    incomplete: Sequence[str]
    figures: Sequence[str]
    data: Sequence[str]
    contexts: Mapping[str, Contexts] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.cells[0][1].settings.name


def report_sections(of: Material, browser: bool) -> list[Section]:
    """All sections.

    Args:
        browser: whether there is one to be linked.
    """
    first = first_tables(of.cells)
    between = differences(of.cells)
    found = [
        Section("summary", "Summary", tuple(map(Table, first))),
        Section("warnings", "Warnings", (_warnings(of),)),
        Section("figures", "Figures", tuple(_pictures(of))),
        Section("tables", "What else was asked", tuple(map(Table, more_tables(of.cells)))),
        Section("differences", "Differences", (Table(between),) if between else ()),
        Section("measures", "All measures", tuple(_measures(of.cells))),
        Section("papers", "Beside the papers", tuple(_papers(of.cells))),
        Section("latents", "Latents", (Paragraph(_browser(of)),) if browser else ()),
        Section(
            "provenance", "Protocol and provenance", (*_protocol(), *provenance(of.sweep, of.cells))
        ),
    ]
    return [section for section in found if section.blocks]


def _warnings(of: Material) -> Block:
    runs = list({run.path: run for run in of.sweep.runs()}.values())
    found = warnings(of.cells, runs, of.incomplete)
    if found:
        return Items(tuple(found), warns=True)
    return Paragraph(
        "None: every cell is complete and has three runs or more, shares more than chance does and "
        "has the L0 it was asked for; no curve was still falling, and few latents are dead or "
        "dense."
    )


def _pictures(of: Material) -> list[Block]:
    return [
        Picture(
            name,
            title(name),
            caption(name, of.cells),
            tuple(file for file in data_files(name) if file in of.data),
            svg_size(of.sweep.path / f"{name}.svg"),
        )
        for name in of.figures
    ]


def svg_size(path: Path) -> tuple[float, float]:
    """Width and height in points of a figure as matplotlib writes it."""
    with path.open(encoding="utf-8") as file:
        found = _SIZE.search(file.read(2000))
    if found is None:
        raise ReseedError(f"{path} is no figure of ours: it does not say how large it is")
    return float(found[1]), float(found[2])


def _measures(cells: Sequence[Cell]) -> list[Block]:
    alone = by_value(cells)
    found = [("Each by itself", [alone])] if alone else []
    return [
        Folded(title, tuple(Table(words) for words in tables))
        for title, tables in [*found, *sections(cells)]
    ]


def _papers(cells: Sequence[Cell]) -> list[Block]:
    words = reference_table(cells)
    return [Table(words)] if words else []


def _browser(of: Material) -> str:
    contexts = (
        f", with the passages that it fires on in {len(of.contexts)} runs"
        if of.contexts
        else "; with `evaluation=contexts` also the passages that it fires on"
    )
    return (
        f"[Every latent of every run]({BROWSER}): how often it fires, how reproducible it is, and "
        f"which latent of each other run it is matched with{contexts}."
    )


def _protocol() -> list[Block]:
    return [
        Paragraph(
            "SAEs that are equal but for what pairs them up are matched one to one, exactly, by "
            f"their encoders and by their decoders ([Paulo & Belrose]({STABILITY})); absorption is "
            f"that of [Chanin et al.]({ABSORPTION}). Nulls, intervals and every other number are "
            "defined in `docs/measures.md` of reseed, by their heads here and by their columns in "
            "the files of `data/`."
        )
    ]
