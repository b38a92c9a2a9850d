"""The initial weights of a run: those that its training started from.

The trained SAE is read from the run's folder by `reseed.sae.checkpoint.load_sae`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from reseed.sae import load_all
from reseed.sae.base import SAE, SAEConfig
from reseed.store.runs import INITIAL_FILE, Run, RunError, read_tensors


def initial_sae(run: Run) -> SAE:
    """Return the run's SAE with its initial weights, read if stored, else drawn from the seed.

    A drawn SAE has no b_dec and is for scaled activations; a stored one has its initial b_dec and
    is for raw activations. The rows are the same for both.

    Raises:
        RunError: the initial weights depend on more than the seed and their file is missing, or
            the run was not trained here.
    """
    load_all()
    record = run.record
    if record.get("pretrained"):
        raise RunError(f"{run.path} was not trained here: its initial weights are unknown")
    config = SAEConfig.from_dict(record["experiment"]["sae"], "sae")
    sae = config.build(record["d_in"], torch.Generator().manual_seed(record["init_seed"]))
    stored = run.path / INITIAL_FILE
    if stored.is_file():
        sae.load_state_dict(read_tensors(stored, load_file))
    elif not record.get("start_is_drawn", _was_drawn(record["experiment"]["training"])):
        raise RunError(
            f"{run.path}: {INITIAL_FILE} is missing, and the seed alone does not give the weights "
            "that this run started from"
        )
    return sae


def _was_drawn(training: Mapping[str, Any]) -> bool:
    """Return ``start_is_drawn`` for an older record, which lacks it."""
    moved = training.get("aligned") or training.get("decoder", "free") != "free"
    return not moved and training.get("start", "random") == "random"
