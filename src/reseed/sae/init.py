"""How the weights of an SAE begin."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def random_directions(
    num_latents: int, d_in: int, generator: Generator
) -> Float[Tensor, "num_latents d_in"]:
    """Rows of norm 1, uniform on the sphere: float32, drawn on the CPU.

    The CPU's generator draws the same numbers wherever the SAE is trained later.

    Raises:
        ValueError: a generator of another device.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"`generator` must be a CPU generator, got one on {generator.device}")
    rows = torch.randn(num_latents, d_in, generator=generator, dtype=torch.float32)
    # In float64, so that the norms are right to the last bit of float32.
    return (rows.double() / rows.double().norm(dim=1, keepdim=True)).float()
