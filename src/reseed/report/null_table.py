"""Table "What would chance share?": nulls that keep more and more of the experiment.

    isotropic rows          the sizes only
    rows of the covariance  + the directions that vary
    untrained weights       + the SAE's initial weights
    Gaussian activations    + training, on draws with the activations' mean and covariance
    random weights          + the text, through a language model with random weights
    trained model           everything

The first three are columns of every pair; the others are cells of their own (``surrogate=``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from reseed.compare.cell import CellResult
from reseed.compare.columns import SURROGATES
from reseed.compare.nulls import kappa
from reseed.compare.statistics import Interval, welch_difference
from reseed.report.axes import Cell, columns, knob_values
from reseed.report.format import null_text, number, signed, with_interval
from reseed.report.table import Table

TITLE = "What would chance share?"
TRAINED = "trained model"
_WEIGHT_NULLS = {
    "isotropic rows": "null_{}",
    "rows of the covariance": "null_covariance_{}",
    "untrained weights": "untrained_{}",
}
"""Null → its columns of the pairs."""
_MOST = 6
"""With more families of cells the table is too long to read and is left out; the summary has their
rows."""


def null_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table: a row per null of each family of cells, from the null that keeps least;
    None if no null was trained."""
    found = _families([(k, c) for k, c in cells if c.settings.pairs_are_a_sample])
    if not found or len(found) > _MOST:
        return None
    confidence = cells[0][1].settings.confidence
    percent = f"[{confidence:.0%}]"
    names = columns([(knobs, None) for knobs, _ in found])
    header = (
        *names, "what is shared by", f"shared\n{percent}", "cos\nenc", "cos\ndec", "κ",
        f"trained − it\n{percent}",
    )  # fmt: skip
    rows = [
        (*knob_values(names, knobs), *row)
        for knobs, by_null in found
        for row in _rows(by_null, confidence)
    ]
    return Table(header, tuple(rows), len(names) + 1, TITLE, _footnotes(confidence))


def _families(cells: Sequence[Cell]) -> list[tuple[dict[str, Any], dict[str, CellResult]]]:
    """Return, per family, the knobs that its cells have in common, and surrogate → cell (``""`` for
    the model itself)."""
    by_family: dict[Any, tuple[dict[str, Any], dict[str, CellResult]]] = {}
    for knobs, cell in cells:
        model, surrogate = _split_surrogate(str(knobs.get("model", "")))
        common = {k: v for k, v in knobs.items() if k not in ("arm", "model")}
        key = (model, cell.settings.pair_by, tuple(common.items()))
        by_null = by_family.setdefault(key, ({"model": model} | common, {}))[1]
        by_null.setdefault(surrogate, cell)
    return [
        (knobs, by_null)
        for knobs, by_null in by_family.values()
        if len(by_null) > 1 and "" in by_null
    ]


def _split_surrogate(label: str) -> tuple[str, str]:
    """Split ``embedded+gaussian`` into ``embedded`` and ``gaussian``; for a model itself the second
    is empty."""
    for name in SURROGATES:
        if label.endswith(f"+{name}"):
            return label.removesuffix(f"+{name}"), name
    return label, ""


def _rows(by_null: Mapping[str, CellResult], confidence: float) -> list[tuple[str, ...]]:
    trained = by_null[""]
    shared = trained.estimates["shared_fraction"]
    rows = [_weights_row(trained, null, shared) for null in _WEIGHT_NULLS]
    for surrogate, name in SURROGATES.items():
        if surrogate in by_null:
            own = by_null[surrogate].estimates
            null = own["shared_fraction"]
            difference = signed(welch_difference(shared, null, confidence))
            rows.append((*_cell_row(name, own), number(kappa(shared.mean, null.mean)), difference))
    return [*rows, (*_cell_row(TRAINED, trained.estimates), "", "")]


def _weights_row(cell: CellResult, null: str, shared: Interval) -> tuple[str, ...]:
    def mean(measure: str) -> float:
        return cell.pair_mean(_WEIGHT_NULLS[null].format(measure))

    by_chance = mean("shared_fraction")
    drawn = null != "untrained weights"
    simulated = drawn and not isnan(by_chance)
    text = null_text(by_chance, cell.null_simulated_latents) if simulated else number(by_chance)
    cosines = [mean("cosine")] * 2 if drawn else [mean("cosine_encoder"), mean("cosine_decoder")]
    return (null, text, *map(number, cosines), number(kappa(shared.mean, by_chance)), "")


def _cell_row(name: str, estimates: Mapping[str, Interval]) -> tuple[str, ...]:
    cosines = (number(estimates[f"cosine_{which}"].mean) for which in ("encoder", "decoder"))
    return (name, with_interval(estimates["shared_fraction"]), *cosines)


def _footnotes(confidence: float) -> tuple[str, ...]:
    return (
        "The rows begin with the null that keeps least. **isotropic rows**: two random "
        "dictionaries of these sizes; **rows of the covariance**: rows drawn with the covariance "
        "of the activations; **untrained weights**: the same pairs before training.",
        "**Gaussian activations**: trained on draws with the activations' mean and covariance; "
        "**random weights**: trained on the activations of the same language model before any "
        "training, on the same text.",
        "**κ** = (S − S₀)/(1 − S₀), where S is the shared fraction of the trained model's SAEs and "
        f"S₀ that of the row. **trained − it**: S − S₀ with the {confidence:.0%} interval over "
        "seeds (Welch); * if it excludes 0.",
    )
