"""Content of a report: its sections in order, and its warnings with their rules and numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from reseed.compare.strata import DENSE
from reseed.errors import ReseedError
from reseed.report.architecture_contrasts import differences
from reseed.report.captions import caption, data_files, reference_table, title
from reseed.report.cell_labels import Cell, label, pair_axis_name
from reseed.report.evaluation_results import Runs
from reseed.report.format import format_number
from reseed.report.page.provenance import provenance
from reseed.report.page.render import (
    Block,
    BulletList,
    Folded,
    Paragraph,
    Picture,
    Section,
    TableBlock,
)
from reseed.report.summary_tables import summary_tables
from reseed.report.table import NOT_SHARED, OFF_TARGET, cell_notes
from reseed.report.table_files import first_tables, optional_tables
from reseed.report.value_pairs import runs_by_value_table
from reseed.store.contexts import Contexts
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.system.console import counted

STABILITY, ABSORPTION = "https://arxiv.org/abs/2501.16615", "https://arxiv.org/abs/2409.14507"
BROWSER = "latents.html"
_SIZE = re.compile(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"')
LEAST_SEEDS = 3
MANY_DEAD = 0.1
MANY_DENSE = 0.05
STILL_FALLING = 0.02
NUM_PARTS = 10
"""Number of equal parts of training; the last is compared with the one before it."""
FEWEST_ROWS = 2 * NUM_PARTS
"""Minimum number of rows of a curve; with fewer, convergence cannot be judged."""


@dataclass(frozen=True, eq=False)
class ReportData:
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


def report_sections(report: ReportData, browser: bool) -> list[Section]:
    """Return all sections that have content.

    Args:
        browser: whether the report has a latent browser to link to.
    """
    first = first_tables(report.cells)
    between = differences(report.cells)
    found = [
        Section("summary", "Summary", tuple(map(TableBlock, first))),
        Section("warnings", "Warnings", (_warnings(report),)),
        Section("figures", "Figures", tuple(_pictures(report))),
        Section("tables", "Other tables", tuple(map(TableBlock, optional_tables(report.cells)))),
        Section("differences", "Differences", (TableBlock(between),) if between else ()),
        Section("measures", "All measures", tuple(_measures(report.cells))),
        Section("papers", "Comparison with published results", tuple(_papers(report.cells))),
        Section("latents", "Latents", (Paragraph(_browser(report)),) if browser else ()),
        Section(
            "provenance",
            "Protocol and provenance",
            (*_protocol(), *provenance(report.sweep, report.cells)),
        ),
    ]
    return [section for section in found if section.blocks]


def _warnings(report: ReportData) -> Block:
    runs = list({run.path: run for run in report.sweep.runs()}.values())
    found = warnings(report.cells, runs, report.incomplete)
    if found:
        return BulletList(tuple(found), warns=True)
    return Paragraph(
        "None: every cell is complete, has at least three runs, shares more than chance and is at "
        "its target L0; no FVU was still falling, and few latents are dead or dense."
    )


def _pictures(report: ReportData) -> list[Block]:
    return [
        Picture(
            name,
            title(name),
            caption(name, report.cells),
            tuple(file for file in data_files(name) if file in report.data),
            svg_size(report.sweep.path / f"{name}.svg"),
        )
        for name in report.figures
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
    alone = runs_by_value_table(cells)
    found = [("Runs of each value", [alone])] if alone else []
    return [
        Folded(title, tuple(TableBlock(table) for table in tables))
        for title, tables in [*found, *summary_tables(cells)]
    ]


def _papers(cells: Sequence[Cell]) -> list[Block]:
    table = reference_table(cells)
    return [TableBlock(table)] if table else []


def _browser(report: ReportData) -> str:
    contexts = (
        f". For {len(report.contexts)} runs the browser also shows passages on which latents fire"
        if report.contexts
        else ". To see the passages on which each fires, evaluate with `evaluation=contexts`"
    )
    return (
        f"[Every latent of every run]({BROWSER}): how often it fires, how reproducible it is, and "
        f"its match in each other run{contexts}."
    )


def _protocol() -> list[Block]:
    return [
        Paragraph(
            "SAEs that differ only in the compared factor (such as the seed) are matched one to "
            "one by an exact assignment, once by their encoders and once by their decoders "
            f"([Paulo & Belrose]({STABILITY})). Absorption is measured as by [Chanin et "
            f"al.]({ABSORPTION}). reseed's `docs/measures.md` defines nulls, intervals and every "
            "other number, under its column heading in this report and its column name in the "
            "files of `data/`."
        )
    ]


def warnings(
    cells: Sequence[Cell], runs: Sequence[Run], incomplete: Sequence[str] = ()
) -> list[str]:
    """Return a line per warning; empty if there is none.

    Args:
        runs: all runs of the sweep, finished or not.
        incomplete: a line for each cell that lacks runs.
    """
    return [
        *(f"**Incomplete.** {line.removeprefix('incomplete: ')}." for line in incomplete),
        *_few(cells),
        *_noted(cells),
        *_not_converged({run.id: run.file("training.csv") for run in runs if run.finished}),
        *_many(
            "dead latents", "did not fire at the end of training", MANY_DEAD, dead_fraction(cells)
        ),
        *_many(
            "dense latents",
            f"fire on more than {DENSE:.0%} of the held-out tokens",
            MANY_DENSE,
            dense_fraction(cells),
        ),
    ]


def fvu_fall(curve: pd.DataFrame) -> float | None:
    """Return the relative fall of the mean FVU from the second-to-last tenth of training to the
    last.

    Args:
        curve: ``training.csv``.

    Returns:
        None where the curve is too short, or has no FVU.
    """
    if "fvu" not in curve or len(curve) < FEWEST_ROWS:
        return None
    values = curve["fvu"].to_numpy(dtype=np.float64)
    size = len(values) // NUM_PARTS
    before, last = values[-2 * size : -size].mean(), values[-size:].mean()
    return float(1 - last / before) if before > 0 else None


def dead_fraction(cells: Sequence[Cell]) -> Mapping[str, float]:
    """Return the mean dead fraction of each cell, by its label."""
    return {
        label(cells, knobs): cell.estimates["dead_fraction"].mean
        for knobs, cell in cells
        if "dead_fraction" in cell.estimates
    }


def dense_fraction(cells: Sequence[Cell]) -> Mapping[str, float]:
    """Return the dense fraction of each cell, by its label; cells without held-out tokens are left
    out."""
    found = {}
    for knobs, cell in cells:
        if cell.held_out_tokens:
            tokens = cell.runs.set_index("run")["held_out_tokens"]
            seen = tokens.loc[cell.latents["run"].to_pylist()].to_numpy(dtype=np.float64)
            dense = cell.latents["firing"].to_numpy() > DENSE * seen
            found[label(cells, knobs)] = float(dense.mean())
    return found


def _few(cells: Sequence[Cell]) -> list[str]:
    few = [
        f"{label(cells, knobs)} (n = {cell.n_seeds})"
        for knobs, cell in cells
        if cell.settings.pairs_are_a_sample and cell.n_seeds < LEAST_SEEDS
    ]
    if not few:
        return []
    what = pair_axis_name(cells)
    return [
        f"**Few {what}.** With fewer than {LEAST_SEEDS} {what} there is no interval: "
        f"{'; '.join(few)}."
    ]


def _noted(cells: Sequence[Cell]) -> list[str]:
    """Return warnings of cells that the summary marks as not shared or off their target L0."""
    found = []
    for note in (NOT_SHARED, OFF_TARGET):
        about = [
            f"{label(cells, knobs)} "
            f"(shared {format_number(cell.estimates['shared_fraction'].mean)}, "
            f"L0 {cell.estimates['l0'].mean:.1f})"
            for knobs, cell in cells
            if note in cell_notes(cell, knobs)
        ]
        if about:
            found.append(f"**{note[0].upper()}{note[1:]}.** {'; '.join(about)}.")
    return found


def _not_converged(paths: Mapping[str, Path]) -> list[str]:
    """Return warnings of runs whose FVU was still falling or whose curve is too short to tell."""
    curves = {
        name: pd.read_csv(path)
        for name, path in paths.items()
        if path.is_file() and path.stat().st_size
    }
    falls = {name: fvu_fall(curve) for name, curve in curves.items()}
    falling = {name: value for name, value in falls.items() if value and value > STILL_FALLING}
    found = []
    if falling:
        worst = max(falling, key=lambda name: falling[name])
        found.append(
            f"**Not converged.** In {len(falling)} of {len(paths)} runs the FVU of training fell "
            f"by more than {STILL_FALLING:.0%} from the second-to-last tenth of the steps to the "
            f"last (largest fall: {falling[worst]:.1%} in `{worst}`). If the learning rate decays "
            "in these steps, the decay causes part of the fall. With more training tokens, the "
            "shared fraction may grow."
        )
    if unknown := list(falls.values()).count(None):
        found.append(
            f"**Convergence not known.** {counted(unknown, 'curve')} of {len(paths)} "
            f"{'has' if unknown == 1 else 'have'} fewer than {FEWEST_ROWS} points, too few to see "
            "whether the FVU was still falling. Lower `runtime.log_every_steps` for more points."
        )
    return found


def _many(name: str, what: str, limit: float, fractions: Mapping[str, float]) -> list[str]:
    found = {who: value for who, value in fractions.items() if value > limit}
    if not found:
        return []
    listed = "; ".join(f"{who} ({format_number(value)})" for who, value in found.items())
    return [f"**Many {name}.** More than {limit:.0%} of the latents {what}: {listed}."]
