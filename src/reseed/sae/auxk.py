"""AuxK: dead latents learn to reconstruct what the living leave (Gao et al. 2024, 2406.04093)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.sae.base import SAE
from reseed.sae.losses import ratio_or_zero, total_variance
from reseed.sae.sparse import sparse_decode, topk_encode

DENSE_UP_TO = 4
"""With at most so many times k_aux dead latents, plain products of them are faster than pairs."""


def auxk_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " num_latents"],
    *,
    centred: bool = True,
    weights: Float[Tensor, " num_latents"] | None = None,
) -> Float[Tensor, ""]:
    """‖ê − e‖² over the variance of e, with ê from the largest k_aux *dead* latents (App. A.2).

    The error is a constant here: only dead rows (of encoder and decoder) are moved to fit it, and
    only where ReLU(W_enc (x − b_dec) + b_enc) is above 0.

    Args:
        error: e, detached.
        centred: subtract b_dec before the encoder, as the architecture does.
        weights: of the choice, as in `topk_encode`.
    """
    candidates = dead.nonzero().squeeze(1)
    if len(candidates) == 0:
        return error.new_zeros(())
    k_aux = sae.config.k_aux or max(1, sae.d_in // 2)
    b_dec = sae.b_dec.detach() if centred else None
    k = min(k_aux, len(candidates))
    if len(candidates) <= DENSE_UP_TO * k_aux:
        found = _dense(sae, x if b_dec is None else x - b_dec, candidates, k, weights)
    else:
        latents = topk_encode(
            x, sae.W_enc, sae.b_enc, k, b_dec=b_dec, among=candidates, weights=weights
        )
        found = sparse_decode(latents, sae.W_dec)
    miss = (found - error).square().sum()
    scale = min(len(candidates) / k_aux, 1.0)
    return scale * ratio_or_zero(miss, total_variance(error))


def _dense(
    sae: SAE,
    rows: Float[Tensor, "batch d_in"],
    candidates: Int[Tensor, " dead"],
    k: int,
    weights: Float[Tensor, " num_latents"] | None,
) -> Float[Tensor, "batch d_in"]:
    """ê by matrices of the dead latents alone."""
    latents = nn_functional.linear(rows, sae.W_enc[candidates], sae.b_enc[candidates]).relu()
    if k < len(candidates):
        choice = latents.detach() if weights is None else latents.detach() * weights[candidates]
        kept = torch.zeros_like(choice).scatter_(1, choice.topk(k, dim=1).indices, 1.0)
        latents = latents * kept
    return latents @ sae.W_dec[candidates]


def auxk_term(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " num_latents"],
    *,
    per: int,
    centred: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """α·AuxK for a loss whose reconstruction is Σ‖e‖²/``per``, and AuxK itself.

    AuxK is a fraction of variance, and so is the rest of TopK's loss; times the variance of the
    batch in the units of this loss, α weighs it against the reconstruction as it does there.
    """
    aux = auxk_loss(sae, x, error.detach(), dead, centred=centred)
    return sae.config.aux_alpha * aux * (total_variance(x.detach()) / per), aux
