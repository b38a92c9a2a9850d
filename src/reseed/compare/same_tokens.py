"""Matching of latents by their activations on the same tokens, without comparing weights.

SAEs of activations of different width have no cosines between rows. But their latents' activations
on the same tokens are vectors in one space; their centred cosine is Pearson's correlation r. The
first tokens give the exact matching that maximises Σr, the remaining tokens the reported numbers.
Measured on the tokens that it was made from, a matching would look too good, as it picks the best
of many.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from reseed.compare.agreement import Firing, Together, agreement
from reseed.compare.codes import Codes
from reseed.compare.matching import match
from reseed.compare.statistics import known_mean

log = logging.getLogger(__name__)

MATCH_TOKENS = 4_096
"""Number of tokens that give the matching; half of the tokens if there are fewer than twice it."""
MOST_BYTES = 1 << 31
"""Limit on one SAE's activations [F, tokens] in float32; wider SAEs are matched on fewer tokens."""


class Matched(NamedTuple):
    """Agreement of a pair's matched live latents, on tokens that the matching has not seen.

    Attributes:
        pearson, jaccard: mean correlation, and mean overlap of the tokens at which they fire.
        fraction: 2·#/(live A + live B), with # the matches whose r reaches the threshold.
    """

    pearson: float
    jaccard: float
    fraction: float


UNKNOWN = Matched(float("nan"), float("nan"), float("nan"))


class ByActivations:
    """Matchings by activations of every pair of n SAEs, and their agreement.

    Args:
        live: live latents of each SAE; other latents are not matched.
        tokens: total number of tokens.
        threshold: value of r from which a match counts as agreement.
    """

    def __init__(
        self, live: Sequence[Bool[np.ndarray, " F"]], tokens: int, threshold: float
    ) -> None:
        widest = max(len(flags) for flags in live)
        self.first = max(1, min(MATCH_TOKENS, tokens // 2, MOST_BYTES // (4 * widest)))
        self.live, self.threshold, self.seen = live, threshold, 0
        self._held: list[list[Codes]] = []
        self._firing: list[Firing] = []
        self._together: dict[tuple[int, int], Together | None] = {}

    def add(self, codes: Sequence[Codes]) -> None:
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

    def measured(self) -> dict[tuple[int, int], Matched]:
        """Return the agreement of every pair s < t; NaN if no tokens were left to measure it."""
        if not self._firing or not self._firing[0].tokens:
            return dict.fromkeys(combinations(range(len(self.live)), 2), UNKNOWN)
        return {pair: self._of(*pair) for pair in self._together}

    def _of(self, s: int, t: int) -> Matched:
        together = self._together[s, t]
        if together is None:
            return UNKNOWN
        found = agreement(self._firing[s], self._firing[t], together)
        live = int(self.live[s].sum() + self.live[t].sum())
        near = int((found.pearson >= self.threshold).sum())
        return Matched(
            known_mean(found.pearson), known_mean(found.jaccard), 2 * near / max(live, 1)
        )

    def _match(self) -> None:
        device = self._held[0][0].value.device
        n = len(self.live)
        self._firing = [Firing.of(len(flags), device) for flags in self.live]
        for s, t in combinations(range(n), 2):
            try:
                partner = torch.from_numpy(self._partners(s, t)).to(device)
                self._together[s, t] = Together.of(partner)
            except MemoryError as error:
                log.warning("skipped matching latents by their activations: %s", error)
                self._together[s, t] = None
        self._held = []

    def _partners(self, s: int, t: int) -> Int[np.ndarray, " F_s"]:
        """Return σ(i) of each latent of s; −1 if it is not live, constant, or unmatched."""
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
        kept = np.flatnonzero(self.live[s] & (rows != rows[:, :1]).any(axis=1))
        rows = rows[kept]
        rows -= rows.mean(axis=1, keepdims=True)
        return rows, kept
