"""The modules of a language model: without numbers, with those of its files, or with fresh ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def skeleton(config: Any) -> nn.Module:
    """The model of a transformers configuration on the meta device: names and shapes alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def trained(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model with the weights that its folder holds, on the CPU."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,  # a pickled checkpoint could run code
            trust_remote_code=False,  # so could python files beside the weights
        )


def untrained(config: Any, seed: int, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model with all of its weights, embeddings too, as its architecture draws them, on the
    CPU.

    Drawn there and in float32, so that neither device nor precision moves them; the process's own
    random numbers go on as if nothing had been drawn.
    """
    from transformers import AutoModelForCausalLM

    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the only one that is forked
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    for weights in model.parameters():  # no buffers: rotary angles stay exact, as when loaded
        weights.data = weights.data.to(dtype)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No weight-loading bars: the command has a progress display of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
