"""What a direction in the residual stream says of the next token (the logit lens)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reseed.activations.hookpoint import blocks_path
from reseed.activations.language_model import LanguageModel


@torch.no_grad()
def unembedding(model: LanguageModel) -> Float[Tensor, "vocabulary d_in"] | None:
    """The linear map from the end of the residual stream to logits, in float32.

    It is that of the final norm and the unembedding, with what the norm divides by held at 1 (so
    that it is linear), centred over the vocabulary: a constant in all logits says nothing. Tokens
    are those of the tokenizer; a model may have rows for more.

    Returns:
        None for a model that has no unembedding.
    """
    output = model.model.get_output_embeddings()  # type: ignore[operator]
    if output is None:
        return None
    weight = output.weight[: len(model.resolved.tokenizer)]
    matrix = weight.to(torch.float32, copy=True)  # changed in place, as it may be large
    norm = _final_norm(model.model)
    if norm is not None:
        matrix *= _scale(norm, matrix.shape[1], model)
        if isinstance(norm, nn.LayerNorm):  # which takes the mean over the width away first
            matrix -= matrix.mean(1, keepdim=True)
    matrix -= matrix.mean(0)
    return matrix


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The norm that stands behind the last block, or None."""
    parent, _, blocks = blocks_path(model).rpartition(".")
    names = [name for name, _ in model.get_submodule(parent).named_children()]
    for name in names[names.index(blocks) + 1 :]:
        child = model.get_submodule(parent).get_submodule(name)
        if "norm" in type(child).__name__.lower():
            return child
    return None


def _scale(norm: nn.Module, width: int, model: LanguageModel) -> Float[Tensor, " d_in"]:
    """What the norm multiplies each dimension by, whatever it calls it (some keep weight − 1).

    Found from what it makes of a vector of mean 0 and mean square 1 and of its opposite, which a
    bias moves alike.
    """
    signs = torch.ones(width, device=model.device)
    signs[1::2] = -1
    up, down = (norm(x.to(model.dtype)).float() for x in (signs, -signs))
    return (up - down) / 2 * signs
