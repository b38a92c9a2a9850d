"""A language model with something else in the place of a module's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reseed.activations.hookpoint import Hookpoint, first_tensor, module_path
from reseed.activations.language_model import LanguageModel

Edit = Callable[[Tensor], Tensor]
"""From the activations [sequences, context, d_in] at a hookpoint to those that go on from there."""


@contextmanager
def spliced(model: nn.Module, hookpoint: Hookpoint, edit: Edit) -> Iterator[None]:
    """Within it, all that follows ``hookpoint`` reads ``edit`` of its activations.

    What is given is brought to the dtype of what it replaces. Gradients go through.

    Raises:
        ConfigError: the model has no such module.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        there = first_tensor(output)
        given = edit(there).to(there.dtype)
        if given.shape != there.shape:
            raise ValueError(
                f"{hookpoint}: what takes the place of activations of shape {tuple(there.shape)} "
                f"must have the same; got {tuple(given.shape)}"
            )
        return given if isinstance(output, Tensor) else (given, *output[1:])

    handle = model.get_submodule(module_path(model, hookpoint)).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def logits(
    model: LanguageModel,
    tokens: Int[Tensor, "sequences context"],
    edits: Mapping[Hookpoint, Edit] | None = None,
) -> Float[Tensor, "sequences context vocabulary"]:
    """What the model says of the next token, in one forward pass, in the model's dtype.

    Args:
        edits: what takes the place of the activations at some hookpoints.
    """
    with ExitStack() as stack:
        for hookpoint, edit in (edits or {}).items():
            stack.enter_context(spliced(model.model, hookpoint, edit))
        return model.model(input_ids=tokens.to(model.device), use_cache=False).logits
