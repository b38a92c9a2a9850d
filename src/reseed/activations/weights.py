"""Construction of a language model: without weights, with its trained or with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def skeleton(config: Any) -> nn.Module:
    """Build the model of a transformers configuration on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def trained(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """Load the model with the weights of its folder, on the CPU."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,  # a pickled checkpoint could run code
            trust_remote_code=False,  # so could Python files in the folder
        )


def untrained(config: Any, seed: int, dtype: torch.dtype, attention: str) -> nn.Module:
    """Build the model with its architecture's random initial weights, embeddings included.

    The weights are drawn on the CPU in float32, so that they depend on neither device nor
    precision. The process's random state is left unchanged.
    """
    from transformers import AutoModelForCausalLM

    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the only generator that is forked
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    for weights in model.parameters():  # not buffers: rotary angles stay exact, as when loaded
        weights.data = weights.data.to(dtype)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars, which would disturb the command's own display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
