"""Tables of a comparison as files, for programs (csv, parquet) and for people (md, tex)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reseed.compare.cell import CellResult
from reseed.compare.pairing import seed_of_run
from reseed.compare.registry import columns as measure_columns
from reseed.compare.strata import standardised
from reseed.errors import ReseedError
from reseed.report.architecture_contrasts import differences, tested_differences
from reseed.report.cell_labels import Cell, label
from reseed.report.detectable import detectable_difference
from reseed.report.evaluation_results import Runs
from reseed.report.evaluation_tables import evaluation_tables
from reseed.report.figures import matched_cosines
from reseed.report.format import interval_row
from reseed.report.markup import (
    markdown_code,
    markdown_inline,
    markdown_table,
    markdown_text,
    summary_latex,
)
from reseed.report.sharing_by_firing import cells_with_strata, strata_frame
from reseed.report.summary_tables import null_table, summary_tables
from reseed.report.table import Table, cell_notes, main_table
from reseed.report.truth import truth_tables, with_labels_alike
from reseed.report.value_matrix import matrix_frame, value_matrix_tables
from reseed.report.value_pairs import (
    map_table,
    pairing_frame,
    runs_by_value_table,
    value_pair_cells,
    value_pair_table,
)
from reseed.system.files import atomic_write, atomic_write_text

SUMMARY_COLUMNS = (
    "n_seeds",
    "shared_fraction",
    "shared_fraction_low",
    "shared_fraction_high",
    "shared_fraction_live",
    "coverage",
    "cosine_encoder",
    "cosine_decoder",
    "null_cosine",
    "null_shared_fraction",
    "fvu",
    "l0",
    "dead_fraction",
    "runs",
)
"""Columns of ``summary.csv`` after the knobs of the cell; others follow."""


def write_tables(
    cells: Sequence[Cell], folder: Path | str, incomplete: Sequence[str] = ()
) -> list[Path]:
    """Write ``pairs.csv``, ``latents.parquet``, ``strata.csv`` and ``summary`` as csv, md and tex.

    Also write ``pairings.csv`` and ``matrix.csv`` if pairs differ in a chosen value
    (`value_pair_cells`).

    Args:
        cells: the knobs and the measures of each cell.
        incomplete: a line for each cell that lacks runs, whether or not it is among ``cells``.

    Returns:
        The files written, each atomically.

    Raises:
        ReseedError: a cell lacks the primary measure.
    """
    if not cells:
        raise ValueError("there are no cells to write tables of")
    for _, cell in cells:
        if (primary := cell.settings.primary) not in cell.estimates:
            raise ReseedError(
                f"`comparison.primary` is {primary}, which this comparison was not measured with: "
                "compare again (reseed compare)"
            )
    out = Path(folder)
    names = ["pairs.csv", "latents.parquet", "strata.csv"]
    names += ["summary.csv", "summary.md", "summary.tex"]
    frames = {"pairs.csv": pair_frame, "strata.csv": strata_frame, "summary.csv": summary_frame}
    if value_pair_cells(cells):
        more = {"pairings.csv": pairing_frame, "matrix.csv": matrix_frame}
        frames, names = more | frames, [*names, *more]
    for name, frame in frames.items():
        atomic_write(out / name, partial(frame(cells).to_csv, index=False))
    latents = latent_table(cells)
    atomic_write(out / "latents.parquet", lambda p: pq.write_table(latents, p, compression="zstd"))
    atomic_write_text(out / "summary.md", summary_markdown(cells, incomplete))
    shown, name = shown_tables(cells, incomplete), cells[0][1].settings.name
    atomic_write_text(out / "summary.tex", summary_latex(cells, shown, name))
    return [out / name for name in names]


def summary_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return a row per cell: its knobs, `SUMMARY_COLUMNS`, its settings, every estimate with
    ``_low`` and ``_high``, and the measures without interval.

    ``shared_fraction_standardised`` is the shared fraction that a cell would have if its latents
    fired like those of all cells together (`strata.standardised`).
    """
    with_space = cells_with_strata(cells)
    confidence = cells[0][1].settings.confidence
    alike = standardised([cell.strata for _, cell in with_space], confidence) if with_space else []
    extra = {
        id(cell): interval_row("shared_fraction_standardised", one.estimate)
        | {"standardised_kept": one.coverage}
        for (_, cell), one in zip(with_space, alike, strict=True)
    }
    tested = tested_differences(cells)
    return pd.DataFrame(
        [_summary_row(knobs, cell, tested) | extra.get(id(cell), {}) for knobs, cell in cells]
    )


def _summary_row(knobs: Mapping[str, Any], cell: CellResult, tested: int) -> dict[str, Any]:
    """Return the row of a cell: fractions as means over pairs, metrics as means over runs; None if
    not known.

    ``tested`` is the number of differences for which ``visible_difference`` is corrected.
    """
    estimates, settings = cell.estimates, cell.settings
    row = dict(knobs)
    for name in SUMMARY_COLUMNS:
        if name in estimates:
            row[name] = estimates[name].mean
        elif name in cell.pairs:
            row[name] = cell.pair_mean(name)
        else:
            row[name] = None
    row["n_seeds"] = cell.n_seeds
    row["shared_fraction_low"] = estimates["shared_fraction"].low
    row["shared_fraction_high"] = estimates["shared_fraction"].high
    row["runs"] = " ".join(cell.runs["run"])
    extra = {
        "unshared_fraction": float(cell.u[-1]),
        "num_latents": cell.num_latents,
        "held_out_tokens": cell.held_out_tokens,
        "threshold": settings.threshold,
        "live_at_least": settings.live_at_least,
        "confidence": settings.confidence,
        "primary": settings.primary,
        "visible_difference": detectable_difference(
            estimates[settings.primary], estimates[settings.primary], settings.confidence, tested
        ),
        "note": "; ".join(cell_notes(cell, knobs)),
        # The former name of `untrained_shared_fraction`.
        "shared_fraction_untrained": cell.pair_mean("untrained_shared_fraction"),
    }
    for name, found in estimates.items():
        # `x_low` of an evaluation is the mean of the runs' own bounds (evaluations.csv), and would
        # replace the lower bound over runs of `x`.
        if name.removesuffix("_low").removesuffix("_high") in estimates.keys() - {name}:
            continue
        extra |= interval_row(name, found)
    means = {n for n, column in measure_columns("pair").items() if column.scale == "mean"}
    extra |= {n: cell.pair_mean(n) for n in cell.pairs if n in means}
    return row | {name: value for name, value in extra.items() if name not in row}


def pair_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return a row per pair of runs, the knobs of its cell first."""
    frames = []
    for knobs, cell in cells:
        frame = cell.pairs.copy()
        for i, (name, value) in enumerate(knobs.items()):
            frame.insert(i, name, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def latent_table(cells: Sequence[Cell]) -> pa.Table:
    """Return a row per latent of each run, the knobs of its cell first.

    Where pairs differ in more than the seed, ``place`` is the run's label among the runs of its
    cell (``topk, 0``), and ``seed`` is its seed, empty if that is not known.
    """
    names = list(dict.fromkeys(name for knobs, _ in cells for name in knobs if name != "seed"))
    values = {name: _one_type([knobs.get(name) for knobs, _ in cells]) for name in names}
    labels = [cell.latents["seed"].to_pylist() for _, cell in cells]
    seeds = [
        [seed_of_run(label, cell.settings, knobs) for label in own]
        for own, (knobs, cell) in zip(labels, cells, strict=True)
    ]
    numbers = all(word is None or word.isdigit() for own in seeds for word in own)
    tables = []
    for i, (_, cell) in enumerate(cells):
        found = [word if word is None or not numbers else int(word) for word in seeds[i]]
        column = pa.array(found, pa.int64() if numbers else pa.string())
        at = cell.latents.schema.get_field_index("seed")
        table = cell.latents.set_column(at, "seed", column)
        if labels != seeds:
            table = table.add_column(at, "place", pa.array(labels[i]))
        for position, name in enumerate(names):
            column = pa.repeat(pa.scalar(values[name][i], values[name].type), len(table))
            table = table.add_column(position, name, column)
        tables.append(table)
    # A cell that was compared without a measure has nulls in its column.
    return pa.concat_tables(with_labels_alike(tables), promote_options="default")


def _one_type(values: list[Any]) -> pa.Array:
    """Return the values as they are if they have one type, else as strings."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])


def summary_markdown(cells: Sequence[Cell], incomplete: Sequence[str] = ()) -> str:
    """Return ``summary.md``: the summary that the terminal shows, then differences,
    `summary_tables` and runs.

    ``incomplete`` is added to the footnotes of the first table.
    """
    first, *others = first_tables(cells, incomplete)
    parts = ["# Summary", markdown_inline(first.caption), markdown_table(first)]
    for table in others:
        parts += ["## Other pairs", markdown_inline(table.caption), markdown_table(table)]
    for table in optional_tables(cells):
        parts += [f"## {markdown_text(table.caption)}", markdown_table(table)]
    alone = runs_by_value_table(cells)
    if alone:
        parts += ["## Runs of each value", markdown_table(alone)]
    between = differences(cells)
    if between:
        parts += ["## Differences", markdown_table(between)]
    for title, tables in summary_tables(cells):
        parts += [f"## {title}", *map(markdown_table, tables)]
    parts.append("## Runs")
    for knobs, cell in cells:
        runs = ", ".join(map(markdown_code, cell.runs["run"]))
        parts.append(f"- {markdown_text(label(cells, knobs))}: {runs}")
    return re.sub(r"(\n- .*)\n(?=\n- )", r"\1", "\n\n".join(parts)) + "\n"


def first_tables(cells: Sequence[Cell], incomplete: Sequence[str] = ()) -> list[Table]:
    """Return the table of the cells whose pairs are a sample, and that of the other pairs, if there
    are any. ``incomplete`` is added to the footnotes of the first."""
    sample = [(knobs, cell) for knobs, cell in cells if cell.settings.pairs_are_a_sample]
    others = value_pair_table(cells)
    main = [main_table(sample, tested_differences(sample))] if sample else []
    first, *rest = [*main, *([others] if others else [])]
    return [replace(first, footnotes=(*first.footnotes, *incomplete)), *rest]


def shown_tables(cells: Sequence[Cell], incomplete: Sequence[str] = ()) -> list[Table]:
    """Return all tables that the terminal shows and ``summary.tex`` has."""
    return [*first_tables(cells, incomplete), *optional_tables(cells)]


def optional_tables(cells: Sequence[Cell]) -> list[Table]:
    """Return the tables that only some comparisons have."""
    found = [table for table in (map_table(cells), null_table(cells)) if table]
    others = [*value_matrix_tables(cells), *truth_tables(cells), *evaluation_tables(cells)]
    return [*found, *others]


def figure_tables(cells: Sequence[Cell], runs: Runs) -> dict[str, Callable[[], pd.DataFrame]]:
    """Return file name → function that makes the table, for figures whose numbers are in no other
    file."""
    made: dict[str, Callable[[], pd.DataFrame]] = {
        "seeds.csv": lambda: sharing_profile_frame(cells),
        "cosines.csv": lambda: matched_cosines_frame(cells),
    }
    if any("absorption" in run.results for run in runs.values()):
        made["absorbers.csv"] = lambda: absorbers_frame(runs)
    return made


def sharing_profile_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return p_m and u_k of each cell: ``measure`` (p or u), ``count`` (m or k), ``fraction``."""
    rows = [
        {**knobs, "measure": name, "count": count, "fraction": value}
        for knobs, cell in cells
        for name, first, values in (("p", 0, cell.p), ("u", 2, cell.u))
        for count, value in enumerate(values.tolist(), first)
    ]
    return pd.DataFrame(rows)


def matched_cosines_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the drawn points: both cosines of a matched latent, and whether encoder and decoder
    give it the same match."""
    return _stacked(
        (knobs, dict(zip(("cosine_encoder", "cosine_decoder", "same_match"),
                         matched_cosines(cell), strict=True)))
        for knobs, cell in cells
    )  # fmt: skip


def absorbers_frame(runs: Runs) -> pd.DataFrame:
    """Return the latents that absorb words of each letter, of all runs."""
    return _stacked(
        (run.about, run.results["absorption"].tables["absorbers"])
        for run in runs.values()
        if "absorption" in run.results
    )


def _stacked(parts: Iterable[tuple[Mapping[str, Any], Any]]) -> pd.DataFrame:
    """Concatenate tables; columns from the mapping of each table come before its own."""
    frames = []
    for about, values in parts:
        frame = pd.DataFrame(values)
        own = {k: v for k, v in about.items() if k not in frame}
        frames.append(
            pd.concat([pd.DataFrame([own] * len(frame), index=frame.index), frame], axis=1)
        )
    return pd.concat(frames, ignore_index=True)
