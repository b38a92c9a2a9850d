"""A pair of dictionaries, a run among the others of its cell, and a cell, as measures see them.

`Pair` matches two dictionaries; what its measures share is computed when it is first used. Source:
Paulo & Belrose (arXiv 2501.16615), extended by dead latents, one-sided coverage and both sides.

Letters: A and B are two dictionaries, c_enc and c_dec cosines of their encoder and decoder rows,
σ_enc and σ_dec the exact matchings under each, τ the threshold, Σ the activations' covariance.

Dictionaries without a common space (`incompatible`) have no cosines: their columns are NaN, and no
latent has a partner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from reseed.compare.alignment import Alignment
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary, Rows, any_incompatible, root
from reseed.compare.matching import Matcher, Matching, match
from reseed.compare.nearest import Duplicates, PairScan, find_duplicates, scan_pairs
from reseed.compare.registry import View, declared, evaluate, find

WEIGHTS_NOTE = "weights_note"
"""Column of the pairs of a cell with such pairs: `no_common_space`; empty for the other pairs."""


@dataclass(frozen=True, eq=False)
class PairSide:
    """One side of a pair, with a value per latent.

    Attributes:
        dictionary: the run.
        partner_encoder, partner_decoder: σ_enc and σ_dec; −1 where a latent is unmatched.
        cosine_encoder, cosine_decoder: cosines to these partners; 0 where unmatched.
        agrees: true if there is a partner and σ_enc(i) = σ_dec(i).
        shared: true if `agrees` and both cosines ≥ τ (the paper's strict rule).
        within: number of latents of the other side, matched or not, with both cosines ≥ τ.
        live_within: the number of live latents among them.
        live: true if the latent fires often enough in the held-out tokens.
    """

    dictionary: Dictionary
    partner_encoder: Int[np.ndarray, " num_latents"]
    partner_decoder: Int[np.ndarray, " num_latents"]
    cosine_encoder: Float[np.ndarray, " num_latents"]
    cosine_decoder: Float[np.ndarray, " num_latents"]
    agrees: Bool[np.ndarray, " num_latents"]
    shared: Bool[np.ndarray, " num_latents"]
    within: Int[np.ndarray, " num_latents"]
    live_within: Int[np.ndarray, " num_latents"]
    live: Bool[np.ndarray, " num_latents"]

    @property
    def covered(self) -> Bool[np.ndarray, " num_latents"]:
        """Latents for which some latent of the other side has both cosines ≥ τ."""
        return self.within > 0


class Subset(NamedTuple):
    """Masks of the latents of A and of B that are counted.

    Fractions are over both sides together, 2·#/(|A| + |B|), so that (A, B) and (B, A) give the
    same; for equally many latents that is the paper's #/F.
    """

    a: Bool[np.ndarray, " n"]
    b: Bool[np.ndarray, " m"]

    @property
    def size(self) -> int:
        return int(self.a.sum() + self.b.sum())

    def _counts(self, partner: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return (partner >= 0) & self.a & self.b[partner]

    def fraction(self, holds: Bool[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """Return 2·#/(|A| + |B|), # = number of counted matched pairs with ``holds`` true."""
        return divided(2 * int((holds & self._counts(partner)).sum()), self.size)

    def mean(self, cosines: Float[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """Return the mean cosine of the matched pairs with both partners counted."""
        return mean(cosines[self._counts(partner)])

    def of_pairs(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> float:
        """Return 2·#/(|A| + |B|), # = number of given pairs (i, j) with both latents counted."""
        return divided(2 * int((self.a[i] & self.b[j]).sum()), self.size)

    def of_sides(self, a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " m"]) -> float:
        """Return the fraction of the counted latents of both sides whose flag is set."""
        return divided(int(a[self.a].sum() + b[self.b].sum()), self.size)

    @property
    def ceiling(self) -> float:
        """Largest fraction that the sizes allow: 2·min/(|A| + |B|)."""
        return divided(2 * min(int(self.a.sum()), int(self.b.sum())), self.size)


def mean(values: np.ndarray) -> float:
    """Return the mean; NaN if there are no values."""
    return float(values.mean()) if values.size else float("nan")


def divided(part: float, whole: float) -> float:
    """Return the ratio; NaN if the second number is 0."""
    return part / whole if whole else float("nan")


def _known_of(runs: Sequence[Dictionary]) -> frozenset[str]:
    """Return the names of what all of some runs have; "weights" are rows of one space."""
    optional = ("covariance", "variance", "truth")
    found = [name for name in optional if all(getattr(x, name) is not None for x in runs)]
    return frozenset([*found, *([] if any_incompatible(runs) else ["weights"])])


@dataclass(frozen=True, eq=False)
class Pair(View):
    """Two dictionaries A and B, and what their measures share.

    A latent whose encoder or decoder row is zero or not finite is left out of all matchings, and so
    never agrees. All others are matched; counts over live latents need both partners to be live. If
    a dictionary repeats a row exactly, the matching is one of several equally good ones.

    Attributes:
        first, second: A and B.
        threshold, live_at_least, null_seed, null_draws: see `ComparisonConfig`.
        matcher: computes every assignment, from the rows as trained, and for the joint assignment
            from unit rows in float32.
        device: device of the pass over all pairs of latents.
        start: the same runs with their initial weights; None if these are not known.
        alignment: map of A's rows into the basis of B; None if both have one basis.
        cell, place: the cell of the pair, or None, and the indices of the runs in it.
    """

    first: Dictionary
    second: Dictionary
    threshold: float = 0.7
    live_at_least: int = 10
    null_seed: int = 0
    null_draws: int = 3
    matcher: Matcher = match
    device: str = "cpu"
    start: Pair | None = None
    alignment: Alignment | None = None
    cell: CellRuns | None = None
    place: tuple[int, int] = (0, 1)

    @cached_property
    def known(self) -> frozenset[str]:
        more = {"untrained": self.start, "cell": self.cell, "map": self.alignment}
        given = {name for name, value in more.items() if value is not None}
        return _known_of([self.first, self.second]) | given

    def row(self) -> dict[str, Any]:
        """Return the row of ``pairs.csv``, without columns that need all pairs of a cell."""
        a, b = self.first, self.second
        return {"a": a.id, "b": b.id, "seed_a": a.seed, "seed_b": b.seed, **self.measures}

    @cached_property
    def measures(self) -> dict[str, Any]:
        """The measures of the pair by name, without those that need all pairs of a cell."""
        return evaluate(declared("pair", ""), self)

    def value(self, name: str) -> float:
        """Return one measure of the pair.

        Raises:
            KeyError: there is no such measure.
        """
        found = find(name)
        if found is None:
            raise KeyError(name)
        return found[0].values(self)[name]

    @cached_property
    def rows(self) -> tuple[Rows, Rows]:
        a = Rows.of(self.first)
        return (a.mapped(self.alignment.rotation) if self.alignment else a), Rows.of(self.second)

    @property
    def tied(self) -> bool:
        """True for untrained weights: one matching serves for encoder and decoder."""
        return self.rows[0].tied and self.rows[1].tied

    def latents(self, which: str = "") -> Subset:
        """Return all latents, or with "_live" those that are live, as members of `LIVE`."""
        least = self.live_at_least if which == "_live" else 0
        return Subset(self.first.live(least), self.second.live(least))

    @cached_property
    def by_encoder(self) -> Matching:
        return self.matcher(*(x.encoder for x in self.rows))

    @cached_property
    def by_decoder(self) -> Matching:
        return self.by_encoder if self.tied else self.matcher(*(x.decoder for x in self.rows))

    @cached_property
    def by_absolute(self) -> Matching:
        """The matching that maximises the sum of absolute decoder cosines."""
        return self.matcher(*(x.decoder for x in self.rows), absolute=True)

    @cached_property
    def by_joint(self) -> Matching:
        """The matching of the rows [E, W]/√2."""
        return self.by_encoder if self.tied else self.matcher(*(x.joint() for x in self.rows))

    @property
    def covariances(self) -> tuple[Float[np.ndarray, "d_in d_in"], ...]:
        """Covariances of what A and B read, in B's basis; without a map only their mean."""
        a, b = self.first.covariance, self.second.covariance
        assert a is not None
        assert b is not None
        if self.alignment:
            return self.alignment.of_covariance(a), b.astype(np.float64)
        return ((a.astype(np.float64) + b) / 2,)

    @cached_property
    def by_correlation(self) -> Matching:
        """The matching by eᵀΣe' / √(eᵀΣe · e'ᵀΣe'), the correlation of pre-activations.

        Directions of low variance, in which encoders keep their start, hardly count. Implemented as
        a matching of rows multiplied by a root of Σ; that of two models is the mean at equal trace.
        """
        mean, *other = self.covariances
        if other:
            mean = mean / np.trace(mean) + other[0] / np.trace(other[0])
        scale = root(mean)
        return self.matcher(*(x.encoder @ scale for x in self.rows))

    @cached_property
    def scan(self) -> PairScan:
        """The pass over all pairs of latents."""
        live = self.latents("_live")
        return scan_pairs(*self.rows, self.threshold, *live, device=self.device)

    @cached_property
    def a(self) -> PairSide:
        if "weights" not in self.known:
            return _empty_side(self.first, self.live_at_least)
        found = (self.scan.within_a, self.scan.live_within_a)
        return self._side(self.first, self.by_encoder, self.by_decoder, *found)

    @cached_property
    def b(self) -> PairSide:
        if "weights" not in self.known:
            return _empty_side(self.second, self.live_at_least)
        back = (self.by_encoder.inverse(), self.by_decoder.inverse())
        return self._side(self.second, *back, self.scan.within_b, self.scan.live_within_b)

    def _side(
        self,
        x: Dictionary,
        by_encoder: Matching,
        by_decoder: Matching,
        within: Int[np.ndarray, " n"],
        live_within: Int[np.ndarray, " n"],
    ) -> PairSide:
        agrees = by_encoder.matched & (by_encoder.assignment == by_decoder.assignment)
        near = (by_encoder.cosines >= self.threshold) & (by_decoder.cosines >= self.threshold)
        return PairSide(
            dictionary=x,
            partner_encoder=by_encoder.assignment,
            partner_decoder=by_decoder.assignment,
            cosine_encoder=by_encoder.cosines,
            cosine_decoder=by_decoder.cosines,
            agrees=agrees,
            shared=agrees & near,
            within=within,
            live_within=live_within,
            live=x.live(self.live_at_least),
        )

    def side(self, letter: str) -> PairSide:
        return self.a if letter == "a" else self.b

    @cached_property
    def duplicates(self) -> tuple[Duplicates, Duplicates]:
        """The repeated latents of each side."""
        if self.cell is not None:
            return self.cell.duplicates[self.place[0]], self.cell.duplicates[self.place[1]]
        a, b = (find_duplicates(x, self.threshold, self.device) for x in self.rows)
        return a, b

    def release(self) -> None:
        """Free the memory of all that was computed for this pair, except its sides."""
        for pair, kept in ((self, {"known", "a", "b"}), (self.start, set())):
            if pair is not None:
                for name in set(pair.__dict__) - {*self.__dataclass_fields__} - kept:
                    del pair.__dict__[name]


def _empty_side(x: Dictionary, live_at_least: int) -> PairSide:
    none, nothing = np.full(x.num_latents, -1), np.zeros(x.num_latents)
    never, zero = nothing.astype(bool), nothing.astype(np.int64)
    live = x.live(live_at_least)
    return PairSide(x, none, none, nothing, nothing, never, never, zero, zero, live)


def compare_pair(
    a: Dictionary,
    b: Dictionary,
    threshold: float = 0.7,
    live_at_least: int = 10,
    *,
    matcher: Matcher = match,
    device: str = "cpu",
) -> Pair:
    """Compare two dictionaries that are not in a cell: ``compare_pair(a, b).measures``.

    Raises ValueError for dictionaries with different ``d_in``.
    """
    if a.d_in != b.d_in:
        rule = "only dictionaries of the same `d_in` can be compared"
        raise ValueError(f"{rule}; {a.id} has {a.d_in}, {b.id} has {b.d_in}")
    return Pair(a, b, threshold, live_at_least, matcher=matcher, device=device)


@dataclass(frozen=True, eq=False)
class CellRuns(View):
    """The runs of a cell, and the sides of all of their pairs.

    Attributes:
        trained: the runs, in the order of the values of the paired axis.
        settings: settings of the comparison.
        duplicates: the repeated latents of each run.
        alignments: pair (s, t), s < t, of runs of two models → the map between their bases.
        sides: ordered pair (s, t) → the matches of s in t; filled pair by pair.
    """

    trained: Sequence[Dictionary]
    settings: ComparisonConfig
    duplicates: Sequence[Duplicates]
    alignments: Mapping[tuple[int, int], Alignment] = field(default_factory=dict)
    sides: dict[tuple[int, int], PairSide] = field(default_factory=dict)

    @cached_property
    def known(self) -> frozenset[str]:
        return _known_of(self.trained)

    @property
    def runs(self) -> list[RunInCell]:
        return [RunInCell(self, s) for s in range(len(self.trained))]

    @cached_property
    def shared(self) -> list[Bool[np.ndarray, "num_latents n-1"]]:
        """For each run, true where each of its latents is shared with each of the others."""
        return [
            np.stack([side.shared for side in run.against.values()], axis=1) for run in self.runs
        ]

    @cached_property
    def shared_with(self) -> list[Int[np.ndarray, " num_latents"]]:
        """For each run, the number of other runs that share each of its latents."""
        return [flags.sum(axis=1, dtype=np.int64) for flags in self.shared]


@dataclass(frozen=True, eq=False)
class RunInCell(View):
    """One run of a cell, at the place ``index`` in it."""

    cell: CellRuns
    index: int

    @property
    def known(self) -> frozenset[str]:
        return _known_of([self.dictionary])

    @property
    def dictionary(self) -> Dictionary:
        return self.cell.trained[self.index]

    @property
    def against(self) -> dict[str, PairSide]:
        """Id of each other run → the matches of this run in it."""
        return {
            other.id: self.cell.sides[self.index, t]
            for t, other in enumerate(self.cell.trained)
            if t != self.index
        }

    @property
    def live(self) -> Bool[np.ndarray, " num_latents"]:
        return self.dictionary.live(self.cell.settings.live_at_least)

    @property
    def duplicates(self) -> Duplicates:
        return self.cell.duplicates[self.index]

    @property
    def shared_with(self) -> Int[np.ndarray, " num_latents"]:
        return self.cell.shared_with[self.index]
