"""A comparison of what two SAEs compute: latents and reconstructions on random inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.base import SAE

TOLERANCE = 1e-5
"""Allowed error relative to the largest value: float32, with products in another order."""
FLIPPED = 1e-4
"""Fraction of the active latents that may differ: those at their threshold, or tied."""
_TOKENS = 64
_LENGTHS = (0.1, 1.0, 10.0)
"""Lengths of the inputs' deviations from b_dec, in units of max(‖b_dec‖, √D)."""


@torch.no_grad()
def differ(first: SAE, second: SAE) -> str:
    """Say in words where two SAEs differ; "" if they agree."""
    if (first.d_in, first.num_latents) != (second.d_in, second.num_latents):
        return "their sizes"
    for x in _inputs(first):
        a, b = first(x), second(x)
        tolerance = TOLERANCE * float(a.latents.abs().max())
        active = int(((a.latents != 0) | (b.latents != 0)).sum())
        off = (a.latents - b.latents).abs() > tolerance
        if int(off.sum()) > FLIPPED * active:
            return f"latents: {int(off.sum()):,} of {active:,} active ones"
        steady = ~off.any(1)  # the reconstruction of a token whose latents flipped differs too
        error = (a.reconstruction - b.reconstruction)[steady].abs()
        if error.numel() and float(error.max()) > TOLERANCE * float(a.reconstruction.abs().max()):
            return "reconstructions"
    return ""


def _inputs(sae: SAE) -> list[Float[Tensor, "tokens d_in"]]:
    generator = torch.Generator().manual_seed(0)
    centre = sae.b_dec.detach().to("cpu", torch.float32)
    length = max(float(centre.norm()), sae.d_in**0.5) / sae.d_in**0.5
    draws = [torch.randn(_TOKENS, sae.d_in, generator=generator) for _ in _LENGTHS]
    return [centre + scale * length * x for scale, x in zip(_LENGTHS, draws, strict=True)]
