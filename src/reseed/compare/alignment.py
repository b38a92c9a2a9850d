"""Orthogonal maps between the activations of two language models, fitted on the same tokens.

Two models of equal width have unrelated bases, even if they have learned the same. With X and Y
[tokens, D] the activations of the same tokens, centred to X₀ and Y₀, the orthogonal R that
minimises ‖X₀R − Y₀‖ is UVᵀ of the decomposition UΣVᵀ of X₀ᵀY₀ (Schönemann 1966). It takes encoder
and decoder rows of the first model's SAEs into the basis of the second: e·x = eR·xR.

The map is measured on tokens from which it was not fitted, by R², beside two nulls: the map that
is fitted after the tokens of Y are shuffled, and maps to the same models with random weights. Sums
over tokens are in float64; memory is O(D²) for each pair of places, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reseed.compare.activations.batch_codes import rebatch

FIT_TOKENS = 20
"""Minimum number of tokens of the fit, for each dimension of the activations."""
MEASURED = 5
"""One in this many tokens is used to measure the map and not to fit it: the last ones."""
MASSIVE = 10.0
"""A token is left out if the norm of its activation in either model exceeds the median norm by this
factor: a few massive activations, as of the first positions, would decide the map alone."""
MARGIN = 2
"""Planned tokens, as a multiple of those that a map needs: massive ones are known only when the
activations have been read."""
_BLOCK = 4_096
"""Number of tokens that are read, and shuffled, at once; the first give the median norm."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Map between the bases of two models, with its quality.

    Attributes:
        rotation: the orthogonal R; a row of the first model times R is a row of the second's basis.
        shuffled: the map fitted on shuffled tokens.
        r2: fraction of the variance of held-out activations that the map explains, with one scale
            and the means of the fit; mean of both directions. Negative if it predicts worse than
            the mean.
        r2_shuffled: R² of the map fitted on shuffled tokens.
        r2_random: R² of maps between one model and the other with random weights, mean of both;
            NaN if a model of the pair has random weights itself.
        tokens, held_out, massive: number of tokens of the fit, of the measurement, and left out.
    """

    rotation: Float[np.ndarray, "d_in d_in"]
    shuffled: Float[np.ndarray, "d_in d_in"]
    r2: float
    r2_shuffled: float
    r2_random: float
    tokens: int
    held_out: int
    massive: int

    def of_covariance(self, own: Float[np.ndarray, "d_in d_in"]) -> Float[np.ndarray, "d_in d_in"]:
        """Return a second moment of the first model's vectors, in the basis of the second."""
        return self.rotation.T @ own @ self.rotation

    def reversed(self) -> Self:
        """Return the map from the second model to the first."""
        return replace(self, rotation=self.rotation.T, shuffled=self.shuffled.T)

    def by_chance(self) -> Self:
        """Return the alignment with the map that was fitted on shuffled tokens."""
        return replace(self, rotation=self.shuffled)


def mapped_rows(
    rows: Float[np.ndarray, "n d_in"], rotation: Float[np.ndarray, "d_in d_in"]
) -> Float[np.ndarray, "n d_in"]:
    """Return the rows times the matrix, computed in float64 block by block, in the rows' dtype."""
    out = np.empty_like(rows)
    for start in range(0, len(rows), _BLOCK):
        out[start : start + _BLOCK] = rows[start : start + _BLOCK].astype(np.float64) @ rotation
    return out


def needed_tokens(d_in: int) -> int:
    """Return the minimum number of held-out tokens to plan for a map: `MARGIN` times those from
    which it can be fitted and measured if none is massive."""
    return MARGIN * FIT_TOKENS * d_in * MEASURED // (MEASURED - 1)


class TooFewTokensError(ValueError):
    """Too few tokens are left for a map, without the massive ones."""


@dataclass(eq=False)
class PairedSums:
    """Running sums of two activations of each token, in float64.

    Attributes:
        x, y: Σx and Σy.
        products: Σxᵀy.
        squares: Σ‖x‖² and Σ‖y‖².
    """

    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_in"]
    products: Float[Tensor, "d_in d_in"]
    squares: Float[Tensor, 2]
    tokens: int = 0

    @classmethod
    def empty(cls, like: Float[Tensor, "tokens d_in"]) -> Self:
        """Return the sums before the first token of such activations."""
        zeros = like.new_zeros(like.shape[1], dtype=torch.float64)
        return cls(zeros, zeros, torch.outer(zeros, zeros), zeros.new_zeros(2))

    def add(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_in"]) -> None:
        """Add tokens, whose activations are float64."""
        self.tokens += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.products += x.T @ y
        self.squares += torch.stack([x.square().sum(), y.square().sum()])

    def about(
        self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"]
    ) -> tuple[Float[Tensor, "d_in d_in"], list[float]]:
        """Return Σ(x−a)ᵀ(y−b), and [Σ‖x−a‖², Σ‖y−b‖²], for centres a and b."""
        products = self.products - torch.outer(x, self.y) - torch.outer(self.x, y)
        products += self.tokens * torch.outer(x, y)
        around = [
            float(own - 2 * centre @ total + self.tokens * centre @ centre)
            for own, centre, total in zip(self.squares, (x, y), (self.x, self.y), strict=True)
        ]
        return products, around

    @property
    def means(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_in"]]:
        return self.x / self.tokens, self.y / self.tokens


def procrustes(sums: PairedSums) -> Float[Tensor, "d_in d_in"]:
    """Return the orthogonal R that minimises ‖X₀R − Y₀‖ over the tokens of the sums."""
    left, _, right = torch.linalg.svd(sums.about(*sums.means)[0])
    return left @ right


def r_squared(rotation: Float[Tensor, "d_in d_in"], fit: PairedSums, measured: PairedSums) -> float:
    """Return the R² of a map on other tokens than those of the fit; see `Alignment.r2`.

    The prediction of y is s·(x − x̄)R + ȳ with the means of the fit and the scale s that is best
    there. With R fixed, tr(RᵀX₀ᵀY₀) is all that both scales and both residuals need.
    """
    products, own = fit.about(*fit.means)
    along = float((rotation * products).sum())
    products, seen = measured.about(*fit.means)
    there = float((rotation * products).sum())
    _, total = measured.about(*measured.means)
    if min(*own, *total) <= 0:  # an activation that does not vary
        return float("nan")
    found = []
    for source, target in ((0, 1), (1, 0)):
        scale = along / own[source]
        residual = seen[target] - 2 * scale * there + scale**2 * seen[source]
        found.append(1 - residual / total[target])
    return sum(found) / 2


@dataclass(eq=False)
class _Fit:
    """The sums of one pair of places; those of shuffled tokens only if they are wanted."""

    fit: PairedSums
    measured: PairedSums
    shuffled: PairedSums | None = None
    massive: int = 0

    @classmethod
    def empty(cls, like: Float[Tensor, "tokens d_in"], shuffled: bool) -> Self:
        fit, measured = PairedSums.empty(like), PairedSums.empty(like)
        return cls(fit, measured, PairedSums.empty(like) if shuffled else None)

    def add(
        self,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_in"],
        kept: Bool[Tensor, " tokens"],
        fitted: int,
        random: torch.Generator,
    ) -> None:
        """Add a block, of which the first ``fitted`` tokens are for the fit."""
        self.massive += int((~kept).sum())
        first, rest = (kept[:fitted], kept[fitted:])
        u, v = x[:fitted][first].double(), y[:fitted][first].double()
        self.fit.add(u, v)
        if self.shuffled is not None:
            self.shuffled.add(u, v[torch.randperm(len(v), generator=random).to(v.device)])
        self.measured.add(x[fitted:][rest].double(), y[fitted:][rest].double())

    @property
    def enough(self) -> bool:
        return self.fit.tokens >= FIT_TOKENS * len(self.fit.x) and self.measured.tokens > 0

    def r2(self) -> float:
        """Return R² of the map; NaN if too few tokens are left for it."""
        if not self.enough:
            return float("nan")
        return r_squared(procrustes(self.fit), self.fit, self.measured)

    def alignment(self, r2_random: float) -> Alignment:
        d_in = len(self.fit.x)
        if not self.enough:
            raise TooFewTokensError(
                f"a map of {d_in} dimensions needs at least {FIT_TOKENS * d_in:,} tokens to fit "
                f"and others to measure; without {self.massive:,} massive ones there are "
                f"{self.fit.tokens:,} and {self.measured.tokens:,}: raise dataset.held_out_tokens"
            )
        assert self.shuffled is not None
        rotation, shuffled = procrustes(self.fit), procrustes(self.shuffled)
        return Alignment(
            rotation=rotation.cpu().numpy(),
            shuffled=shuffled.cpu().numpy(),
            r2=r_squared(rotation, self.fit, self.measured),
            r2_shuffled=r_squared(shuffled, self.shuffled, self.measured),
            r2_random=r2_random,
            tokens=self.fit.tokens,
            held_out=self.measured.tokens,
            massive=self.massive,
        )


@torch.inference_mode()
def fit_maps(
    streams: Sequence[Iterable[Float[Tensor, "n d_in"]]],
    pairs: Iterable[tuple[int, int]],
    tokens: int,
    *,
    untrained: Mapping[int, Iterable[Float[Tensor, "n d_in"]]] | None = None,
    seed: int = 0,
) -> dict[tuple[int, int], Alignment]:
    """Fit the maps between pairs of streams, in one pass over them.

    Args:
        streams: activations of the same tokens, in pieces of any size; row i is the same token in
            each.
        pairs: pairs of indices of streams.
        tokens: number of tokens in each stream.
        untrained: index of a stream → the activations of its model with random weights.
        seed: seed of the shuffled tokens.

    Raises:
        TooFewTokensError: too few tokens are left for a map.
        ValueError: streams differ in length.
    """
    pairs, untrained = list(pairs), dict(untrained or {})
    drawn = {place: len(streams) + i for i, place in enumerate(untrained)}
    nulls = {
        pair: [(pair[0], drawn[pair[1]]), (drawn[pair[0]], pair[1])]
        for pair in pairs
        if set(pair) <= drawn.keys()
    }
    wanted = [*pairs, *(own for both in nulls.values() for own in both)]
    sums: dict[tuple[int, int], _Fit] = {}
    random = torch.Generator().manual_seed(seed)
    limits: list[Tensor] = []
    start, fitted = 0, tokens - tokens // MEASURED
    every = [rebatch(chunks, _BLOCK) for chunks in (*streams, *untrained.values())]
    for xs in zip(*every, strict=True):
        if len({len(x) for x in xs}) > 1:
            counts = ", ".join(str(len(x)) for x in xs)
            raise ValueError(f"the streams must hold the same tokens; got batches of {counts}")
        norms = [torch.linalg.vector_norm(x.float(), dim=1) for x in xs]
        limits = limits or [MASSIVE * norm.median() for norm in norms]
        sums = sums or {pair: _Fit.empty(xs[pair[0]], pair in pairs) for pair in wanted}
        kept = [norm <= limit for norm, limit in zip(norms, limits, strict=True)]
        for (i, j), own in sums.items():
            own.add(xs[i], xs[j], kept[i] & kept[j], max(0, fitted - start), random)
        start += len(xs[0])
    return {
        pair: sums[pair].alignment(
            sum(sums[own].r2() for own in nulls[pair]) / 2 if pair in nulls else float("nan")
        )
        for pair in pairs
    }
