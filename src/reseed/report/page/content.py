"""Sections of a report, in their order."""

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
    """Inputs of a report.

    Attributes:
        cells: cells, joined with the results of evaluations.
        runs: the evaluated runs.
        incomplete: a line for each cell that lacks runs.
        figures: names of the figures to show, in order.
        data: files of ``data/``.
        contexts: run id → its contexts.
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
    """Return all sections that have content.

    Args:
        browser: whether the report has a latent browser to link to.
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
        "None: every cell is complete, has at least three runs, shares more than chance and is at "
        "its target L0; no FVU was still falling, and few latents are dead or dense."
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
    """Return width and height, in points, of an svg that matplotlib wrote.

    Raises:
        ReseedError: the file does not state its size.
    """
    with path.open(encoding="utf-8") as file:
        found = _SIZE.search(file.read(2000))
    if found is None:
        raise ReseedError(
            f"{path} was not written by reseed: it does not state its size. Remove it; "
            "`reseed report` draws it again"
        )
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
        f". For {len(of.contexts)} runs also the passages on which it fires"
        if of.contexts
        else ". To see the passages on which it fires, evaluate with `evaluation=contexts`"
    )
    return (
        f"[Every latent of every run]({BROWSER}): how often it fires, how reproducible it is, and "
        f"its match in each other run{contexts}."
    )


def _protocol() -> list[Block]:
    return [
        Paragraph(
            "SAEs that differ only in what pairs them up are matched one to one, exactly, by "
            f"their encoders and by their decoders ([Paulo & Belrose]({STABILITY})). Absorption is "
            f"that of [Chanin et al.]({ABSORPTION}). reseed's `docs/measures.md` defines nulls, "
            "intervals and every other number, by column heading here and by column name in the "
            "files of `data/`."
        )
    ]
