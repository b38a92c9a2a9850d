"""Agreement of latents by their activations on the same tokens, in one pass over tokens.

Cosines compare the weights of two latents; these measures compare their behaviour: Pearson's
correlation of their activations over held-out tokens (zeros included), and the Jaccard index of the
sets of tokens at which they fire (Paulo & Belrose, arXiv 2501.16615, and its replications). Five
sums per pair suffice; no F_A × F_B matrix is made. `agreement` measures latents that were matched
by their weights.

SAEs of activations of different width have no cosines between rows. But their latents' activations
on the same tokens are vectors in one space; their centred cosine is Pearson's correlation r.
`ActivationMatcher` matches such latents without comparing weights. The first tokens give the exact
matching that maximises Σr, the remaining tokens the reported numbers: a matching measured on the
tokens from which it was computed would look too good, because it picks the best of many pairs.

`CKA` compares representations without matched latents: CKA(X, Y) = HSIC(K, L) / √(HSIC(K,
K)·HSIC(L, L)) of the Gram matrices K = XXᵀ, L = YYᵀ over tokens (Kornblith et al. 2019). HSIC is
estimated on each batch of tokens by the unbiased estimator of Song et al. 2012 and averaged over
batches before the ratio is taken (Nguyen, Raghu & Kornblith 2021, arXiv 2010.15327). Unlike an
average of CKAs, the result depends on the batch size only through noise; unlike with the biased
estimator, it does not approach 1 as the width grows. It may be slightly below 0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.compare.activations.batch_codes import BatchCodes
from reseed.compare.matching import match
from reseed.compare.statistics import known_mean
from reseed.system.rounding import above_rounding

log = logging.getLogger(__name__)

MATCH_TOKENS = 4_096
"""Number of tokens from which the matching is computed, at most half of all tokens."""
MOST_BYTES = 1 << 31
"""Maximum size in bytes of one SAE's activations [F, tokens] in float32. Wider SAEs are matched on
fewer tokens."""


@dataclass(eq=False)
class FiringSums:
    """Sums over tokens for each latent x of one SAE: number of firings, Σx and Σx²."""

    count: Int[Tensor, " F"]
    total: Float[Tensor, " F"]
    squares: Float[Tensor, " F"]
    tokens: int = 0

    @classmethod
    def empty(cls, num_latents: int, device: torch.device) -> Self:
        """Return the sums before the first token."""
        zeros = torch.zeros(num_latents, dtype=torch.float64, device=device)
        return cls(zeros.long(), zeros, zeros.clone())

    def add(self, codes: BatchCodes) -> None:
        exact = codes.value.double()
        self.count += torch.bincount(codes.latent, minlength=codes.num_latents)
        self.total += codes.sum_by_latent(exact)
        self.squares += codes.sum_by_latent(exact.square())
        self.tokens += codes.tokens

    def spread(self) -> Float[Tensor, " num_latents"]:
        """Return n²·variance of each latent; 0 if its activations are equal up to rounding."""
        spread = self.tokens * self.squares - self.total.square()
        return torch.where(above_rounding(spread, self.tokens * self.squares), spread, 0.0)


@dataclass(eq=False)
class PairSums:
    """Sums over tokens for each latent x of A and its partner y in B: Σxy, and how often both fire.

    Attributes:
        partner: latent of B for each latent of A; −1 for none. Latents of B may repeat.
    """

    partner: Int[Tensor, " F_A"]
    both: Int[Tensor, " F_A"]
    products: Float[Tensor, " F_A"]

    @classmethod
    def empty(cls, partner: Int[Tensor, " F_A"]) -> Self:
        """Return the sums before the first token."""
        zeros = torch.zeros(len(partner), dtype=torch.float64, device=partner.device)
        return cls(partner, zeros.long(), zeros)

    def add(self, a: BatchCodes, b: BatchCodes) -> None:
        """Add a batch of tokens, encoded by A and by B."""
        partner = self.partner[a.latent]
        there = partner >= 0
        values = b.values_at(a.token[there], partner[there])
        latent = a.latent[there]
        products = a.value[there].double() * values
        self.products += torch.bincount(latent, products, minlength=a.num_latents)
        self.both += torch.bincount(latent[values != 0], minlength=a.num_latents)


class Agreement(NamedTuple):
    """A value per latent of A; NaN without a partner or where undefined.

    Attributes:
        pearson: correlation of its activations with its partner's; undefined if either is constant,
            for example never fires.
        jaccard: number of tokens at which both fire, divided by the number at which either fires.
    """

    pearson: Float[np.ndarray, " F_A"]
    jaccard: Float[np.ndarray, " F_A"]


def agreement(a: FiringSums, b: FiringSums, together: PairSums) -> Agreement:
    """Return the agreement of each latent of A with its partner in B."""
    matched = together.partner >= 0
    other = together.partner.clamp(min=0)
    covariance = a.tokens * together.products - a.total * b.total[other]
    spread_a, spread_b = (x.spread() for x in (a, b))
    scale = (spread_a * spread_b[other]).clamp(min=0).sqrt()
    either = a.count + b.count[other] - together.both
    return Agreement(
        _ratio(covariance, scale, matched).clip(-1, 1),
        _ratio(together.both, either, matched),
    )


def _ratio(part: Tensor, whole: Tensor, known: Tensor) -> Float[np.ndarray, " F_A"]:
    """Return part / whole; NaN where not ``known`` or the whole is 0."""
    value = part.double() / whole
    return torch.where(known & (whole > 0), value, torch.nan).cpu().numpy()


class MatchedAgreement(NamedTuple):
    """Agreement of the matched live latents of two SAEs, on tokens not used for the matching.

    Attributes:
        pearson, jaccard: mean correlation, and mean overlap of the tokens at which they fire.
        fraction: 2·n/(live A + live B), where n is the number of matches with r ≥ threshold.
    """

    pearson: float
    jaccard: float
    fraction: float


UNKNOWN = MatchedAgreement(float("nan"), float("nan"), float("nan"))


class ActivationMatcher:
    """Matchings by activations of every pair of n SAEs, and their agreement.

    Args:
        live: live latents of each SAE; other latents are not matched.
        tokens: total number of tokens.
        threshold: minimum r at which a match counts as agreement.
    """

    def __init__(
        self, live: Sequence[Bool[np.ndarray, " F"]], tokens: int, threshold: float
    ) -> None:
        widest = max(len(flags) for flags in live)
        self.first = max(1, min(MATCH_TOKENS, tokens // 2, MOST_BYTES // (4 * widest)))
        self.live, self.threshold, self.seen = live, threshold, 0
        self._held: list[list[BatchCodes]] = []
        self._firing: list[FiringSums] = []
        self._together: dict[tuple[int, int], PairSums | None] = {}

    def add(self, codes: Sequence[BatchCodes]) -> None:
        """Add a batch of tokens, encoded by each SAE."""
        if self.seen < self.first:
            self._held.append(list(codes))
            self.seen += codes[0].tokens
            if self.seen >= self.first:
                self._match()
            return
        for firing, own in zip(self._firing, codes, strict=True):
            firing.add(own)
        for (s, t), together in self._together.items():
            if together is not None:
                together.add(codes[s], codes[t])

    def finish(self) -> dict[tuple[int, int], MatchedAgreement]:
        """Return the agreement of every pair s < t; NaN if no tokens were left to measure it."""
        if not self._firing or not self._firing[0].tokens:
            return dict.fromkeys(combinations(range(len(self.live)), 2), UNKNOWN)
        return {pair: self._agreement(*pair) for pair in self._together}

    def _agreement(self, s: int, t: int) -> MatchedAgreement:
        together = self._together[s, t]
        if together is None:
            return UNKNOWN
        found = agreement(self._firing[s], self._firing[t], together)
        live = int(self.live[s].sum() + self.live[t].sum())
        near = int((found.pearson >= self.threshold).sum())
        return MatchedAgreement(
            known_mean(found.pearson), known_mean(found.jaccard), 2 * near / max(live, 1)
        )

    def _match(self) -> None:
        device = self._held[0][0].value.device
        n = len(self.live)
        self._firing = [FiringSums.empty(len(flags), device) for flags in self.live]
        for s, t in combinations(range(n), 2):
            try:
                partner = torch.from_numpy(self._partners(s, t)).to(device)
                self._together[s, t] = PairSums.empty(partner)
            except MemoryError as error:
                log.warning("skipped matching latents by their activations: %s", error)
                self._together[s, t] = None
        self._held = []

    def _partners(self, s: int, t: int) -> Int[np.ndarray, " F_s"]:
        """Return each latent's partner in t; −1 if it is unmatched, constant, or not live."""
        (rows_a, kept_a), (rows_b, kept_b) = (self._rows(x) for x in (s, t))
        partner = np.full(len(self.live[s]), -1)
        if len(kept_a) and len(kept_b):
            found = match(rows_a, rows_b).assignment
            partner[kept_a] = np.where(found >= 0, kept_b[found], -1)
        return partner

    def _rows(self, s: int) -> tuple[Float[np.ndarray, "kept tokens"], Int[np.ndarray, " kept"]]:
        """Return the centred activations of live latents that vary, and the latents' indices."""
        rows = np.zeros((len(self.live[s]), self.seen), dtype=np.float32)
        start = 0
        for codes in self._held:
            token, latent, value = (
                x.cpu().numpy() for x in (codes[s].token, codes[s].latent, codes[s].value)
            )
            rows[latent, start + token] = value
            start += codes[s].tokens
        squares = np.einsum("ij,ij->i", rows, rows)
        rows -= rows.mean(axis=1, keepdims=True)
        varies = above_rounding(np.einsum("ij,ij->i", rows, rows), squares)
        kept = np.flatnonzero(self.live[s] & varies)
        return rows[kept], kept


MIN_TOKENS = 4
"""Minimum number of tokens in a batch: the estimator combines four tokens at a time."""


def centred_gram(x: Float[Tensor, "B D"]) -> Float[Tensor, "B B"]:
    """Return the scalar products of centred rows, in float64.

    HSIC does not depend on the centre; centring reduces rounding errors. Rows that are equal up to
    rounding count as equal.
    """
    exact = x.double()
    square = exact.square().sum()
    exact = exact - exact.mean(0)
    if not above_rounding(exact.square().sum(), square):
        exact = torch.zeros_like(exact)
    return exact @ exact.T


def hsic(grams: Sequence[Float[Tensor, "B B"]]) -> Float[Tensor, "n n"]:
    """Return the unbiased HSIC of every pair of n Gram matrices over the same B ≥ 4 tokens.

    For K and L with zeroed diagonals: [tr(KL) + 1ᵀK1·1ᵀL1 / ((B−1)(B−2)) − 2·1ᵀKL1 / (B−2)]
    / (B(B−3)) (Song et al. 2012, eq. 5).
    """
    hollow = torch.stack([gram.double() for gram in grams])
    size = hollow.shape[1]
    if size < MIN_TOKENS:
        raise ValueError(f"HSIC needs at least {MIN_TOKENS} tokens in a batch; got {size}")
    hollow.diagonal(dim1=1, dim2=2).zero_()
    flat, rows = hollow.flatten(1), hollow.sum(2)
    total = rows.sum(1)
    found = flat @ flat.T
    found += torch.outer(total, total) / ((size - 1) * (size - 2))
    found -= rows @ rows.T * (2 / (size - 2))
    return found / (size * (size - 3))


class CKA:
    """Linear CKA of every pair of n representations, accumulated over batches.

    Batches are weighted by their number of tokens, so that a smaller last batch counts less.
    """

    def __init__(self, n: int) -> None:
        self._sums = np.zeros((n, n))

    def add(self, grams: Sequence[Float[Tensor, "B B"]]) -> None:
        """Add a batch, given its Gram matrix in each representation; ignore one below 4 tokens."""
        if len(grams[0]) >= MIN_TOKENS:
            self._sums += len(grams[0]) * hsic(grams).cpu().numpy()

    def values(self) -> Float[np.ndarray, "n n"]:
        """Return the CKA of every pair; NaN for a representation without variance."""
        own = self._sums.diagonal()
        scale = np.sqrt(np.where(own > 0, own, np.nan))
        return self._sums / np.outer(scale, scale)
