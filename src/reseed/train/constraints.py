"""Constraints on the weights of an SAE, applied at the start and after every step.

``optim.py`` defines the order in which they act.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.base import SAE
from reseed.train.archetypes import archetypal_decoder


class Constraints:
    """The constraints of one SAE other than the unit norm, for any set of its weights.

    Args:
        sae: the SAE; an archetypal decoder must be in place already.
        aligned: hold E_j · d_j = 1 (see `align_rows`).
    """

    def __init__(self, sae: SAE, *, aligned: bool) -> None:
        self.archetypal = archetypal_decoder(sae)
        self.aligned = aligned

    @torch.no_grad()
    def hold(self, weights: Mapping[str, Tensor]) -> None:
        """Project weights onto the constraints, in place.

        Args:
            weights: by the names of the SAE's parameters; frozen ones may be missing.
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
    """Set E_j ← E_j + (1 − E_j·d_j) d_j/‖d_j‖², in place: the nearest E_j with E_j · d_j = 1.

    Aligned training (Brzozowski & Chung 2026, 2605.18629) reparametrises the encoder to the same
    surface; here each step is projected back onto it. The component of E_j orthogonal to d_j does
    not change. If the decoder row is zero no such E_j exists, and E_j does not change.
    """
    squared = decoder.square().sum(1, keepdim=True)
    missing = 1 - torch.linalg.vecdot(encoder, decoder)[:, None]
    encoder.addcmul_(decoder, missing / squared.clamp_min(torch.finfo(squared.dtype).tiny))
