"""Captions of figures (what each shows, n, and its intervals), and the paper's numbers beside them.

The paper's numbers come from another model, so they are shown for comparison and never part of an
estimate. Source: Paulo & Belrose (arXiv 2501.16615): TopK SAEs of the MLP output of layer 6 of
Pythia-160M, k = 32, 32,768 latents, 8 billion tokens of the Pile, except for the factor that a
constant is named after; the strict rule at a threshold of 0.7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from reseed.report.cell_labels import Cell, count_text, pair_axis_name, threshold_text
from reseed.report.format import format_number, range_text
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
"""Reference values are drawn up to this factor beyond the ends of the sweep's own range."""
FEWEST = 2
"""Minimum number of reference values in range; fewer are not drawn, as one shows no trend."""


def compares_seeds(cells: Sequence[Cell]) -> bool:
    """Return whether some cells compare what the paper compared: runs that differ in the seed."""
    return any(cell.settings.pair_by == "seed" for _, cell in cells)


def reference_values(cells: Sequence[Cell], axis: str, at: Sequence[float]) -> dict[float, float]:
    """Return the paper's values near those of the cells: value on the axis → shared fraction.

    Empty if the axis is none of the paper's factors, or if the paper's values are far from the
    cells', because the axis would then leave little room for the cells. Layers are limited to the
    range of the cells. The paper's budgets are only used on an axis in tokens, because its number
    of optimiser steps is not known.

    Args:
        at: the cells' values on the axis.
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
            format_number(value),
            _between([cell.estimates[f"shared_fraction_at_{tau}"].mean for cell in own]),
        )
        for tau, value in BY_THRESHOLD.items()
    ]
    for k, value in UNSHARED.items():
        here = [float(cell.u[k - 2]) for cell in own if cell.n_seeds >= k]
        if here:
            rows.append(
                (
                    f"u_{k}: shared with no other of k = {k} seeds",
                    format_number(value),
                    _between(here),
                )
            )
    note = (
        f"**{SOURCE}**: TopK, k = 32, 32,768 latents, 8B tokens. Another model, width and budget: "
        "for orientation, not part of any estimate. For Llama 3 8B with 131,072 latents they "
        f"report {LLAMA:.2f} shared."
    )
    return Table(("measure", SOURCE, "here"), tuple(rows), 1, "", (note,))


def _between(values: Sequence[float]) -> str:
    low, high = format_number(min(values)), format_number(max(values))
    return low if low == high else f"{low} to {high}"


BY_AXIS = "shared_fraction_by_"
"""Prefix of the names of figures over an axis."""
_LATENTS = ("latents.parquet",)
_RUNS = ("evaluations.csv",)


def title(name: str) -> str:
    """Return the title of a figure."""
    if name.startswith(BY_AXIS):
        return f"Shared latents by {name.removeprefix(BY_AXIS).replace('_', ' ')}"
    return _TITLES.get(name, name.replace("_", " "))


def caption(name: str, cells: Sequence[Cell]) -> str:
    """Return the caption of a figure: how to read it."""
    key = BY_AXIS if name.startswith(BY_AXIS) else name
    return _CAPTIONS[key](cells) if key in _CAPTIONS else f"{_sample(cells)}."


def data_files(name: str) -> tuple[str, ...]:
    """Return the names of the files that hold the numbers of a figure."""
    return ("summary.csv",) if name.startswith(BY_AXIS) else _DATA.get(name, ("summary.csv",))


def _sample(cells: Sequence[Cell]) -> str:
    """Return ``n = 3 seeds; 95% interval over seeds``."""
    if not any(e.low is not None for _, cell in cells for e in cell.estimates.values()):
        return f"{count_text(cells)}; no interval"
    return f"{count_text(cells)}; {_level(cells)} interval over {pair_axis_name(cells)}"


def _level(cells: Sequence[Cell]) -> str:
    return f"{cells[0][1].settings.confidence:.0%}"


def _tokens(cells: Sequence[Cell]) -> str:
    return f"{range_text(cell.held_out_tokens for _, cell in cells)} held-out tokens"


def _paper(cells: Sequence[Cell]) -> str:
    return " Grey crosses: Paulo & Belrose, another model." if compares_seeds(cells) else ""


def _other(cells: Sequence[Cell]) -> str:
    return pair_axis_name(cells, plural=False)


_TITLES = {
    "shared_fraction": "Shared latents",
    "seeds": "Number of others that share a latent",
    "cosines": "Matched latents, by encoder and by decoder",
    "firing": "Cosine of matched latents by how often they fire",
    "threshold": "Shared latents by threshold",
    "firing_deciles": "Shared latents by how often they fire",
    "quality_coverage": "How well matched latents replace each other",
    "matrix": "Shared latents of each pair of values",
    "truth": "Latents against the true directions",
    "density": "Firing density of latents",
    "faithfulness": "What the model loses",
    "probe_f1": "Latents against probes, by letter",
    "absorption": "Absorption",
    "absorption_letters": "Absorption by letter",
    "absorbers": "Latents that absorb words, by letter",
}

_CAPTIONS: dict[str, Callable[[Sequence[Cell]], str]] = {
    "shared_fraction": lambda cells: (
        f"Fraction of latents shared with another {_other(cells)}: the same match by encoder and "
        f"by decoder, both cosines at least {threshold_text(cells)}. Dots and bars: mean over "
        f"pairs with its interval; {_sample(cells)}. Ticks: single pairs; diamonds: live latents "
        "only; crosses: the same SAEs untrained."
    ),
    "seeds": lambda cells: (
        "Rings or bars: fraction of latents shared with exactly m of the other "
        f"{pair_axis_name(cells)}, darker for more. Lines: the fraction that none of k − 1 other "
        f"{pair_axis_name(cells)} has, against k; {count_text(cells)}, mean over all choices of "
        "k, no interval."
    ),
    "cosines": lambda cells: (
        "A point for each latent and other run (a random sample if there are many); "
        f"{count_text(cells)}. Dots: encoder and decoder give the same match; plus signs: "
        "different matches. Dots right of and above the dashed lines "
        f"({threshold_text(cells)}) are shared latents. Cross: random rows, matched the same way."
    ),
    "firing": lambda cells: (
        f"Decoder cosine with the match against firings in ten million tokens, from "
        f"{_tokens(cells)}; every latent against every other run, {count_text(cells)}. "
        "Dots: shared; plus signs: not shared."
    ),
    "threshold": lambda cells: (
        f"The strict shared fraction against its threshold; {_sample(cells)} (bands). Dotted: the "
        f"threshold of the tables.{_paper(cells)}"
    ),
    "firing_deciles": lambda cells: (
        "The strict shared fraction of latents that never fired, of those that are not live, and "
        f"of live latents by decile of firing in {_tokens(cells)}; {_sample(cells)} (bars)."
    ),
    BY_AXIS: lambda cells: (
        f"Fraction of latents shared with another {_other(cells)}, both cosines at least "
        f"{threshold_text(cells)}; {_sample(cells)} (bands). Dotted grey: the same SAEs "
        f"untrained; dashed black: random rows.{_paper(cells)}"
    ),
    "quality_coverage": lambda cells: (
        "Mean R (fraction of the damage of ablating a latent that its match repairs) of the r "
        f"matches with the highest cosines, against r; {count_text(cells)}, area with its "
        f"{_level(cells)} interval."
    ),
    "matrix": lambda cells: (
        "The strict shared fraction of runs with these values, mean over pairs; "
        f"{count_text(cells)}."
    ),
    "truth": lambda cells: (
        "Fraction of live latents that are atoms (one true feature each): among those shared with "
        f"another {_other(cells)} (dots) and among the others (diamonds), with the difference as a "
        f"number; {_sample(cells)}."
    ),
    "density": lambda cells: (
        "Histogram of the fraction of evaluated tokens on which a latent fires, over all runs of a "
        f"cell; {count_text(cells)}, no interval. Latents right of the dashed line are dense."
    ),
    "faithfulness": lambda cells: (
        "A point for each run: the increase of the model's cross-entropy with the SAE spliced in, "
        f"and the fraction of KL divergence that it recovers, against L0; {count_text(cells)}, no "
        "interval. Grey lines join the means of cells that differ only in sparsity."
    ),
    "probe_f1": lambda cells: (
        "A point for each letter and run: F1 of the letter's first latent against F1 of the probe "
        f"on the activations; {count_text(cells)}, no interval. Below the diagonal the SAE lost "
        "information that the activations have."
    ),
    "absorption": lambda cells: (
        "Absorbed fraction against L0, and against width if it differs: a point for each run, "
        "a dash for letters assigned to words at random, a cross for the untrained SAE; "
        f"{count_text(cells)}, no interval. Lower is better."
    ),
    "absorption_letters": lambda cells: (
        "Absorption of each letter: bars are means over runs, dashes single runs; "
        f"{count_text(cells)}, no interval. Crosses: letters that cannot be evaluated."
    ),
    "absorbers": lambda cells: (
        "Cosine with the probe of a letter: latents that stand for the letter (diamonds), and "
        f"latents that absorb its words (dots, larger for more words), of all runs; "
        f"{count_text(cells)}."
    ),
}  # fmt: skip

_DATA: dict[str, tuple[str, ...]] = {
    "shared_fraction": ("summary.csv", "pairs.csv"),
    "seeds": ("seeds.csv",),
    "cosines": ("cosines.csv", *_LATENTS),
    "firing": _LATENTS,
    "firing_deciles": ("strata.csv",),
    "quality_coverage": _LATENTS,
    "matrix": ("matrix.csv",),
    "truth": ("summary.csv", "pairs.csv"),
    "density": _LATENTS,
    "faithfulness": _RUNS,
    "probe_f1": ("letters.csv",),
    "absorption": _RUNS,
    "absorption_letters": ("letters.csv",),
    "absorbers": ("absorbers.csv", "letters.csv"),
}
