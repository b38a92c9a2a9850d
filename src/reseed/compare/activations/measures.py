"""All measures on activations of all pairs of a cell's SAEs, in one pass over held-out tokens.

Memory holds sums per latent and per matched pair of latents. It does not grow with the number of
tokens, and no array has the size F_A × F_B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.compare.activations.agreement import (
    CKA,
    MIN_TOKENS,
    ActivationMatcher,
    Agreement,
    FiringSums,
    MatchedAgreement,
    PairSums,
    agreement,
    centred_gram,
)
from reseed.compare.activations.batch_codes import encode_batch, project_on_rows, rebatch
from reseed.compare.activations.substitution import (
    Contribution,
    Substitution,
    random_partners,
    row_products,
    second_best_partners,
    substitution,
)
from reseed.sae.base import SAE

BATCH = 1_024
"""Number of tokens in a batch; Gram matrices are [batch, batch]."""


@dataclass(frozen=True, eq=False)
class WeightMatches:
    """The matches by weights of A's latents in B.

    Attributes:
        partner: index of the latent of B that is matched by decoder; −1 for none.
        shared: true if shared by the strict rule, which requires this same partner.
        live: live latents of A.
        firing: firing counts of A's latents in A's own held-out tokens.
    """

    partner: Int[np.ndarray, " F_A"]
    shared: Bool[np.ndarray, " F_A"]
    live: Bool[np.ndarray, " F_A"]
    firing: Int[np.ndarray, " F_A"]


AllWeightMatches = Mapping[tuple[int, int], WeightMatches]
"""Ordered pair (s, t) → the matches of the latents of s in t."""


@dataclass(frozen=True, eq=False)
class LatentMeasures:
    """Measures of each latent of A against B; NaN without a partner or where undefined.

    Attributes:
        agreement: agreement with the partner's activations.
        match_cosine: the smaller of the encoder's and the decoder's cosine with the partner.
        substitution, second_best, random: effect of replacing the latent by its partner, by the
            second-best latent, and by a random one.
        insertion: ΔL of adding the latent to B's reconstruction, as a fraction of B's error.
        both_live: true if the latent and its partner are live.
    """

    agreement: Agreement
    match_cosine: Float[np.ndarray, " F_A"]
    substitution: Substitution
    second_best: Substitution
    random: Substitution
    insertion: Float[np.ndarray, " F_A"]
    both_live: Bool[np.ndarray, " F_A"]


@dataclass(frozen=True, eq=False)
class ActivationMeasures:
    """All measures on activations of n SAEs.

    Attributes:
        tokens: number of tokens measured.
        latents: ordered pair (s, t) → measures of the latents of s against t.
        cka_codes, cka_reconstructions: CKA of each pair of SAEs.
        matched: pair (s, t), s < t → agreement of latents matched by their activations; empty if
            all SAEs read the same activations and are therefore matched by their weights.
    """

    tokens: int
    latents: Mapping[tuple[int, int], LatentMeasures]
    cka_codes: Float[np.ndarray, "n n"]
    cka_reconstructions: Float[np.ndarray, "n n"]
    matched: Mapping[tuple[int, int], MatchedAgreement] = field(default_factory=dict)


def measure_same_activations(
    saes: Sequence[SAE],
    sides: AllWeightMatches,
    chunks: Iterable[Float[Tensor, "tokens D"]],
    seed: int = 0,
) -> ActivationMeasures:
    """Run n SAEs once over held-out activations and measure every pair.

    Args:
        saes: SAEs for raw activations, on one device.
        sides: the matches of every ordered pair.
        chunks: the activations, in pieces of any size; the result does not depend on the size.
        seed: seed of the random partners.

    Raises:
        ValueError: there are no tokens.
    """
    state = _Sums.empty(saes, sides, [0] * len(saes), seed)
    device = saes[0].W_dec.device
    for x in rebatch(chunks, BATCH):
        state.add([x.to(device, torch.float32)])
    return state.finish(sides)


def measure_same_tokens(
    saes: Sequence[SAE],
    sides: AllWeightMatches,
    streams: Sequence[Iterable[Float[Tensor, "tokens D"]]],
    reads: Sequence[int],
    tokens: int,
    *,
    seed: int = 0,
    threshold: float = 0.7,
) -> ActivationMeasures:
    """Run SAEs of different activations once over the same tokens.

    SAEs that read the same activations are measured as in `measure_same_activations`. For other
    pairs CKA is measured, and the agreement of latents that are matched by their weights in an
    aligned basis; replacing a latent by its match needs one space and is not measured. Latents of
    every pair are also matched by their activations.

    Args:
        streams: one stream per kind of activations, in pieces of any size; row i is the same token
            in each.
        reads: for each SAE, the index of its stream.
        tokens: number of tokens in each stream.
        threshold: correlation from which matched latents count as agreeing.

    Raises:
        ValueError: there are no tokens, or streams differ in length.
    """
    state = _Sums.empty(saes, sides, reads, seed)
    live = [next(side.live for (s, _), side in sides.items() if s == i) for i in range(len(saes))]
    state.by_activations = ActivationMatcher(live, tokens, threshold)
    # The first batches give the matching; smaller batches leave some after them if tokens are few.
    size = min(BATCH, max(MIN_TOKENS, tokens // 4))
    device = saes[0].W_dec.device
    for xs in zip(*(rebatch(chunks, size) for chunks in streams), strict=True):
        if len({len(x) for x in xs}) > 1:
            raise ValueError(
                "the streams must hold the same tokens; got batches of "
                f"{', '.join(str(len(x)) for x in xs)}"
            )
        state.add([x.to(device, torch.float32) for x in xs])
    return state.finish(sides)


@dataclass(eq=False)
class _Sums:
    """Sums over tokens.

    Attributes:
        firing: firing of each SAE.
        reads: for each SAE, the index of the activations that it reads.
        along: (target t, source s) → Σ g_j (r_t·v_j) of the latents of s; see `Contribution`.
            Only for pairs that read the same activations.
        together: ordered pair → sums with the partners and, for pairs that read the same
            activations, with the second best and the random latents.
        error: Σ‖r‖² of each SAE.
        by_activations: latents matched by their activations, if requested.
    """

    saes: Sequence[SAE]
    reads: Sequence[int]
    firing: list[FiringSums]
    along: dict[tuple[int, int], Tensor]
    together: dict[tuple[int, int], Partners | tuple[PairSums]]
    cka_codes: CKA
    cka_reconstructions: CKA
    error: list[float]
    by_activations: ActivationMatcher | None = None
    tokens: int = 0

    @classmethod
    def empty(
        cls, saes: Sequence[SAE], sides: AllWeightMatches, reads: Sequence[int], seed: int
    ) -> Self:
        """Return the sums before the first token."""
        n, device = len(saes), saes[0].W_dec.device
        units = [nn_functional.normalize(sae.W_dec.detach(), dim=1) for sae in saes]
        return cls(
            saes=saes,
            reads=reads,
            firing=[FiringSums.empty(sae.num_latents, device) for sae in saes],
            along={
                (t, s): torch.zeros(saes[s].num_latents, dtype=torch.float64, device=device)
                for t in range(n)
                for s in range(n)
                if reads[s] == reads[t]
            },
            together={
                ordered: found
                for s, t in combinations(range(n), 2)
                for ordered, found in zip(
                    ((s, t), (t, s)),
                    _partners(units[s], units[t], sides[s, t], sides[t, s], seed)
                    if reads[s] == reads[t]
                    else (_matches(sides[s, t], device), _matches(sides[t, s], device)),
                    strict=True,
                )
            },
            cka_codes=CKA(n),
            cka_reconstructions=CKA(n),
            error=[0.0] * n,
        )

    def add(self, activations: Sequence[Float[Tensor, "B D"]]) -> None:
        """Add a batch of tokens; ``activations`` has one tensor per stream."""
        xs = [activations[which] for which in self.reads]
        made = [encode_batch(sae, x) for sae, x in zip(self.saes, xs, strict=True)]
        residuals = [x - m.reconstruction for x, m in zip(xs, made, strict=True)]
        for s, (sae, m) in enumerate(zip(self.saes, made, strict=True)):
            self.firing[s].add(m.codes)
            self.error[s] += float(residuals[s].double().square().sum())
            alike = [t for t in range(len(made)) if (t, s) in self.along]
            own = project_on_rows([residuals[t] for t in alike], m.codes, sae.W_dec)
            for t, found in zip(alike, own, strict=True):
                self.along[t, s] += found
        for (s, t), lists in self.together.items():
            for pairs in lists:
                pairs.add(made[s].codes, made[t].codes)
        self.cka_codes.add([m.codes.gram() for m in made])
        self.cka_reconstructions.add([centred_gram(m.reconstruction) for m in made])
        if self.by_activations is not None:
            self.by_activations.add([m.codes for m in made])
        self.tokens += len(xs[0])

    def finish(self, sides: AllWeightMatches) -> ActivationMeasures:
        """Return all measures.

        Raises:
            ValueError: there are no tokens.
        """
        if not self.tokens:
            raise ValueError("no activations were given: there is nothing to measure")
        return ActivationMeasures(
            tokens=self.tokens,
            latents={
                (s, t): self.latents(s, t, sides)
                if self.reads[s] == self.reads[t]
                else self.agreement_alone(s, t, sides)
                for s, t in sides
            },
            cka_codes=self.cka_codes.values(),
            cka_reconstructions=self.cka_reconstructions.values(),
            matched={} if self.by_activations is None else self.by_activations.finish(),
        )

    def latents(self, s: int, t: int, sides: AllWeightMatches) -> LatentMeasures:
        """Return the measures of the latents of s against t."""
        side = sides[s, t]
        matched, second, random = (self._substitution(s, t, x) for x in self.together[s, t])
        pairs = self.together[s, t][0]
        by_encoder, by_decoder = (self._cosines(s, t, w, pairs) for w in ("W_enc", "W_dec"))
        smaller = torch.minimum(by_encoder, by_decoder).cpu().numpy()
        return LatentMeasures(
            agreement=agreement(self.firing[s], self.firing[t], pairs),
            match_cosine=np.where(side.partner >= 0, smaller, np.nan),
            substitution=matched,
            second_best=second,
            random=random,
            insertion=self._contribution(t, s).put_in / self.error[t],
            both_live=_both_live(side, sides[t, s]),
        )

    def agreement_alone(self, s: int, t: int, sides: AllWeightMatches) -> LatentMeasures:
        """Return the measures of s against t, which reads other activations: those that need one
        space are NaN."""
        side = sides[s, t]
        nothing = np.full(len(side.partner), np.nan)
        none = Substitution(nothing, nothing, nothing)
        return LatentMeasures(
            agreement=agreement(self.firing[s], self.firing[t], self.together[s, t][0]),
            match_cosine=nothing,
            substitution=none,
            second_best=none,
            random=none,
            insertion=nothing,
            both_live=_both_live(side, sides[t, s]),
        )

    def _cosines(self, s: int, t: int, rows: str, pairs: PairSums) -> Float[Tensor, " F_A"]:
        a, b = (nn_functional.normalize(getattr(self.saes[i], rows), dim=1) for i in (s, t))
        return row_products(a, b, pairs.partner)

    def _contribution(self, target: int, source: int) -> Contribution:
        """Return the contributions of the source's latents to the target's reconstruction."""
        norms = self.saes[source].W_dec.double().square().sum(1)
        energy = self.firing[source].squares * norms
        return Contribution(self.along[target, source].cpu().numpy(), energy.cpu().numpy())

    def _substitution(self, s: int, t: int, pairs: PairSums) -> Substitution:
        scalar = row_products(self.saes[s].W_dec, self.saes[t].W_dec, pairs.partner)
        columns = (pairs.partner, pairs.products, scalar)
        return substitution(
            self._contribution(s, s), self._contribution(s, t), *(x.cpu().numpy() for x in columns)
        )


def _both_live(side: WeightMatches, other: WeightMatches) -> Bool[np.ndarray, " F_A"]:
    return side.live & (side.partner >= 0) & other.live[side.partner]


Partners = tuple[PairSums, PairSums, PairSums]
"""Sums of A's latents with their matches in B, and with hard negatives: second best, random."""


def _matches(side: WeightMatches, device: torch.device) -> tuple[PairSums]:
    return (PairSums.empty(torch.from_numpy(side.partner).to(device)),)


def _partners(
    rows_a: Float[Tensor, "F_A D"],
    rows_b: Float[Tensor, "F_B D"],
    side_a: WeightMatches,
    side_b: WeightMatches,
    seed: int,
) -> tuple[Partners, Partners]:
    """Return the partners of A's latents in B, and of B's in A."""
    device = rows_a.device
    matched, live_a, live_b = (
        torch.from_numpy(x).to(device) for x in (side_a.partner, side_a.live, side_b.live)
    )
    second = second_best_partners(rows_a, rows_b, matched, live_a, live_b)
    found = []
    for own, other, nearest in ((side_a, side_b, second[0]), (side_b, side_a, second[1])):
        random = random_partners(own.firing, other.firing, own.partner, other.live, seed)
        lists = (torch.from_numpy(own.partner), nearest, torch.from_numpy(random))
        found.append(tuple(PairSums.empty(partner.to(device)) for partner in lists))
    return found[0], found[1]  # type: ignore[return-value]
