"""Initial weights of an SAE."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def random_directions(
    num_latents: int, d_in: int, generator: Generator
) -> Float[Tensor, "num_latents d_in"]:
    """Draw rows of norm 1, uniform on the sphere, in float32 on the CPU.

    The CPU's generator draws the same numbers for every device on which the SAE is trained.

    Raises:
        ValueError: the generator is not on the CPU.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"`generator` must be a CPU generator, got one on {generator.device}")
    rows = torch.randn(num_latents, d_in, generator=generator, dtype=torch.float32)
    # Normalise in float64, so that the norms are right to the last bit of float32.
    return (rows.double() / rows.double().norm(dim=1, keepdim=True)).float()
