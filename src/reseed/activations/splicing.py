"""Forward passes of a language model with edited activations."""

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
"""Maps activations [sequences, context, d_in] at a hookpoint to their replacement."""


@contextmanager
def spliced(model: nn.Module, hookpoint: Hookpoint, edit: Edit) -> Iterator[None]:
    """Replace the activations at ``hookpoint`` by ``edit`` of them inside the context.

    The replacement is cast to the dtype of the original. Gradients pass through it.

    Raises:
        ConfigError: the model has no such module.
        ValueError: the replacement has another shape.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        there = first_tensor(output)
        given = edit(there).to(there.dtype)
        if given.shape != there.shape:
            raise ValueError(
                f"{hookpoint}: the replacement of activations of shape {tuple(there.shape)} "
                f"must have the same shape; got {tuple(given.shape)}"
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
    """Return the next-token logits of one forward pass, in the model's dtype.

    Args:
        edits: replacements of the activations at some hookpoints.
    """
    with ExitStack() as stack:
        for hookpoint, edit in (edits or {}).items():
            stack.enter_context(spliced(model.model, hookpoint, edit))
        return model.model(input_ids=tokens.to(model.device), use_cache=False).logits
