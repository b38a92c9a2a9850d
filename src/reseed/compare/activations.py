"""A cell's SAEs on held-out tokens: all measures on activations of all pairs, in one pass.

What is held while the tokens go by is sums per latent and per pair of latents; how many tokens
there are does not matter, and nothing is of the size F_A × F_B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.compare.agreement import Agreement, Firing, Together, agreement
from reseed.compare.cka import CKA, centred_gram
from reseed.compare.codes import along_rows, batches, encoded
from reseed.compare.functional import (
    Contribution,
    Substitution,
    random_alike,
    row_products,
    second_best,
    substitution,
)

if TYPE_CHECKING:
    from reseed.sae.base import SAE

BATCH = 1_024
"""Tokens of a batch: Gram matrices are [batch, batch]."""


@dataclass(frozen=True, eq=False)
class Side:
    """What the weights said of the latents of A against B.

    Attributes:
        partner: by decoder; −1 where a latent has none.
        shared: by the strict rule, which is with the same partner.
        live: of A.
        firing: of A, in its own held-out tokens.
    """

    partner: Int[np.ndarray, " F_A"]
    shared: Bool[np.ndarray, " F_A"]
    live: Bool[np.ndarray, " F_A"]
    firing: Int[np.ndarray, " F_A"]


Sides = Mapping[tuple[int, int], Side]
"""By ordered pair (s, t): the latents of s against t."""


@dataclass(frozen=True, eq=False)
class LatentMeasures:
    """A value per latent of A, against B; NaN where it has no partner or there is no value.

    Attributes:
        agreement: with the partner's activations.
        match_cosine: the smaller one of the cosines of encoder and of decoder with the partner.
        substitution, second_best, random: of it by its partner, and by hard negatives.
        insertion: ΔL of putting it into B's reconstruction, as a fraction of B's error.
        both_live: the partner is live too.
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
    """All that was measured.

    Attributes:
        tokens: how many went by.
        latents: by ordered pair (s, t): the latents of s against t.
        cka_codes, cka_reconstructions: of every two SAEs.
    """

    tokens: int
    latents: Mapping[tuple[int, int], LatentMeasures]
    cka_codes: Float[np.ndarray, "n n"]
    cka_reconstructions: Float[np.ndarray, "n n"]


def activation_measures(
    saes: Sequence[SAE],
    sides: Sides,
    chunks: Iterable[Float[Tensor, "tokens D"]],
    seed: int = 0,
) -> ActivationMeasures:
    """Run n SAEs once over held-out activations, and measure every pair of them.

    Args:
        saes: for raw activations, on one device.
        sides: of every ordered pair of them.
        chunks: the activations, in pieces of any size; the result does not depend on it.
        seed: of the random partners.

    Raises:
        ValueError: no token.
    """
    state = _Sums.of(saes, sides, seed)
    device = saes[0].W_dec.device
    for x in batches(chunks, BATCH):
        state.add(x.to(device, torch.float32))
    if not state.tokens:
        raise ValueError("no activations were given: there is nothing to measure")
    return ActivationMeasures(
        tokens=state.tokens,
        latents={(s, t): state.measured(s, t, sides) for s, t in sides},
        cka_codes=state.cka_codes.values(),
        cka_reconstructions=state.cka_reconstructions.values(),
    )


@dataclass(eq=False)
class _Sums:
    """What is summed over tokens.

    Attributes:
        firing: of each SAE.
        along: by target t and source s: Σ g_j (r_t·v_j) of the latents of s. See `Contribution`.
        together: by ordered pair, with the partners, the second best and the random ones.
        error: Σ‖r‖² of each SAE.
    """

    saes: Sequence[SAE]
    firing: list[Firing]
    along: dict[tuple[int, int], Tensor]
    together: dict[tuple[int, int], Partners]
    cka_codes: CKA
    cka_reconstructions: CKA
    error: list[float]
    tokens: int = 0

    @classmethod
    def of(cls, saes: Sequence[SAE], sides: Sides, seed: int) -> Self:
        """Before the first token."""
        n, device = len(saes), saes[0].W_dec.device
        units = [nn_functional.normalize(sae.W_dec.detach(), dim=1) for sae in saes]
        return cls(
            saes=saes,
            firing=[Firing.of(sae.num_latents, device) for sae in saes],
            along={
                (t, s): torch.zeros(saes[s].num_latents, dtype=torch.float64, device=device)
                for t in range(n)
                for s in range(n)
            },
            together={
                ordered: found
                for s, t in combinations(range(n), 2)
                for ordered, found in zip(
                    ((s, t), (t, s)),
                    _partners(units[s], units[t], sides[s, t], sides[t, s], seed),
                    strict=True,
                )
            },
            cka_codes=CKA(n),
            cka_reconstructions=CKA(n),
            error=[0.0] * n,
        )

    def add(self, x: Float[Tensor, "B D"]) -> None:
        """Count a batch."""
        made = [encoded(sae, x) for sae in self.saes]
        residuals = [x - m.reconstruction for m in made]
        for s, (sae, m) in enumerate(zip(self.saes, made, strict=True)):
            self.firing[s].add(m.codes)
            self.error[s] += float(residuals[s].double().square().sum())
            for t, found in enumerate(along_rows(residuals, m.codes, sae.W_dec)):
                self.along[t, s] += found
        for (s, t), lists in self.together.items():
            for pairs in lists:
                pairs.add(made[s].codes, made[t].codes)
        self.cka_codes.add([m.codes.gram() for m in made])
        self.cka_reconstructions.add([centred_gram(m.reconstruction) for m in made])
        self.tokens += len(x)

    def measured(self, s: int, t: int, sides: Sides) -> LatentMeasures:
        """The latents of s against t, from the sums."""
        side, live = sides[s, t], sides[t, s].live
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
            both_live=side.live & (side.partner >= 0) & live[side.partner],
        )

    def _cosines(self, s: int, t: int, rows: str, pairs: Together) -> Float[Tensor, " F_A"]:
        a, b = (nn_functional.normalize(getattr(self.saes[i], rows), dim=1) for i in (s, t))
        return row_products(a, b, pairs.partner)

    def _contribution(self, target: int, source: int) -> Contribution:
        """Latents of the source in the reconstruction by the target."""
        norms = self.saes[source].W_dec.double().square().sum(1)
        energy = self.firing[source].squares * norms
        return Contribution(self.along[target, source].cpu().numpy(), energy.cpu().numpy())

    def _substitution(self, s: int, t: int, pairs: Together) -> Substitution:
        scalar = row_products(self.saes[s].W_dec, self.saes[t].W_dec, pairs.partner)
        columns = (pairs.partner, pairs.products, scalar)
        return substitution(
            self._contribution(s, s), self._contribution(s, t), *(x.cpu().numpy() for x in columns)
        )


Partners = tuple[Together, Together, Together]
"""Of the latents of A in B: the matched ones, and the hard negatives, second best and random."""


def _partners(
    rows_a: Float[Tensor, "F_A D"],
    rows_b: Float[Tensor, "F_B D"],
    side_a: Side,
    side_b: Side,
    seed: int,
) -> tuple[Partners, Partners]:
    """The partners of A's latents in B, and of B's in A."""
    device = rows_a.device
    matched, live_a, live_b = (
        torch.from_numpy(x).to(device) for x in (side_a.partner, side_a.live, side_b.live)
    )
    second = second_best(rows_a, rows_b, matched, live_a, live_b)
    found = []
    for own, other, nearest in ((side_a, side_b, second[0]), (side_b, side_a, second[1])):
        random = random_alike(own.firing, other.firing, own.partner, other.live, seed)
        lists = (torch.from_numpy(own.partner), nearest, torch.from_numpy(random))
        found.append(tuple(Together.of(partner.to(device)) for partner in lists))
    return found[0], found[1]  # type: ignore[return-value]
