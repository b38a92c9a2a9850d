"""Captions of figures (what each shows, n, and its intervals), their titles and data files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reseed.report.axes import Cell, count_text, pair_axis_name, threshold_text
from reseed.report.format import range_text
from reseed.report.references import compares_seeds

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
        "them, no interval."
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
        "a dash with letters assigned to words at random, a cross with the untrained SAE; "
        f"{count_text(cells)}, no interval. Lower is better."
    ),
    "absorption_letters": lambda cells: (
        "Absorption of each letter: bars are means over runs, dashes single runs; "
        f"{count_text(cells)}, no interval. Crosses: letters whose probe is not good enough."
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
