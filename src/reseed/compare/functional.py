"""Can a latent stand in for its match? Errors of reconstruction with a latent replaced, taken out
or put in, in closed form from sums over tokens.

Letters: r = x − x̂_A the residual of A, f_i and w_i activation and decoder row of its latent i, g_j
and v_j those of latent j of B, L = Σ_t ‖r‖² over held-out tokens. As a reconstruction is linear in
its latents, so is the residual, and no SAE is run with a latent changed:

    i taken out           r + f_i w_i                ΔL = 2 Σ f_i (r·w_i) + Σ f_i² ‖w_i‖²
    i replaced by s·j     r + f_i w_i − s g_j v_j    ΔL less that of taking out = −2 s N + s² G
    j put in              r − g_j v_j                ΔL = −2 Σ g_j (r·v_j) + Σ g_j² ‖v_j‖²

with N = Σ g_j (r·v_j) + (w_i·v_j) Σ f_i g_j and G = Σ g_j² ‖v_j‖². So R, the part of the damage of
taking i out that j repairs, is 1 − ΔL_replaced / ΔL_out = (2sN − s²G) / ΔL_out: 1 for a latent that
does the same, 0 for one that never fires, below 0 for one that does harm. The best scale is
s = max(N, 0)/G, with which R is max(N, 0)²/(G·ΔL_out).

Sources: model stitching and the insertion of latents by Leask et al. (*Sparse Autoencoders Do Not
Find Canonical Units of Analysis*, arXiv 2502.04878): a latent of B that lowers the error of A when
put in is *novel* to A, one that raises it a *reconstruction* latent. The change of the language
model's own loss is not measured here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.compare.similarity import BothWays, tiles
from reseed.compare.strata import DECILES


class Contribution(NamedTuple):
    """Of each latent of one SAE, in a reconstruction by its own SAE or by another one.

    Attributes:
        along: Σ_t f (r·w).
        energy: Σ_t f² ‖w‖².
    """

    along: Float[np.ndarray, " F"]
    energy: Float[np.ndarray, " F"]

    @property
    def taken_out(self) -> Float[np.ndarray, " F"]:
        """ΔL of leaving it out of the reconstruction that left r."""
        return 2 * self.along + self.energy

    @property
    def put_in(self) -> Float[np.ndarray, " F"]:
        """ΔL of adding it to the reconstruction that left r."""
        return self.energy - 2 * self.along


class Substitution(NamedTuple):
    """Each latent of A replaced by its partner in B; NaN where it has none.

    Attributes:
        damage: ΔL of taking it out.
        repaired: how much less ΔL is with the partner, with its own activations.
        repaired_best: the same with the partner scaled as is best.
    """

    damage: Float[np.ndarray, " F_A"]
    repaired: Float[np.ndarray, " F_A"]
    repaired_best: Float[np.ndarray, " F_A"]

    @property
    def quality(self) -> Float[np.ndarray, " F_A"]:
        """R; NaN where taking the latent out does no damage.

        Of any size: a damage of next to nothing is soon outweighed. See `bounded`.
        """
        return self._of_damage(self.repaired)

    @property
    def quality_best(self) -> Float[np.ndarray, " F_A"]:
        """R with the best scale."""
        return self._of_damage(self.repaired_best)

    def _of_damage(self, part: Float[np.ndarray, " F_A"]) -> Float[np.ndarray, " F_A"]:
        return part / np.where(self.damage > 0, self.damage, np.nan)

    def pooled(self, kept: Bool[np.ndarray, " F_A"]) -> tuple[float, float]:
        """What is repaired and what is damaged, summed over some latents that have partners."""
        return float(self.repaired[kept].sum()), float(self.damage[kept].sum())


def substitution(
    own: Contribution,
    other: Contribution,
    partner: Int[np.ndarray, " F_A"],
    products: Float[np.ndarray, " F_A"],
    scalar: Float[np.ndarray, " F_A"],
) -> Substitution:
    """Every latent of A replaced by its partner in B.

    Args:
        own: latents of A in the reconstruction by A.
        other: latents of B, against the same residual of A.
        partner: latent of B, −1 where there is none.
        products: Σ_t f_i g_j with the partner.
        scalar: w_i · v_j of the decoder rows.
    """
    damage = np.where(partner >= 0, own.taken_out, np.nan)
    inner = other.along[partner] + scalar * products
    energy = other.energy[partner]
    aligned = np.maximum(inner, 0) ** 2
    best = np.divide(aligned, energy, out=np.zeros_like(energy), where=energy > 0)
    return Substitution(damage, 2 * inner - energy, best)


def bounded(quality: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """R between 0 and 1, for means: one that does worse than none repairs nothing, and none
    repairs more than all. NaN stays.

    Without bounds a mean would be that of the few latents whose damage is nearly 0.
    """
    return np.clip(quality, 0.0, 1.0)


def row_products(
    a: Float[Tensor, "F_A D"], b: Float[Tensor, "F_B D"], partner: Int[Tensor, " F_A"]
) -> Float[Tensor, " F_A"]:
    """a_i · b_σ(i) for each i, in float64; 0 where there is no partner."""
    found = [
        (rows.double() * b[other.clamp(min=0)]).sum(1)
        for rows, other in zip(a.split(4096), partner.split(4096), strict=True)
    ]
    return torch.where(partner >= 0, torch.cat(found), 0.0)


def second_best(
    a: Float[Tensor, "F_A D"],
    b: Float[Tensor, "F_B D"],
    partner: Int[Tensor, " F_A"],
    allowed_a: Bool[Tensor, " F_A"],
    allowed_b: Bool[Tensor, " F_B"],
) -> tuple[Int[Tensor, " F_A"], Int[Tensor, " F_B"]]:
    """For each allowed latent the allowed one of the other side, its partner aside, with the
    largest cosine; −1 for the others, and where there is no such latent.

    Both sides in one pass over all pairs, in float32 and in tiles: no matrix of them is held. Of
    two that float32 cannot tell apart either may be found.

    Args:
        a, b: rows of length 1.
        partner: of each latent of A, −1 where it has none; those of B are the same pairs.
    """
    i, j = allowed_a.nonzero().squeeze(1), allowed_b.nonzero().squeeze(1)
    of_a, of_b = torch.full_like(partner, -1), partner.new_full((len(b),), -1)
    if not (len(i) and len(j)):
        return of_a, of_b
    place = partner.new_full((len(b),), -1)
    place[j] = torch.arange(len(j), device=place.device)
    taken = torch.where(partner[i] >= 0, place[partner[i].clamp(min=0)], -1)
    rows_a, rows_b = a[i].float(), b[j].float()
    best = BothWays(len(i), len(j), str(a.device))
    for rows, columns in tiles(len(i), len(j)):
        cosines = rows_a[rows] @ rows_b[columns].T
        at = taken[rows] - columns.start
        inside = ((at >= 0) & (at < cosines.shape[1])).nonzero().squeeze(1)
        cosines[inside, at[inside]] = -torch.inf
        best.look(cosines, rows, columns)
    of_a[i] = torch.where(best.a > -torch.inf, j[best.of_a], -1)
    of_b[j] = torch.where(best.b > -torch.inf, i[best.of_b], -1)
    return of_a, of_b


def random_alike(
    firing_a: Int[np.ndarray, " F_A"],
    firing_b: Int[np.ndarray, " F_B"],
    partner: Int[np.ndarray, " F_A"],
    allowed: Bool[np.ndarray, " F_B"],
    seed: int,
) -> Int[np.ndarray, " F_A"]:
    """For each latent of A a random allowed one of B, its partner aside, that fires about as often:
    in the same decile of B's firing counts. −1 where there is no other."""
    kept = np.flatnonzero(allowed)
    if not len(kept):
        return np.full(len(firing_a), -1)
    edges = np.quantile(firing_b[kept], np.arange(1, DECILES) / DECILES)
    stratum_b = np.searchsorted(edges, firing_b[kept], side="right")
    order = np.argsort(stratum_b, kind="stable")
    kept, stratum_b = kept[order], stratum_b[order]
    stratum = np.searchsorted(edges, firing_a, side="right")
    first, last = (np.searchsorted(stratum_b, stratum, side) for side in ("left", "right"))
    # Where the partner is in the stratum, it is passed over: one is drawn of those after it, in a
    # circle that ends before it.
    place = np.full(len(firing_b), -1)
    place[kept] = np.arange(len(kept))
    at = np.where(partner >= 0, place[partner], -1)
    inside = (at >= first) & (at < last)
    size = last - first
    choices = size - inside
    draw = np.floor(np.random.default_rng(seed).random(len(firing_a)) * choices).astype(np.int64)
    start = np.where(inside, at - first + 1, 0)
    chosen = first + (start + draw) % np.maximum(size, 1)
    return np.where(choices > 0, kept[np.minimum(chosen, len(kept) - 1)], -1)


def quality_coverage(
    quality: Float[np.ndarray, " n"], rank: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " known"]:
    """Mean quality of the r matches that rank highest, for r = 1 … as many as have one."""
    known = ~np.isnan(quality)
    order = np.argsort(-rank[known], kind="stable")
    return quality[known][order].cumsum() / np.arange(1, len(order) + 1)
