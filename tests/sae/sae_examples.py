"""Inputs for the tests of all architectures: SAEs with random parameters, tokens, dead latents."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reseed.sae.base import SAE, SAEConfig


def perturbed(
    config: SAEConfig,
    d_in: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    noise: float = 0.1,
) -> SAE:
    """Build an SAE and add noise to every parameter, so that biases are not 0 or weights tied."""
    sae = config.build(d_in, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return sae.to(dtype)


def batch_of(
    count: int = 16, d_in: int = 6, seed: int = 9, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "count d_in"]:
    """Return tokens with normal components."""
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven_batch_of(
    count: int = 16, d_in: int = 6, seed: int = 9, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "count d_in"]:
    """Return tokens of very different norms, so that a few take most of a batch's latents."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(count, 1, generator=generator).exp()
    return (torch.randn(count, d_in, generator=generator) * norms).to(dtype)


def first_dead(sae: SAE, count: int) -> Bool[Tensor, " num_latents"]:
    """Return a mask in which the first ``count`` latents are dead."""
    dead = torch.zeros(sae.num_latents, dtype=torch.bool)
    dead[:count] = True
    return dead


def none_dead(sae: SAE) -> Bool[Tensor, " num_latents"]:
    """Return a mask in which no latent is dead."""
    return first_dead(sae, 0)


def leaves(
    seed: int, batch: int, d_in: int, num_latents: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Draw x, W_enc, b_enc, W_dec and b_dec, which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, d_in), (num_latents, d_in), (num_latents,), (num_latents, d_in), (d_in,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def largest_of_batch(sae: SAE, x: Tensor) -> Float[Tensor, "batch num_latents"]:
    """Return the latents of BatchTopK in training, in autograd: the k·B largest of the batch."""
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    chosen = pre.flatten().topk(sae.config.k * len(x)).indices  # pyright: ignore
    mask = torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, chosen, 1.0)
    return pre * mask.reshape(pre.shape)


def near(ours: Tensor, exact: Tensor, tolerance: float = 1e-6) -> None:
    """Compare in norm, relative to the exact tensor."""
    distance = (ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert distance <= tolerance, distance
