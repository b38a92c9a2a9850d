"""Surrogate activations: null models of stability that keep some properties of the real ones.

- ``gaussian``: samples with the mean and covariance of the real activations, without features. SAEs
  trained on them agree only because of the first two moments.
- ``random_weights``: the activations of the same architecture on the same text, with random weights
  (`language_model`). SAEs trained on them agree because of the text and the architecture, not
  because of anything that the model has learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.cache import ActivationCache
from reseed.activations.dataset import STRIPES, DatasetConfig
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.moments import Moments
from reseed.activations.source import ActivationSource, ResolvedData, ResolvedSource
from reseed.activations.stream import ChunkStream, deal_stripes, generator

_TRAINING, _HELD_OUT = 0x6761757373, 0x6761757374  # first word of the seeds of each split
_BLOCK = 4_096
"""Number of activations sampled at once. It is fixed, so that a long sample begins with a short
one."""


@dataclass(frozen=True)
class Gaussian:
    """Mean [d_in] and symmetric square root of the covariance [d_in, d_in], float32."""

    mean: Float[Tensor, " d_in"]
    root: Float[Tensor, "d_in d_in"]
    dtype: torch.dtype

    @classmethod
    def like(cls, x: Float[Tensor, "tokens d_in"]) -> Gaussian:
        """Fit to the moments of ``x``; samples have its dtype."""
        moments = Moments.of(x)
        return cls(moments.mean.float(), moments.root().float(), x.dtype)

    def draw(self, tokens: int, random: torch.Generator) -> Float[Tensor, "tokens d_in"]:
        """Sample independent tokens, the same on every device: the noise comes from the CPU."""
        noise = torch.randn(tokens, len(self.mean), generator=random).to(self.mean.device)
        return torch.addmm(self.mean, noise, self.root).to(self.dtype)


class GaussianSource(ActivationSource):
    """Gaussian samples with the moments of the first training chunk of a real source.

    The real source computes only that chunk.

    Args:
        real: the real source in the order of seed 0, so that the moments do not depend on
            ``order_seed``.
        order_seed: seed of the samples.
    """

    def __init__(self, real: ActivationSource, order_seed: int) -> None:
        self.real, self.order_seed = real, order_seed
        self.device = real.device
        self._learned: dict[Hookpoint, Gaussian] = {}

    def stream(self, hookpoints: Sequence[Hookpoint]) -> GaussianStream:
        config = replace(self.real.stream(hookpoints).config, order_seed=self.order_seed)
        return GaussianStream(config, self._learn(hookpoints), self.device)

    def held_out(
        self, hookpoints: Sequence[Hookpoint], tokens: int
    ) -> Iterator[dict[Hookpoint, Tensor]]:
        gaussians = self._learn(hookpoints)
        for first in range(0, tokens, _BLOCK):
            kept = min(_BLOCK, tokens - first)
            drawn = _drawn(gaussians, _BLOCK, _HELD_OUT, first // _BLOCK)
            yield {hookpoint: x[:kept] for hookpoint, x in drawn.items()}

    def _learn(self, hookpoints: Sequence[Hookpoint]) -> dict[Hookpoint, Gaussian]:
        """Return the Gaussian of each hookpoint; computes a chunk for new hookpoints."""
        if not set(hookpoints) <= set(self._learned):
            for hookpoint, x in self.real.stream(hookpoints).chunk(0).items():
                self._learned[hookpoint] = Gaussian.like(x.flatten(0, 1))
        return {hookpoint: self._learned[hookpoint] for hookpoint in hookpoints}


class GaussianStream(ChunkStream):
    """An endless stream; chunk c is seeded by (order seed, c)."""

    def __init__(
        self, config: DatasetConfig, gaussians: Mapping[Hookpoint, Gaussian], device: torch.device
    ) -> None:
        super().__init__(config, list(gaussians), device)
        self.gaussians = gaussians

    def _compute_chunk(self, c: int) -> dict[Hookpoint, Tensor]:
        tokens = self.config.chunk_tokens
        drawn = _drawn(self.gaussians, tokens, _TRAINING, self.config.order_seed, c)
        order = self._permutation(c, tokens // STRIPES)
        return {hookpoint: deal_stripes(x, order) for hookpoint, x in drawn.items()}


def _drawn(
    gaussians: Mapping[Hookpoint, Gaussian], tokens: int, *key: int
) -> dict[Hookpoint, Float[Tensor, "tokens d_in"]]:
    """Sample each hookpoint separately, so that it does not depend on the other hookpoints."""
    return {h: g.draw(tokens, generator(*key, _number(h))) for h, g in gaussians.items()}


def _number(hookpoint: Hookpoint) -> int:
    return int.from_bytes(hashlib.sha256(str(hookpoint).encode()).digest()[:8], "big")


SURROGATES = ("none", "gaussian", "random_weights")
"""The values of ``surrogate=``."""


def surrogate_source(source: ResolvedSource, surrogate: str) -> ResolvedSource:
    """Return the source, with random weights if ``surrogate`` is ``random_weights``."""
    return source.with_random_weights() if surrogate == "random_weights" else source


def open_source(
    data: ResolvedData,
    surrogate: str,
    device: torch.device,
    needed: int,
    cache: ActivationCache | None = None,
) -> ActivationSource:
    """Open the source or, for ``surrogate=gaussian``, Gaussian samples with its moments.

    Args:
        data: data of the source returned by `surrogate_source`.
    """
    if surrogate != "gaussian":
        return data.open(device, needed, cache)
    return GaussianSource(data.in_order(0).open(device, needed, cache), data.order_seed)


def flops_per_token(
    data: ResolvedData, surrogate: str, hookpoints: Sequence[Hookpoint], widths: Sequence[int]
) -> float:
    """Estimate the number of operations per token, for all of the hookpoints together.

    Args:
        data: data of the source returned by `surrogate_source`.
        widths: width of the activations at each hookpoint.
    """
    if surrogate != "gaussian":
        return data.flops_per_token(hookpoints)
    return sum(2.0 * width**2 for width in dict(zip(hookpoints, widths, strict=True)).values())


def surrogate_label(label: str, surrogate: str) -> str:
    """Return a source's name followed by that of the surrogate: ``embedded+gaussian``."""
    return label if surrogate == "none" else f"{label}+{surrogate}"
