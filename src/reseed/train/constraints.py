"""What holds the weights of an SAE to a surface, after every step and at the start.

The order in which these act on a step is laid down in ``optim.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.base import SAE
from reseed.train.archetypes import archetypal_decoder


class Constraints:
    """The constraints of one SAE beside the unit norm, for whatever set of weights.

    Args:
        sae: the SAE, its decoder made archetypal already where it will be.
        aligned: hold E_j · d_j = 1 (see `align_rows`).
    """

    def __init__(self, sae: SAE, *, aligned: bool) -> None:
        self.archetypal = archetypal_decoder(sae)
        self.aligned = aligned

    @torch.no_grad()
    def hold(self, weights: Mapping[str, Tensor]) -> None:
        """Bring weights back, in place.

        Args:
            weights: by the names of the SAE's parameters; those that never move may be missing.
        """
        if self.archetypal is not None:
            self.archetypal.hold(weights)
        if self.aligned:
            decoder = self.archetypal.decoder(weights) if self.archetypal else weights["W_dec"]
            align_rows(weights["W_enc"], decoder)


@torch.no_grad()
def normalise_rows(rows: Float[Tensor, "rows d_in"]) -> None:
    """Scale each row to norm 1, in place. A zero row stays."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows.div_(norms.clamp_min_(torch.finfo(rows.dtype).tiny))


@torch.no_grad()
def align_rows(
    encoder: Float[Tensor, "num_latents d_in"], decoder: Float[Tensor, "num_latents d_in"]
) -> None:
    """E_j ← E_j + (1 − E_j·d_j) d_j/‖d_j‖², in place: the nearest E_j with E_j · d_j = 1.

    Aligned training (Brzozowski & Chung 2026, 2605.18629) reparametrises the encoder to the same
    surface; here the step is projected back onto it. What of E_j is orthogonal to d_j stays as it
    is. Where the decoder row is zero there is no such E_j, and E_j stays.
    """
    squared = decoder.square().sum(1, keepdim=True)
    missing = 1 - torch.linalg.vecdot(encoder, decoder)[:, None]
    encoder.addcmul_(decoder, missing / squared.clamp_min(torch.finfo(squared.dtype).tiny))
