"""Writing of a run's results after its training; runs whose SAE was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from safetensors.torch import save_file
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.errors import ReseedError
from reseed.evaluate.reconstruction import Reconstruction
from reseed.evaluate.true_features import TruthResult
from reseed.sae.base import SAE
from reseed.sae.checkpoint import save_sae
from reseed.sae.pretrained import Pretrained
from reseed.store.runs import Run
from reseed.system.console import say
from reseed.system.files import atomic_write, atomic_write_text
from reseed.train.run_state import RunState
from reseed.train.spec import RunSpec

CURVE = "step,tokens,fvu,dead_fraction,lr,seconds\n"
"""The training.csv of a run that was not trained here: only its header."""


@final
class PretrainedRun:
    """A run whose SAE was trained elsewhere and is only measured, with the interface of `RunState`.

    Args:
        id: the run's folder name.
        hookpoint: the hookpoint whose activations it reads.
        found: the SAE.
        device: the device on which it is measured.
    """

    scale = 1.0
    step = 0

    def __init__(
        self, id: str, hookpoint: Hookpoint, found: Pretrained, device: torch.device
    ) -> None:
        self.id, self.hookpoint = id, hookpoint
        self.error: BaseException | None = None
        try:
            self.sae: SAE = found.load().to(device)
        except ReseedError as error:  # fails this run only
            self.error = error
            say(f"failed: {id}: {error}")

    def trained_sae(self) -> SAE:
        """Return the SAE to measure and store."""
        return self.sae

    def check_weights(self) -> None:
        """Do nothing: reading the SAE already refuses values that are not finite."""

    def write_curve(self, folder: Path) -> None:
        """Write a training.csv without rows."""
        atomic_write_text(folder / "training.csv", CURVE)


GroupRun = RunState | PretrainedRun
"""A run of a group: trained here, or only measured."""


def write_results(
    state: GroupRun,
    spec: RunSpec,
    run: Run,
    measured: Reconstruction,
    truth: TruthResult | None,
    entries: dict[str, Any],
) -> None:
    """Write the results of a run, and the record's status last.

    Args:
        entries: more entries of the record: ``timings``, ``data`` (`ActivationSource.record`).
    """
    save_sae(measured.sae, run.path, spec.metadata | {"input_scale": state.scale})
    since, dead = _silent_latents(state, measured)
    latents = {
        "firing": measured.firing.cpu(),
        "tokens_since_fired": since.cpu(),
        "activation_sum": measured.activation_sum.cpu(),
        "activation_square_sum": measured.activation_square_sum.cpu(),
    }
    if truth is not None:
        latents |= truth.latents
    atomic_write(run.path / "latents.safetensors", lambda path: save_file(latents, path))
    if measured.moments is not None:
        moments = measured.moments.so_far().tensors()
        atomic_write(run.path / "activations.safetensors", lambda path: save_file(moments, path))
    state.write_curve(run.path)
    metrics = measured.metrics() | {"dead_fraction": float(dead.double().mean())}
    if isinstance(state, RunState) and spec.sae.penalty_field is not None:
        metrics["penalty_weight"] = state.sae.penalty_weight
    if truth is not None:
        metrics["truth"] = truth.metrics
    seconds = state.curve.rows[-1]["seconds"] if isinstance(state, RunState) else 0.0
    timings = entries["timings"] | {"seconds": seconds}
    # The threads of the process that trained it, which it set after the record was begun.
    environment = run.record["environment"] | {"threads": torch.get_num_threads()}
    run.finish(metrics, **{**entries, "timings": timings, "environment": environment})


def _silent_latents(
    state: GroupRun, measured: Reconstruction
) -> tuple[Int[Tensor, " num_latents"], Bool[Tensor, " num_latents"]]:
    """Return the number of tokens since each latent fired, and the mask of dead latents. For an SAE
    that was trained elsewhere, latents that did not fire on the held-out tokens are dead."""
    if isinstance(state, RunState):
        return state.tokens_since_fired, state.dead
    silent = measured.firing == 0
    return silent * measured.tokens, silent
