"""The held-out activations of a cell, read once for all of its SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reseed.compare.activation_tables import lacks_activations, sides_of, with_activations
from reseed.compare.activations import activation_measures
from reseed.compare.cell import CellResult
from reseed.config import ReseedError
from reseed.console import say
from reseed.devices import pick_device
from reseed.experiment import Experiment, resolve_experiment
from reseed.runs import Run
from reseed.sae import load_all
from reseed.train.config import RuntimeConfig

_DECLARED = ("model", "layer", "hookpoint", "dataset", "surrogate", "fingerprints")
"""What decides the held-out activations, among what a run's identity has."""
_ELSEWHERE = ("order_seed", "held_out_tokens")
"""What does not, of the data set: the order is that of training, and the fewest tokens are read."""


class NotOffered(ReseedError):
    """Why the SAEs of a cell cannot be compared on activations."""


def complete(
    cell: CellResult, runs: Sequence[Run], folder: Path, name: str, runtime: RuntimeConfig
) -> None:
    """Write a cell into its folder, with the measures on activations where they can be made.

    What the weights say is written first: a language model that is gone, or a command that is
    stopped while it runs, costs nothing of it. A cell that was written without them, and asks for
    them, is tried again.
    """
    wanted = cell.settings.activation_tokens
    if not wanted:
        cell.write(folder)
        return
    if not lacks_activations(cell):
        return
    with_activations(cell, None, "interrupted").write(folder)
    try:
        chunks, tokens = held_out_chunks(runs, wanted, runtime)
    except (ReseedError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"  {name}: compared by weights alone, not by activations: {reason}")
        with_activations(cell, None, reason).write(folder)
        return
    say(f"  {name}: comparing {len(runs)} runs on {tokens:,} held-out activations")
    saes = [run.sae(str(pick_device(runtime.device))) for run in runs]
    measured = activation_measures(saes, sides_of(cell), chunks, cell.settings.null_seed)
    with_activations(cell, measured).write(folder)


def held_out_chunks(
    runs: Sequence[Run], tokens: int, runtime: RuntimeConfig
) -> tuple[Iterator[Float[Tensor, "n d_in"]], int]:
    """The first held-out activations that all runs of a cell were measured on, and how many.

    Args:
        tokens: how many are wanted; no more are given than each run was measured on.

    Raises:
        NotOffered: the runs read different ones, or what they read is not what it was.
        ConfigError: model or data are not found.
    """
    load_all()
    records = [run.record for run in runs]
    different = differing([record["identity"] for record in records])
    if different:
        raise NotOffered(
            f"its runs do not read the same held-out activations: they differ in {different}"
        )
    fewest = min(records, key=lambda r: r["experiment"]["dataset"]["held_out_tokens"])
    experiment = _experiment(fewest)
    resolved = resolve_experiment(experiment, runtime)
    for what, fingerprint in resolved.identity["fingerprints"].items():
        if fewest["fingerprints"].get(what) != fingerprint:
            raise NotOffered(f"the {what} is not the one that the runs were trained with")
    needed = max(record["tokens"] for record in records)
    source = resolved.open(pick_device(runtime.device), needed)
    tokens = min(tokens, experiment.dataset.held_out_tokens)
    chunks = source.held_out([experiment.hook], tokens)
    return (chunk[experiment.hook] for chunk in chunks), tokens


def differing(identities: Sequence[Mapping[str, Any]]) -> str:
    """The first of the things that decide the held-out activations in which runs differ, or ""."""
    for name in _DECLARED:
        values = [identity.get(name) for identity in identities]
        if name == "dataset":
            values = [{k: v for k, v in d.items() if k not in _ELSEWHERE} for d in values if d]
        if any(value != values[0] for value in values):
            return name
    return ""


def _experiment(record: Mapping[str, Any]) -> Experiment:
    """The experiment of a record, whose kinds of model and data have to be known to be read."""
    import reseed.activations.language_model
    import reseed.activations.text
    import reseed.activations.world_config  # noqa: F401

    return Experiment.from_dict(record["experiment"])
