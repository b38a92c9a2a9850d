"""Loading of stored runs as dictionaries, with trained and with initial weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from reseed.compare.dictionary import Dictionary
from reseed.compare.truth import truth_metrics
from reseed.runs import Run

_ABOUT = "L0≈"
"""Prefix of the sparsity of a cell that was calibrated to an L0."""


def load_dictionaries(run: Run, value: str) -> tuple[Dictionary, Dictionary | None]:
    """Load a finished run with its trained and with its initial weights.

    A pretrained run has no initial weights; the second result is then None.

    Args:
        run: the run.
        value: its value of the axis that pairs up.
    """
    record, metrics, latents, sae = run.record, run.metrics, run.latents(), run.sae()
    held_out = run.activations()
    trained = Dictionary(
        id=run.id,
        seed=value,
        encoder=sae.W_enc.detach().numpy(),
        decoder=sae.W_dec.detach().numpy(),
        firing=latents["firing"],
        held_out_tokens=metrics["tokens"],
        dead=latents["tokens_since_fired"] >= record["dead_after_tokens"],
        metrics={name: metrics[name] for name in ("fvu", "l0", "cosine", "dead_fraction")}
        | {"steps": record["steps"]}
        | truth_metrics(metrics),
        truth=latents.get("truth_label"),
        covariance=None if held_out is None else held_out["covariance"],
        variance=_variance(latents, sae.W_dec.detach().numpy(), metrics["tokens"]),
    )
    if record.get("pretrained"):
        return trained, None
    start = run.initial_sae()
    rows = {"encoder": start.W_enc.detach().numpy(), "decoder": start.W_dec.detach().numpy()}
    # No table shows measures of untrained weights that need a covariance or labels.
    return trained, replace(trained, truth=None, covariance=None, variance=None, **rows)


def _variance(
    latents: Mapping[str, np.ndarray], decoder: Float[np.ndarray, "num_latents d_in"], tokens: int
) -> Float[np.ndarray, " num_latents"] | None:
    """Return Var(a_i)·‖W_i‖²; None for a run that is older than the sums it needs."""
    if "activation_sum" not in latents or "activation_square_sum" not in latents or not tokens:
        return None
    mean = latents["activation_sum"] / tokens
    variance = np.maximum(latents["activation_square_sum"] / tokens - mean**2, 0.0)
    return variance * np.linalg.norm(decoder, axis=1).astype(np.float64) ** 2


def knobs(runs: list[Run], axes: dict[str, str]) -> dict[str, Any]:
    """Return the settings that identify a cell, by their command-line names.

    Values that differ between its runs are joined by ``|``.
    """
    rows = [_knobs(run.record) for run in runs]
    out: dict[str, Any] = {"arm": axes["arm"]} if "arm" in axes else {}
    for name in rows[0]:
        values = list(dict.fromkeys(row[name] for row in rows))
        out[name] = values[0] if len(values) == 1 else "|".join(map(str, values))
    # An axis that is shown under another name already is not repeated.
    told = {"sae.num_latents", "training.tokens", "sae.target_l0"}
    amount = str(out["sparsity"]).partition("=")[2]
    told |= {axis for axis, value in axes.items() if axis.startswith("sae.") and value == amount}
    return out | {axis: v for axis, v in axes.items() if axis not in told and axis not in out}


def named_alike(
    cells: Sequence[tuple[Mapping[str, Any], Any]],
) -> list[tuple[Mapping[str, Any], Any]]:
    """Write the sparsity of all cells alike: if some are calibrated to an L0, a k is one too."""
    if not any(_ABOUT in str(knobs["sparsity"]) for knobs, _ in cells):
        return list(cells)
    alike: list[tuple[Mapping[str, Any], Any]] = []
    for knobs, cell in cells:
        words = str(knobs["sparsity"]).replace("k=", _ABOUT).split("|")
        alike.append(({**knobs, "sparsity": "|".join(dict.fromkeys(words))}, cell))
    return alike


def _knobs(record: dict[str, Any]) -> dict[str, Any]:
    e = record["experiment"]
    # A calibrated SAE is named by its target L0, not by the penalty found; a k is named as k.
    target = None if "k" in e["sae"] else e["sae"].get("target_l0")
    return {
        "model": record["labels"]["model"],
        "layer": e["layer"],
        "hookpoint": e["hookpoint"]["module"] or e["hookpoint"]["site"],
        "dataset": record["labels"]["dataset"],
        "sae": "pretrained " * bool(record.get("pretrained")) + e["sae"]["type"],
        "num_latents": record["num_latents"],
        "sparsity": record["sparsity"] if target is None else f"{_ABOUT}{target:g}",
        "tokens": record["tokens"],
        "training": e["training"]["recipe"],
    }
