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
        scale, centres = _linear_part(norm, matrix.shape[1], model)
        matrix *= scale
        if centres:
            matrix -= matrix.mean(1, keepdim=True)
    matrix -= matrix.mean(0)
    return matrix


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The norm behind the last block, or None: the last beside the blocks that is not of
    embeddings."""
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
    """What a norm multiplies each dimension by, and whether it takes the mean away before.

    Found by what it does, as classes call it differently (some keep weight − 1): to a vector of
    mean 0 and mean square 1, to its opposite, which a bias moves alike, and to it plus 1.
    """
    signs = torch.ones(width, device=model.device)
    signs[1::2] = -1
    up, down, moved = (norm(x.to(model.dtype)).float() for x in (signs, -signs, signs + 1))
    return (up - down) / 2 * signs, torch.allclose(moved, up, rtol=1e-2, atol=1e-3)
