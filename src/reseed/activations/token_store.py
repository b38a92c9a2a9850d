"""Tokens of documents: packing into sequences, and the windows that two texts share.

`TokenStore` holds the tokens of documents end to end, with the documents' boundaries. The order of
an epoch is a permutation of the documents: sequence s of epoch e is positions [s·L, (s+1)·L) of the
documents, end to end in that order. With ``dataset.subset_seed``, it is a permutation of sequences
that are chosen first (`Packing`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from reseed.activations.text import TextConfig
from reseed.system.console import throttled_say
from reseed.system.integrity import DamagedFileError, read_record, write_record

WINDOW = 13
"""Number of tokens in a row by which a held-out document overlaps with the training text, as in the
analysis of GPT-3's test sets (Brown et al. 2020)."""
SAMPLE = 2**20
"""Largest number of held-out windows that are looked for to estimate the shared fraction."""
_VERSION = 1
"""Increase it if a change of the code changes the counts of windows."""
_BLOCK = 2**16
"""Number of windows hashed at once."""
_MOST = 2**24
"""Number of held-out windows that are looked for at once, in one pass of the training text. They
take less than 1 GiB of memory."""
_SPARSE = 16
"""Entries of a first, coarse table for each hash: it excludes 15 of 16 other windows."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SEQUENCES = 1
"""Third number of the seed of an order of sequences; an order of documents has two."""


@dataclass(frozen=True, eq=False)  # comparison by identity keeps a store hashable
class TokenStore:
    """The tokens of documents, end to end.

    Attributes:
        tokens: int32 [total].
        starts: int64 [documents + 1], the start of each document, then the end of the last.
        special: sorted ids of the special tokens.
        natural_order: True if epoch 0 reads the documents in stored order (already shuffled).
        left_out: number of held-out documents left out by ``dataset.held_out_dedup``, if it is set.
    """

    tokens: Int[np.ndarray, " total"]
    starts: Int[np.ndarray, " documents_plus_one"]
    special: tuple[int, ...]
    natural_order: bool = False
    left_out: int | None = None

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    def __len__(self) -> int:
        return int(self.starts[-1])


@dataclass(frozen=True)
class Packing:
    """One order of the documents of a store, cut into sequences of equal length.

    With ``config.subset_seed``, the documents are in the order of this seed, the same in every
    epoch, and the sequences of the first ``needed`` activations are chosen; the last of them may
    count only in part. ``config.order_seed`` then permutes the whole ones, and the last stays last.
    So the chosen activations, and the context of each, depend only on ``subset_seed`` and
    ``needed``. They are the first ones of the order that ``order_seed`` has at the same value
    without ``subset_seed``.

    Args:
        store: the tokens.
        config: context length, excluded positions, seed of the order.
        epoch: number of earlier passes over the text; each epoch has its own order.
        needed: number of activations to choose with ``config.subset_seed``; None: all.
    """

    store: TokenStore
    config: TextConfig
    epoch: int = 0
    needed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_chosen", None)
        order = self._order()
        lengths = np.diff(self.store.starts)[order]
        object.__setattr__(self, "_documents", order)
        object.__setattr__(self, "_ends", np.cumsum(lengths))
        kept = np.empty(self.num_sequences + 1, dtype=np.int64)
        kept[0] = 0
        step = max(1, 500_000 // self.config.context_length)
        for first in range(0, self.num_sequences, step):
            last = min(first + step, self.num_sequences)
            kept[first + 1 : last + 1] = self.keep(self.sequences(first, last)).sum(1)
        if self.config.subset_seed is not None:
            kept = self._choose(kept)
        object.__setattr__(self, "_kept", np.cumsum(kept))

    def _choose(self, kept: Int[np.ndarray, " sequences_plus_one"]) -> Int[np.ndarray, " chosen"]:
        """Choose and permute the sequences; return the activations of each, after a 0."""
        ends = np.cumsum(kept)
        needed = int(ends[-1]) if self.needed is None else min(self.needed, int(ends[-1]))
        whole = int(np.searchsorted(ends, needed, side="right")) - 1
        rest = needed - int(ends[whole])
        seed = np.random.SeedSequence([self.config.order_seed, self.epoch, _SEQUENCES])
        order = np.random.Generator(np.random.PCG64(seed)).permutation(whole)
        chosen = np.append(order, whole) if rest else order
        object.__setattr__(self, "_chosen", chosen)
        return np.concatenate([[0], kept[1:][order], [rest] if rest else []]).astype(np.int64)

    @property
    def num_sequences(self) -> int:
        """Number of whole sequences; leftover tokens at the end are not used."""
        chosen = self._chosen  # type: ignore[attr-defined]
        return len(self.store) // self.config.context_length if chosen is None else len(chosen)

    @property
    def num_activations(self) -> int:
        """Number of positions that count as activations (`keep`)."""
        return int(self._kept[-1])  # type: ignore[attr-defined]

    def sequences(self, first: int, last: int) -> Int[np.ndarray, "sequences context"]:
        """Return the tokens of sequences ``first`` to ``last`` (exclusive)."""
        length = self.config.context_length
        chosen = self._chosen  # type: ignore[attr-defined]
        numbers = np.arange(first, last) if chosen is None else chosen[first:last]
        positions = (numbers[:, None] * length + np.arange(length)).reshape(-1)
        ends = self._ends  # type: ignore[attr-defined]
        rank = np.searchsorted(ends, positions, side="right")
        order = self._documents  # type: ignore[attr-defined]
        begins = self.store.starts[:-1][order[rank]]
        lengths = self.store.starts[1:][order[rank]] - begins
        inside = positions - (ends[rank] - lengths)
        return self.store.tokens[begins + inside].reshape(last - first, length)

    def keep(self, tokens: Int[np.ndarray, "sequences context"]) -> Bool[np.ndarray, "s c"]:
        """Return a mask of the positions that count as activations.

        By default these are neither first in their sequence nor special tokens.
        """
        kept = np.ones(tokens.shape, dtype=bool)
        if self.config.exclude_first_position:
            kept[:, 0] = False
        if self.config.exclude_special_tokens:
            kept &= ~np.isin(tokens, self.store.special)
        return kept

    @property
    def guaranteed_activations(self) -> int:
        """Lower bound of the number of activations of an epoch, valid for every order."""
        if not self.config.exclude_special_tokens or self.config.subset_seed is not None:
            return self.num_activations
        special = int(np.isin(self.store.tokens, self.store.special).sum())
        left_over = len(self.store) % self.config.context_length
        lost = self.num_sequences * self.config.exclude_first_position
        return max(0, len(self.store) - left_over - special - lost)

    def covering(self, first: int, last: int) -> tuple[int, int, int]:
        """Find the sequences that hold activations ``first`` to ``last`` (exclusive), in order.

        Returns:
            the first and the last (exclusive) sequence, and the number of activations of the
            first sequence that come before ``first``.
        """
        kept = self._kept  # type: ignore[attr-defined]
        begin = int(np.searchsorted(kept, first, side="right")) - 1
        end = int(np.searchsorted(kept, last, side="left"))
        return begin, end, first - int(kept[begin])

    def _order(self) -> Int[np.ndarray, " documents"]:
        epoch = self.epoch if self.config.subset_seed is None else 0
        if self.store.natural_order and epoch == 0:
            return np.arange(self.store.num_documents)
        seed = np.random.SeedSequence([self.config.packing_seed, epoch])
        return np.random.Generator(np.random.PCG64(seed)).permutation(self.store.num_documents)


@dataclass(frozen=True)
class Overlap:
    """The held-out windows that are training windows, too.

    Attributes:
        windows: number of windows of `WINDOW` tokens within a held-out document.
        shared: number of those that are in a training document.
        documents: mask of the held-out documents that have a shared window.
    """

    windows: int
    shared: int
    documents: Bool[np.ndarray, " documents"]


def overlap(train: TokenStore, held_out: TokenStore) -> Overlap:
    """Find the windows of the held-out documents that are windows of a training document.

    Windows are compared by hashes of 64 bits: with 10 million held-out and a billion training
    windows, the probability of one false match is below one in a thousand.
    """
    total, number = 0, 0
    documents = np.zeros(held_out.num_documents, dtype=bool)
    for first, last in _pieces(held_out, _MOST):
        hashes, places = _windows(held_out, first, last)
        found = _are_in(hashes, train)
        total, number = total + len(found), number + int(found.sum())
        at = np.searchsorted(held_out.starts, places[found], side="right") - 1
        documents[at] = True
    return Overlap(total, number, documents)


def overlap_counts(train: TokenStore, held_out: TokenStore, cache: Path) -> dict[str, int | float]:
    """Return how many held-out windows are training windows, counted once and then cached.

    Returns:
        the number of held-out windows, and the fraction of them that are in a training document,
        estimated from a sample of at most `SAMPLE` windows if there are more.
    """
    stores = [train, held_out]
    names = [Path(s.tokens.filename).parent.name if len(s) else "none" for s in stores]  # type: ignore[attr-defined]
    version = f"{_VERSION}-{WINDOW}-{SAMPLE}"
    path = cache / "tokens" / names[1] / f"overlap-{version}-{names[0]}.json"
    try:
        counts = read_record(path)
    except (FileNotFoundError, DamagedFileError):
        windows, sampled, shared = overlap_of_sample(train, held_out)
        counts = {"windows": windows, "sampled": sampled, "shared": shared}
        with suppress(OSError):  # a cache that only others may write
            write_record(path, counts)
    share = counts["shared"] / max(1, counts["sampled"])
    return {"held_out_windows": counts["windows"], "held_out_windows_in_training": share}


def overlap_of_sample(train: TokenStore, held_out: TokenStore) -> tuple[int, int, int]:
    """Count the windows of the held-out documents, those of a sample, and those of the sample that
    are windows of a training document.

    The sample is the `SAMPLE` windows with the smallest hashes, or all if they are fewer: it is
    the same whatever the order of the documents and whatever the training text.
    """
    total, smallest, limit = 0, np.zeros(0, np.uint64), np.uint64(2**64 - 1)
    for first, last in _pieces(held_out, _BLOCK):
        hashes, _ = _windows(held_out, first, last)
        total += len(hashes)
        smallest = np.concatenate([smallest, hashes[hashes <= limit]])
        if len(smallest) > 2 * SAMPLE:
            smallest = np.partition(smallest, SAMPLE - 1)[:SAMPLE]
            limit = smallest.max()
    smallest = np.sort(smallest)[:SAMPLE]
    return total, len(smallest), int(_are_in(smallest, train).sum())


def _are_in(hashes: Int[np.ndarray, " windows"], train: TokenStore) -> Bool[np.ndarray, " windows"]:
    """Return the mask of the hashes that are hashes of windows of ``train``."""
    distinct, inverse = np.unique(hashes, return_inverse=True)
    seen = np.zeros(len(distinct), dtype=bool)
    if not len(distinct):
        return seen
    bits = (_SPARSE * len(distinct) - 1).bit_length()
    shift = np.uint64(64 - bits)
    coarse = np.zeros(2**bits, dtype=bool)
    coarse[distinct >> shift] = True
    told = throttled_say()
    for first, last in _pieces(train, _BLOCK):
        told(f"looking for held-out text in the training text: {first / len(train):.0%}")
        own, _ = _windows(train, first, last)
        own = own[coarse[own >> shift]]
        at = np.minimum(np.searchsorted(distinct, own), len(distinct) - 1)
        seen[at[distinct[at] == own]] = True
    return seen[inverse]


def _pieces(store: TokenStore, size: int) -> list[tuple[int, int]]:
    """Divide the first tokens of the windows of a store into ranges."""
    return [(first, min(first + size, len(store))) for first in range(0, len(store), size)]


def _windows(
    store: TokenStore, first: int, last: int
) -> tuple[Int[np.ndarray, " windows"], Int[np.ndarray, " windows"]]:
    """Return the hashes of the windows that begin at tokens ``first`` to ``last`` (exclusive), and
    where they begin; windows across the end of a document are left out."""
    end = min(last + WINDOW - 1, len(store))
    count = end - WINDOW + 1 - first
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    # Hashes of 2, 4 and 8 tokens are combined to one of 13 = 8 + 4 + 1 (arithmetic modulo 2^64).
    one = mix_bits(np.asarray(store.tokens[first:end]).astype(np.uint64))
    two = one[:-1] * _FACTOR + one[1:]
    four = two[:-2] * _power(2) + two[2:]
    eight = four[:-4] * _power(4) + four[4:]
    hashes = eight[:count] * _power(5) + four[8 : 8 + count] * _FACTOR + one[12 : 12 + count]
    whole = np.ones(count, dtype=bool)
    begin, stop = np.searchsorted(store.starts, [first + 1, end])
    for back in range(1, WINDOW):
        crossing = store.starts[begin:stop] - back - first
        whole[crossing[(crossing >= 0) & (crossing < count)]] = False
    return mix_bits(hashes[whole]), first + np.flatnonzero(whole)


def _power(n: int) -> np.uint64:
    return np.uint64(pow(int(_FACTOR), n, 2**64))


def mix_bits(x: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Mix the bits of 64-bit integers, one to one (the finaliser of SplitMix64,
    Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
