"""Tables of the numbers in figures that no other file of a sweep has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reseed.report.axes import Cell
from reseed.report.evaluations import Runs
from reseed.report.figures import matched_cosines


def figure_tables(cells: Sequence[Cell], runs: Runs) -> dict[str, Callable[[], pd.DataFrame]]:
    """Return file name → function that makes the table."""
    made: dict[str, Callable[[], pd.DataFrame]] = {
        "seeds.csv": lambda: seeds_frame(cells),
        "cosines.csv": lambda: cosines_frame(cells),
    }
    if any("absorption" in run.results for run in runs.values()):
        made["absorbers.csv"] = lambda: absorbers_frame(runs)
    return made


def seeds_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return p_m and u_k of each cell: ``measure`` (p or u), ``count`` (m or k), ``fraction``."""
    rows = [
        {**knobs, "measure": name, "count": count, "fraction": value}
        for knobs, cell in cells
        for name, first, values in (("p", 0, cell.p), ("u", 2, cell.u))
        for count, value in enumerate(values.tolist(), first)
    ]
    return pd.DataFrame(rows)


def cosines_frame(cells: Sequence[Cell]) -> pd.DataFrame:
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
    """Concatenate tables, each with the columns of what it is about first."""
    frames = []
    for about, values in parts:
        frame = pd.DataFrame(values)
        own = {k: v for k, v in about.items() if k not in frame}
        frames.append(
            pd.concat([pd.DataFrame([own] * len(frame), index=frame.index), frame], axis=1)
        )
    return pd.concat(frames, ignore_index=True)
