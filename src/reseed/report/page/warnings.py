"""Warnings of a report, each with its rule and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from reseed.compare.measures import DENSE
from reseed.console import counted
from reseed.report.axes import Cell, label
from reseed.report.wording import NOT_SHARED, OFF_TARGET, notes, number, paired
from reseed.runs import Run

LEAST_SEEDS = 3
MANY_DEAD = 0.1
MANY_DENSE = 0.05
STILL_FALLING = 0.02
PART = 10
"""Number of equal parts of training; the last is compared with the one before it."""
FEWEST_ROWS = 2 * PART
"""Fewest rows of a curve from which convergence can be judged."""


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
        *_not_converged({run.id: run.path for run in runs if run.finished}),
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


def fall(curve: pd.DataFrame) -> float | None:
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
    size = len(values) // PART
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
    what = paired(cells)
    return [
        f"**Few {what}.** With fewer than {LEAST_SEEDS} {what} there is no interval: "
        f"{'; '.join(few)}."
    ]


def _noted(cells: Sequence[Cell]) -> list[str]:
    """Warn of cells that the summary's footnotes mark, too."""
    found = []
    for note in (NOT_SHARED, OFF_TARGET):
        about = [
            f"{label(cells, knobs)} (shared {number(cell.estimates['shared_fraction'].mean)}, L0 "
            f"{cell.estimates['l0'].mean:.1f})"
            for knobs, cell in cells
            if note in notes(cell, knobs)
        ]
        if about:
            found.append(f"**{note[0].upper()}{note[1:]}.** {'; '.join(about)}.")
    return found


def _not_converged(folders: Mapping[str, Path]) -> list[str]:
    """Warn of runs whose FVU was still falling, and of runs whose curve is too short to tell."""
    curves = {
        name: pd.read_csv(path)
        for name, folder in folders.items()
        if (path := folder / "training.csv").is_file() and path.stat().st_size
    }
    falls = {name: fall(curve) for name, curve in curves.items()}
    falling = {name: value for name, value in falls.items() if value and value > STILL_FALLING}
    found = []
    if falling:
        worst = max(falling, key=lambda name: falling[name])
        found.append(
            f"**Not converged.** In {len(falling)} of {len(folders)} runs the FVU of training fell "
            f"by more than {STILL_FALLING:.0%} from the second-to-last tenth of the steps to the "
            f"last (most in `{worst}`: {falling[worst]:.1%}). Where the learning rate decays "
            "there, that is part of the cause. The shared fraction may grow with the budget."
        )
    if unknown := list(falls.values()).count(None):
        found.append(
            f"**Convergence not known.** {counted(unknown, 'curve')} of {len(folders)} "
            f"{'has' if unknown == 1 else 'have'} fewer than {FEWEST_ROWS} points, too few to see "
            "whether the FVU was still falling. Lower `runtime.log_every_steps` for more."
        )
    return found


def _many(name: str, what: str, limit: float, fractions: Mapping[str, float]) -> list[str]:
    found = {who: value for who, value in fractions.items() if value > limit}
    if not found:
        return []
    listed = "; ".join(f"{who} ({number(value)})" for who, value in found.items())
    return [f"**Many {name}.** More than {limit:.0%} of the latents {what}: {listed}."]
