"""Held-out activations of the runs of a cell, read again: the same rows, or the same tokens.

Runs of one model and hookpoint read the same activations (`held_out_chunks`). Runs of several
models or layers read different activations of the same tokens (`held_out_streams`), if their models
have one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reseed import activations, sae
from reseed.errors import ReseedError
from reseed.experiment import Experiment
from reseed.experiment.resolve import Resolved, resolve_experiment
from reseed.store.runs import Run
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

_DECLARED = ("model", "layer", "hookpoint", "dataset", "surrogate", "fingerprints", "place")
"""Entries of a run's identity that determine its held-out activations."""
_ELSEWHERE = ("order_seed", "subset_seed", "held_out_tokens")
"""Settings of the data set that do not determine them: the seeds are those of the training tokens,
and a cell reads as many held-out tokens as the run that has the fewest."""
Chunks = Iterator[Float[Tensor, "n d_in"]]


class ActivationsUnavailable(ReseedError):
    """Error whose message is the reason why a cell's SAEs cannot be compared on activations."""


def held_out_streams(
    runs: Sequence[Run], tokens: int, runtime: RuntimeConfig
) -> tuple[list[Chunks], list[int], int]:
    """Open the activations of all models (or layers) of a cell on the same held-out tokens.

    Returns:
        one stream of chunks per model, the index of the stream that each run reads, and the number
        of tokens.

    Raises:
        ActivationsUnavailable: the runs read different tokens, or a model or text has changed since
            training.
        ConfigError: a model or the data are not found.
    """
    records = [run.record for run in runs]
    different = token_mismatch([record["identity"] for record in records])
    if different:
        raise ActivationsUnavailable(f"its runs do not read the same held-out tokens: {different}")
    kinds, reads = runs_by_activations(runs)
    # No run may be compared on tokens that it was not measured on.
    tokens = min([tokens, *(r["experiment"]["dataset"]["held_out_tokens"] for r in records)])
    return [held_out_chunks(own, tokens, runtime)[0] for own in kinds], reads, tokens


def runs_by_activations(runs: Sequence[Run]) -> tuple[list[list[Run]], list[int]]:
    """Group the runs that read the same activations.

    Returns:
        the groups, and the index of each run's group.
    """
    kinds: list[list[Run]] = []
    reads = []
    for run in runs:
        identities = [[own[0].record["identity"], run.record["identity"]] for own in kinds]
        same = [i for i, both in enumerate(identities) if not activation_mismatch(both)]
        reads.append(same[0] if same else len(kinds))
        if not same:
            kinds.append([])
        kinds[reads[-1]].append(run)
    return kinds, reads


def held_out_chunks(
    runs: Sequence[Run], tokens: int, runtime: RuntimeConfig, surrogate: str = ""
) -> tuple[Chunks, int]:
    """Open the first held-out activations that all runs of a cell were measured on.

    Args:
        tokens: maximum number of tokens; fewer if some run was measured on fewer.
        surrogate: replaces the runs' own, as in ``random_weights``: the same model before training.

    Returns:
        the chunks, and the number of tokens in them.

    Raises:
        ActivationsUnavailable: the runs read different activations, or a model or text has changed
            since training.
        ConfigError: the model or the data are not found.
    """
    records = [run.record for run in runs]
    different = activation_mismatch([record["identity"] for record in records])
    if different:
        raise ActivationsUnavailable(
            f"its runs do not read the same held-out activations: they differ in {different}"
        )
    fewest = min(records, key=lambda r: r["experiment"]["dataset"]["held_out_tokens"])
    resolved = resolve_record(fewest, runtime)
    if surrogate:
        resolved = resolve_experiment(replace(resolved.experiment, surrogate=surrogate), runtime)
    experiment = resolved.experiment
    needed = max(record["tokens"] for record in records)
    source = resolved.open(pick_device(runtime.device), needed, runtime.open_cache())
    tokens = min(tokens, experiment.dataset.held_out_tokens)
    chunks = source.held_out([experiment.hook], tokens)
    return (chunk[experiment.hook] for chunk in chunks), tokens


def resolve_record(record: Mapping[str, Any], runtime: RuntimeConfig) -> Resolved:
    """Resolve the experiment of a run's record, and check that model and data are the same.

    Raises:
        ActivationsUnavailable: a fingerprint differs from the record.
        ConfigError: the model or the data are not found.
    """
    resolved = resolve_experiment(_experiment(record), runtime)
    for what, fingerprint in resolved.identity["fingerprints"].items():
        if record["fingerprints"].get(what) != fingerprint:
            raise ActivationsUnavailable(
                f"the {what} is not the one that the runs were trained with"
            )
    if record["identity"].get("place") != resolved.identity.get("place"):
        raise ActivationsUnavailable(
            f"version 0.1 read another tensor as {resolved.experiment.hook} of this model (see "
            "docs/models.md); train again"
        )
    return resolved


def token_mismatch(identities: Sequence[Mapping[str, Any]]) -> str:
    """Return the reason why runs do not read the same held-out tokens, or ""."""
    prints = [identity["fingerprints"] for identity in identities]
    if any("activations" in own for own in prints):
        return "stored activations have no tokens"
    if any("text" not in own for own in prints):
        return "the activations of a world are random draws without tokens"
    if any(identity.get("surrogate") == "gaussian" for identity in identities):
        return "the activations of surrogate=gaussian are random draws without tokens"
    for what, reason in (
        ("text", "their texts differ"),
        ("tokenizer", "their models have different tokenizers"),
    ):
        if len({own[what] for own in prints}) > 1:
            return reason
    first, *others = (held_out_settings(identity["dataset"]) for identity in identities)
    for other in others:
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if keys:
            return f"they differ in dataset.{keys[0]}"
    return ""


def held_out_settings(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a data set that determine the held-out activations."""
    return {k: v for k, v in declared.items() if k not in _ELSEWHERE}


def activation_mismatch(identities: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the first entry that determines held-out activations and differs among
    runs, or ""."""
    first, *others = map(held_out_part, identities)
    different = (name for name in _DECLARED for other in others if other[name] != first[name])
    return next(different, "")


def held_out_part(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a run's identity that determine its held-out activations."""
    found = {name: identity.get(name) for name in _DECLARED}
    return found | {"dataset": held_out_settings(found["dataset"] or {})}


def _experiment(record: Mapping[str, Any]) -> Experiment:
    """Read the experiment of a record."""
    activations.load_all()
    sae.load_all()
    return Experiment.from_dict(record["experiment"])
