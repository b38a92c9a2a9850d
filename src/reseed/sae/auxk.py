"""AuxK: dead latents learn to reconstruct the error of the others (Gao et al. 2024, 2406.04093)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.sae.base import SAE
from reseed.sae.losses import ratio_or_zero, total_variance
from reseed.sae.sparse import sparse_decode, topk_encode

DENSE_UP_TO = 4
"""Up to this many times k_aux dead latents, dense products are faster than sums over pairs."""


def auxk_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " num_latents"],
    *,
    centred: bool = True,
    weights: Float[Tensor, " num_latents"] | None = None,
) -> Float[Tensor, ""]:
    """Return ‖ê − e‖² over the variance of e, ê from the k_aux largest *dead* latents (App. A.2).

    The error is a constant here. Only dead rows (of encoder and decoder) get a gradient, and only
    where ReLU(W_enc (x − b_dec) + b_enc) is above 0.

    Args:
        error: e, detached.
        centred: subtract b_dec before the encoder, as the architecture does.
        weights: weights by which latents are chosen, as in `topk_encode`.
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
    """Return ê by dense products of the dead latents alone."""
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
    """Return α·AuxK for a loss whose reconstruction term is Σ‖e‖²/``per``, and AuxK itself.

    AuxK and the rest of TopK's loss are fractions of variance. Multiplied by the batch's variance
    in the units of this loss, AuxK is weighed by α against the reconstruction as in TopK.
    """
    aux = auxk_loss(sae, x, error.detach(), dead, centred=centred)
    return sae.config.aux_alpha * aux * (total_variance(x.detach()) / per), aux
