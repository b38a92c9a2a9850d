"""Passes over all pairs of latents that need no assignment: of two dictionaries, and of one.

`scan_pairs` compares the latents of two dictionaries:

- *coverage*: some latent of the other side, matched elsewhere or not, has both cosines ≥ τ. The
  number of such latents is ``within``; two or more mean that the latent was split.
- MMCS, mean max cosine similarity (Sharkey et al. 2022; Huben et al., arXiv 2309.08600): the mean
  over latents of max_j cos of decoder rows.
- *mutual nearest neighbours*: i and j are each other's nearest, with a cosine ≥ τ.

`find_duplicates` finds the repeated latents of one dictionary. s_i = max_{j≠i} cos(E_i, E_j)·
cos(W_i, W_j) is near 1 for duplicates and for antipodal pairs, and the signs distinguish them. Both
cosines positive: two latents for the same feature. Both negative: two latents for the two ends of
one direction. Repeated latents make matching ambiguous, because equal latents are interchangeable.

Products of blocks of latents are computed in float32 and discarded; a matrix of all pairs is never
held. Cosines too close to τ for float32 are computed again in float64, so thresholds are decided
exactly as in float64. If float32 cannot separate two neighbours, either may be the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.compare.dictionary import Rows, both_cosines, row_cosines, unit32

BLOCK_ENTRIES = 1 << 22
"""Number of pairs of latents in a block: three float32 matrices of 17 MB."""
_MOST_COLUMNS = 2048


class Nearest(NamedTuple):
    """Nearest latents of the other side.

    Attributes:
        a, b: the largest cosine of each latent of A, and of B (float32 products).
        of_a: index of the nearest latent of each latent of A.
    """

    a: Float[np.ndarray, " n"]
    b: Float[np.ndarray, " m"]
    of_a: Int[np.ndarray, " n"]

    def mutual(self) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
        """Return the pairs (i, j) that are each other's nearest; equal rows give only one pair."""
        i = np.flatnonzero(self.a == self.b[self.of_a])
        j, first = np.unique(self.of_a[i], return_index=True)
        return i[first], j


@dataclass(frozen=True, eq=False)
class PairScan:
    """Result of the pass over all pairs.

    Attributes:
        within_a, within_b: number of latents of the other side with both cosines ≥ τ.
        live_within_a, live_within_b: number of live latents among them.
        by_decoder, by_both: nearest by c_dec, and by min(c_enc, c_dec).
        mutual_decoder, mutual_both: mutual nearest neighbours with that cosine ≥ τ, as (i, j).
    """

    within_a: Int[np.ndarray, " n"]
    within_b: Int[np.ndarray, " m"]
    live_within_a: Int[np.ndarray, " n"]
    live_within_b: Int[np.ndarray, " m"]
    by_decoder: Nearest
    by_both: Nearest
    mutual_decoder: tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]
    mutual_both: tuple[Int[np.ndarray, " q"], Int[np.ndarray, " q"]]


def scan_pairs(
    a: Rows,
    b: Rows,
    threshold: float,
    live_a: Bool[np.ndarray, " n"],
    live_b: Bool[np.ndarray, " m"],
    device: str = "cpu",
) -> PairScan:
    """Run one pass over all pairs of latents.

    Memory: the rows of both sides in float32 on ``device``, and `BLOCK_ENTRIES` pairs.
    """
    n, m = len(a), len(b)
    tied = a.tied and b.tied
    (encoder_a, decoder_a), (encoder_b, decoder_b) = (unit_pair(x, device) for x in (a, b))
    within_a, within_b, live_within_a, live_within_b = (
        np.zeros(size, dtype=np.int64) for size in (n, m, n, m)
    )
    by_decoder, by_both = RunningMax(n, m, device), RunningMax(n, m, device)
    margin = float32_error(a.d_in)
    for rows, columns in tiles(n, m):
        c_dec = decoder_a[rows] @ decoder_b[columns].T
        both = c_dec if tied else torch.minimum(c_dec, encoder_a[rows] @ encoder_b[columns].T)
        by_decoder.update(c_dec, rows, columns)
        by_both.update(both, rows, columns)
        i, j = _entries(both >= threshold - margin)
        close = both[i, j].cpu().numpy()
        i, j = i + rows.start, j + columns.start
        kept = close >= threshold + margin
        unsure = ~kept
        kept[unsure] = both_cosines(a, b, i[unsure], j[unsure]) >= threshold
        i, j = i[kept], j[kept]
        np.add.at(within_a, i, 1)
        np.add.at(within_b, j, 1)
        np.add.at(live_within_a, i, live_b[j])
        np.add.at(live_within_b, j, live_a[i])
    nearest_decoder, nearest_both = by_decoder.nearest(), by_both.nearest()
    i, j = nearest_decoder.mutual()
    kept = row_cosines(a.decoder, b.decoder, i, j) >= threshold
    mutual_decoder = i[kept], j[kept]
    i, j = nearest_both.mutual()
    kept = both_cosines(a, b, i, j) >= threshold
    return PairScan(
        within_a,
        within_b,
        live_within_a,
        live_within_b,
        nearest_decoder,
        nearest_both,
        mutual_decoder,
        (i[kept], j[kept]),
    )


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Repetition of each latent of one dictionary.

    Attributes:
        duplicate_product, antipodal_product: the largest product of both cosines with another
            latent, over latents where both are positive, and where both are negative; 0 if there
            is none.
        duplicate, antipodal: that product is ≥ τ².
    """

    duplicate_product: Float[np.ndarray, " num_latents"]
    antipodal_product: Float[np.ndarray, " num_latents"]
    duplicate: Bool[np.ndarray, " num_latents"]
    antipodal: Bool[np.ndarray, " num_latents"]


def find_duplicates(x: Rows, threshold: float, device: str = "cpu") -> Duplicates:
    """Find the most similar other latent of every latent of one dictionary, in blocks.

    The search is in float32; the products with the latents found are in float64.
    """
    n = len(x)
    encoder, decoder = unit_pair(x, device)
    positive, negative = RunningMax(n, n, device), RunningMax(n, n, device)
    for rows, columns in tiles(n, n):
        c_enc = encoder[rows] @ encoder[columns].T
        product = c_enc * (c_enc if x.tied else decoder[rows] @ decoder[columns].T)
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        own = torch.arange(first, max(first, last))  # the diagonal: a latent with itself
        product[own - rows.start, own - columns.start] = 0
        positive.update(product.where(c_enc > 0, 0), rows, columns)
        negative.update(product.where(c_enc < 0, 0), rows, columns)
    duplicate, antipodal = (_exact(x, running) for running in (positive, negative))
    least = threshold**2
    return Duplicates(duplicate, antipodal, duplicate >= least, antipodal >= least)


def _exact(x: Rows, running: RunningMax) -> Float[np.ndarray, " num_latents"]:
    found = running.nearest()
    out = np.zeros(len(x))
    i = np.flatnonzero(found.a > 0)
    j = found.of_a[i]
    out[i] = row_cosines(x.encoder, x.encoder, i, j) * row_cosines(x.decoder, x.decoder, i, j)
    return np.maximum(out, 0.0)


class RunningMax:
    """Running maxima of the rows and columns of a matrix that arrives tile by tile."""

    def __init__(self, n: int, m: int, device: str) -> None:
        self.a = torch.full((n,), -torch.inf, device=device)
        self.b = torch.full((m,), -torch.inf, device=device)
        self.of_a = torch.zeros(n, dtype=torch.int64, device=device)

    def update(self, tile: Float[Tensor, "rows columns"], rows: slice, columns: slice) -> None:
        value, index = tile.max(dim=1)
        better = value > self.a[rows]  # of equal entries the first stays
        self.a[rows] = torch.where(better, value, self.a[rows])
        self.of_a[rows] = torch.where(better, index + columns.start, self.of_a[rows])
        self.b[columns] = torch.maximum(self.b[columns], tile.amax(dim=0))

    def nearest(self) -> Nearest:
        return Nearest(*(x.cpu().numpy() for x in (self.a, self.b, self.of_a)))


class RunningMaxBothWays(RunningMax):
    """`RunningMax` that also tracks the row of each column's largest entry (``of_b``)."""

    def __init__(self, n: int, m: int, device: str) -> None:
        super().__init__(n, m, device)
        self.of_b = torch.zeros(m, dtype=torch.int64, device=device)

    def update(self, tile: Float[Tensor, "rows columns"], rows: slice, columns: slice) -> None:
        before = self.b[columns].clone()
        super().update(tile, rows, columns)
        # Only columns whose maximum grew need an argmax; their number falls from tile to tile.
        gained = (self.b[columns] > before).nonzero().squeeze(1)
        there = tile[:, gained] == self.b[columns][gained]
        self.of_b[columns.start + gained] = rows.start + there.to(torch.uint8).argmax(dim=0)


def tiles(n: int, m: int) -> list[tuple[slice, slice]]:
    """Return blocks of rows and columns that together cover all pairs."""
    columns = min(m, _MOST_COLUMNS, BLOCK_ENTRIES)
    rows = max(1, BLOCK_ENTRIES // columns)
    return [
        (slice(r, min(r + rows, n)), slice(c, min(c + columns, m)))
        for r in range(0, n, rows)
        for c in range(0, m, columns)
    ]


def float32_error(d_in: int) -> float:
    """Return the maximum error of a cosine of float32 rows; rounding grows as √d_in."""
    return 1e-6 + 4 * float(np.finfo(np.float32).eps) * d_in**0.5


def unit_pair(x: Rows, device: str) -> tuple[Tensor, Tensor]:
    """Return unit encoder and decoder rows in float32 on the device; one tensor if tied."""
    encoder = torch.from_numpy(unit32(x.encoder)).to(device)
    return (encoder, encoder if x.tied else torch.from_numpy(unit32(x.decoder)).to(device))


def _entries(flags: Bool[Tensor, "rows columns"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the true entries; numpy is faster than torch if few are true."""
    if flags.device.type != "cpu":
        i, j = flags.nonzero(as_tuple=True)
        return i.cpu().numpy(), j.cpu().numpy()
    i, j = np.divmod(np.flatnonzero(flags.numpy()), flags.shape[1])
    return i, j
