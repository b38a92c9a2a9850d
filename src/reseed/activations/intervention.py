"""Forward passes of a language model with edited activations, and the logit lens.

`intervene` replaces activations at a hookpoint, and `logits` measures the effect. `unembedding` is
the logit lens: a linear map from the end of the residual stream to next-token logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_files import NoUnembedding
from reseed.activations.places import Place, watch
from reseed.activations.sites import blocks_path

Edit = Callable[[Tensor], Tensor]
"""Maps activations [sequences, context, d_in] at a hookpoint to their replacement."""


def intervene(
    model: LanguageModel, edits: Mapping[Hookpoint, Edit]
) -> AbstractContextManager[None]:
    """Replace the activations at hookpoints by ``edit(activations)`` inside the context.

    The replacement is cast to the dtype of the original. Gradients pass through it.

    Raises:
        ConfigError: the model has no such site or module.
        ValueError: the shape of a replacement differs from that of the activations.
    """
    actions: dict[Place, list[Edit]] = {}
    for hook, edit in edits.items():
        actions.setdefault(model.place(hook), []).append(edit)

    def act(place: Place, there: Tensor) -> Tensor | None:
        if model.is_checking:
            return None
        for edit in actions[place]:
            there = edit(there)
        return there

    return watch(model.model, {place: partial(act, place) for place in actions})


@torch.inference_mode()
def logits(
    model: LanguageModel,
    tokens: Int[Tensor, "sequences context"],
    edits: Mapping[Hookpoint, Edit] | None = None,
) -> Float[Tensor, "sequences context vocabulary"]:
    """Return the next-token logits of one forward pass, in the model's dtype.

    Args:
        edits: replacements of the activations at some hookpoints.

    Raises:
        ConfigError: the model's files lack its unembedding.
    """
    with intervene(model, edits or {}):
        return model.model(input_ids=tokens.to(model.device), use_cache=False).logits


@torch.no_grad()
def unembedding(model: LanguageModel) -> Float[Tensor, "vocabulary d_in"] | None:
    """Return the linear map from the end of the residual stream to logits, in float32.

    The map combines the final norm and the unembedding. The norm's divisor is fixed at 1, which
    makes the norm linear. The map is centred over the vocabulary, because a constant added to all
    logits has no effect. It has one row per token of the tokenizer; further rows of the model's
    unembedding are left out.

    Returns:
        None for a model without an unembedding.
    """
    output = model.model.get_output_embeddings()  # type: ignore[operator]
    if output is None or isinstance(output, NoUnembedding):
        return None
    weight = output.weight[: len(model.resolved.tokenizer)]
    matrix = weight.to(torch.float32, copy=True)  # changed in place, as it may be large
    norm = _final_norm(model.model)
    if norm is not None:
        scale, centres = _linear_part(norm, matrix.shape[1], model)
        matrix *= scale
        if centres:
            matrix -= matrix.mean(1, keepdim=True)
    matrix -= matrix.mean(0)
    return matrix


def _final_norm(model: nn.Module) -> nn.Module | None:
    """Return the last norm module next to the blocks that is not for embeddings, or None."""
    around = model.get_submodule(blocks_path(model).rpartition(".")[0])
    norms = [
        child
        for name, child in around.named_children()
        if "norm" in type(child).__name__.lower() and "emb" not in name
    ]
    return norms[-1] if norms else None


def _linear_part(
    norm: nn.Module, width: int, model: LanguageModel
) -> tuple[Float[Tensor, " d_in"], bool]:
    """Return a norm's factor per dimension, and whether it subtracts the mean first.

    Both are found by probing, because classes store the factor differently (some store weight − 1).
    The probes are a vector of mean 0 and mean square 1, its negative (half of the difference of
    their outputs is free of any bias), and the vector plus 1.
    """
    signs = torch.ones(width, device=model.device)
    signs[1::2] = -1
    up, down, moved = (norm(x.to(model.dtype)).float() for x in (signs, -signs, signs + 1))
    return (up - down) / 2 * signs, torch.allclose(moved, up, rtol=1e-2, atol=1e-3)
