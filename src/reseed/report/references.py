"""Numbers of the paper, shown for comparison: another model, so never part of an estimate.

Source: Paulo & Belrose (arXiv 2501.16615): TopK SAEs of the MLP output of layer 6 of Pythia-160M,
k = 32, 32,768 latents, 8 billion tokens of the Pile, unless a factor says otherwise; the strict
rule at a threshold of 0.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reseed.report.axes import Cell
from reseed.report.format import number
from reseed.report.table import Table

SOURCE = "Paulo & Belrose, Pythia-160M MLP 6"
LAYERS_SOURCE = "Paulo & Belrose, Pythia-160M MLP"
BY_THRESHOLD: Mapping[float, float] = {
    0.3: 0.73, 0.5: 0.60, 0.6: 0.52, 0.7: 0.42, 0.8: 0.29, 0.9: 0.11,
}  # fmt: skip
UNSHARED: Mapping[int, float] = {
    2: 0.583, 3: 0.484, 4: 0.436, 5: 0.406, 6: 0.385, 7: 0.370, 8: 0.358, 9: 0.348,
}  # fmt: skip
"""u_k of their 9 seeds. As a mean over all choices of seeds, u_k does not depend on the number of
seeds from which it was computed."""
BY_WIDTH: Mapping[float, float] = {
    32: 0.81, 768: 0.79, 4_084: 0.70, 27_648: 0.43, 32_768: 0.42, 131_072: 0.28,
}  # fmt: skip
BY_K: Mapping[float, float] = {32: 0.42, 64: 0.31, 128: 0.23, 256: 0.18}
BY_TOKENS: Mapping[float, float] = {0.8e9: 0.07, 8e9: 0.42, 80e9: 0.61}
BY_LAYER: Mapping[float, float] = dict(
    enumerate((0.00, 0.14, 0.16, 0.24, 0.45, 0.42, 0.42, 0.39, 0.42, 0.46, 0.41, 0.25))
)
LLAMA = 0.30
"""Shared fraction of the SAEs of Llama 3 8B, 131,072 latents, as the paper states it."""
NEAR = 4.0
"""References are drawn up to this factor beyond the ends of the sweep's own amounts."""
FEWEST = 2
"""Fewest reference values in range to draw; one alone shows no trend."""


def compares_seeds(cells: Sequence[Cell]) -> bool:
    """Return whether some cells compare what the paper compared: runs that differ in the seed."""
    return any(cell.settings.pair_by == "seed" for _, cell in cells)


def reference_values(cells: Sequence[Cell], axis: str, at: Sequence[float]) -> dict[float, float]:
    """Return the reference values of an axis near the cells' own: amount → shared fraction.

    Empty if the axis is none of the paper's factors, or if the paper's values are far from the
    cells': they would squeeze the cells' own lines. Layers are limited to the range of the axis.
    The paper's budgets are only used on an axis in tokens, because its number of optimiser steps is
    not known.

    Args:
        at: the places of the cells on the axis.
    """
    found = _values(cells, axis)
    if not found or not at or not compares_seeds(cells):
        return {}
    low, high = min(at), max(at)
    if found is not BY_LAYER:
        low, high = low / NEAR, high * NEAR
    near = {amount: value for amount, value in found.items() if low <= amount <= high}
    return near if len(near) >= FEWEST else {}


def _values(cells: Sequence[Cell], axis: str) -> Mapping[float, float]:
    last = axis.rpartition(".")[2]
    if last == "sparsity":
        words = [str(knobs.get(axis)) for knobs, _ in cells]
        of_k = all(word.startswith(("k=", "L0≈")) for word in words)
        return BY_K if of_k else {}
    if last == "tokens" and all("steps" in cell.runs for _, cell in cells):
        return {}
    factors = {"num_latents": BY_WIDTH, "k": BY_K, "target_l0": BY_K, "tokens": BY_TOKENS}
    return {**factors, "layer": BY_LAYER}.get(last, {})


def reference_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table of the paper's numbers with their range in the cells; None if no cell
    compares seeds."""
    own = [cell for _, cell in cells if cell.settings.pair_by == "seed"]
    if not own:
        return None
    rows = [
        (
            f"shared, threshold {tau:g}",
            number(value),
            _between([cell.estimates[f"shared_fraction_at_{tau}"].mean for cell in own]),
        )
        for tau, value in BY_THRESHOLD.items()
    ]
    for k, value in UNSHARED.items():
        here = [float(cell.u[k - 2]) for cell in own if cell.n_seeds >= k]
        if here:
            rows.append(
                (f"u_{k}: of k = {k} seeds, all others lack it", number(value), _between(here))
            )
    note = (
        f"**{SOURCE}**: TopK, k = 32, 32,768 latents, 8B tokens. Another model, width and budget: "
        "for orientation, not part of any estimate. For Llama 3 8B with 131,072 latents they "
        f"report {LLAMA:.2f} shared."
    )
    return Table(("measure", SOURCE, "here"), tuple(rows), 1, "", (note,))


def _between(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"
