"""What may take the place of a source's activations: nulls of stability, by what they keep.

- ``gaussian``: draws with the mean and covariance of the real activations, which have no features.
  What SAEs share that are trained on them, they share because of the first two moments alone.
- ``random_weights``: the activations of the same architecture on the same text, with weights that
  were never trained (`language_model`). What SAEs share of them is the text's and the
  architecture's, and nothing that the model has learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.cache import ActivationCache
from reseed.activations.hookpoint import Hookpoint
from reseed.activations.moments import Moments
from reseed.activations.source import ActivationSource, ResolvedData, ResolvedSource
from reseed.activations.stream import STRIPES, ChunkStream, DatasetConfig, dealt, generator

_TRAINING, _HELD_OUT = 0x6761757373, 0x6761757374  # what the seeds of either part begin with
_BLOCK = 4_096
"""Activations drawn at once; a fixed size, so that the first so many do not depend on how many."""


@dataclass(frozen=True)
class Gaussian:
    """Mean [d_in] and symmetric square root of the covariance [d_in, d_in], float32."""

    mean: Float[Tensor, " d_in"]
    root: Float[Tensor, "d_in d_in"]
    dtype: torch.dtype

    @classmethod
    def like(cls, x: Float[Tensor, "tokens d_in"]) -> Gaussian:
        """With the moments of ``x``, in its precision."""
        moments = Moments.of(x)
        return cls(moments.mean.float(), moments.root().float(), x.dtype)

    def draw(self, tokens: int, random: torch.Generator) -> Float[Tensor, "tokens d_in"]:
        """Independent draws. The noise is made on the CPU: every device sees the same."""
        noise = torch.randn(tokens, len(self.mean), generator=random).to(self.mean.device)
        return torch.addmm(self.mean, noise, self.root).to(self.dtype)


class GaussianSource(ActivationSource):
    """Draws with the moments of the first training chunk of a real source.

    The real source computes that one chunk, and nothing else.

    Args:
        real: in the order of seed 0, so that no order of the draws moves what they are drawn from.
        order_seed: of the draws.
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
        """What there is at each of the hookpoints; a chunk is computed where one is new."""
        if not set(hookpoints) <= set(self._learned):
            for hookpoint, x in self.real.stream(hookpoints).chunk(0).items():
                self._learned[hookpoint] = Gaussian.like(x.flatten(0, 1))
        return {hookpoint: self._learned[hookpoint] for hookpoint in hookpoints}


class GaussianStream(ChunkStream):
    """Endless: chunk c is drawn by (order seed, c)."""

    def __init__(
        self, config: DatasetConfig, gaussians: Mapping[Hookpoint, Gaussian], device: torch.device
    ) -> None:
        super().__init__(config, list(gaussians), device)
        self.gaussians = gaussians

    def _dealt(self, c: int) -> dict[Hookpoint, Tensor]:
        tokens = self.config.chunk_tokens
        drawn = _drawn(self.gaussians, tokens, _TRAINING, self.config.order_seed, c)
        order = self._permutation(c, tokens // STRIPES)
        return {hookpoint: dealt(x, order) for hookpoint, x in drawn.items()}


def _drawn(
    gaussians: Mapping[Hookpoint, Gaussian], tokens: int, *key: int
) -> dict[Hookpoint, Float[Tensor, "tokens d_in"]]:
    """Every hookpoint has draws of its own, whatever is read beside it."""
    return {h: g.draw(tokens, generator(*key, _number(h))) for h, g in gaussians.items()}


def _number(hookpoint: Hookpoint) -> int:
    return int.from_bytes(hashlib.sha256(str(hookpoint).encode()).digest()[:8], "big")


SURROGATES = ("none", "gaussian", "random_weights")
"""The values of ``surrogate=``."""


def standing_in(source: ResolvedSource, surrogate: str) -> ResolvedSource:
    """The source whose data are opened: the declared one, or the same with random weights."""
    return source.with_random_weights() if surrogate == "random_weights" else source


def opened(
    data: ResolvedData,
    surrogate: str,
    device: torch.device,
    needed: int,
    cache: ActivationCache | None = None,
) -> ActivationSource:
    """The opened source, or Gaussian draws with its moments.

    Args:
        data: of what `standing_in` gave.
    """
    if surrogate != "gaussian":
        return data.open(device, needed, cache)
    return GaussianSource(data.in_order(0).open(device, needed, cache), data.order_seed)


def flops_per_token(
    data: ResolvedData, surrogate: str, hookpoints: Sequence[Hookpoint], widths: Sequence[int]
) -> float:
    """Operations that an activation at all of the hookpoints costs, about.

    Args:
        data: of what `standing_in` gave.
        widths: of the activations at each of the hookpoints.
    """
    if surrogate != "gaussian":
        return data.flops_per_token(hookpoints)
    return sum(2.0 * width**2 for width in dict(zip(hookpoints, widths, strict=True)).values())


def label_of(label: str, surrogate: str) -> str:
    """A source's name, with that of the surrogate: ``embedded+gaussian``."""
    return label if surrogate == "none" else f"{label}+{surrogate}"
