"""Substitution of a latent by its match: the reconstruction error with a latent replaced, taken out
or put in, in closed form from sums over tokens.

Letters: r = x − x̂_A the residual of A, f_i and w_i activation and decoder row of its latent i, g_j
and v_j those of latent j of B, L = Σ_t ‖r‖² over held-out tokens. The reconstruction, and so the
residual, is linear in the latents; no SAE has to be run with a latent changed:

    i taken out           r + f_i w_i                ΔL_out = 2 Σ f_i (r·w_i) + Σ f_i² ‖w_i‖²
    i replaced by s·j     r + f_i w_i − s g_j v_j    ΔL_replaced = ΔL_out − 2 s N + s² G
    j put in              r − g_j v_j                ΔL_in = −2 Σ g_j (r·v_j) + Σ g_j² ‖v_j‖²

with N = Σ g_j (r·v_j) + (w_i·v_j) Σ f_i g_j and G = Σ g_j² ‖v_j‖². Taking i out does damage ΔL_out;
R is the fraction of it that j repairs: 1 − ΔL_replaced / ΔL_out = (2sN − s²G) / ΔL_out. R is 1 if j
contributes the same as i, 0 if j never fires, and negative if j increases the error further. The
best scale is s = max(N, 0)/G, which gives R = max(N, 0)²/(G·ΔL_out).

Source: model stitching and the insertion of latents by Leask et al. (*Sparse Autoencoders Do Not
Find Canonical Units of Analysis*, arXiv 2502.04878). A latent of B is *novel* to A if putting it in
lowers A's error, and a *reconstruction* latent if it raises it. This module does not measure the
change of the language model's own loss.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.compare.nearest import RunningMaxBothWays, tiles
from reseed.compare.strata import decile_edges, decile_of


class Contribution(NamedTuple):
    """The contribution of each latent of one SAE to a reconstruction by its own or another SAE.

    Attributes:
        along: Σ_t f (r·w).
        energy: Σ_t f² ‖w‖².
    """

    along: Float[np.ndarray, " F"]
    energy: Float[np.ndarray, " F"]

    @property
    def taken_out(self) -> Float[np.ndarray, " F"]:
        """ΔL of removing the latent from the reconstruction that left r."""
        return 2 * self.along + self.energy

    @property
    def put_in(self) -> Float[np.ndarray, " F"]:
        """ΔL of adding the latent to the reconstruction that left r."""
        return self.energy - 2 * self.along


class Substitution(NamedTuple):
    """The effect of replacing each latent of A by its partner in B; NaN without a partner.

    Attributes:
        damage: ΔL of taking the latent out.
        repaired: reduction of that ΔL by the partner with its own activations.
        repaired_best: the same with the partner at its best scale.
    """

    damage: Float[np.ndarray, " F_A"]
    repaired: Float[np.ndarray, " F_A"]
    repaired_best: Float[np.ndarray, " F_A"]

    @property
    def quality(self) -> Float[np.ndarray, " F_A"]:
        """R; NaN where taking the latent out does no damage.

        R is unbounded, as the damage can be close to 0; see `clip_quality`.
        """
        return self._of_damage(self.repaired)

    @property
    def quality_best(self) -> Float[np.ndarray, " F_A"]:
        """R with the best scale."""
        return self._of_damage(self.repaired_best)

    def _of_damage(self, part: Float[np.ndarray, " F_A"]) -> Float[np.ndarray, " F_A"]:
        return part / np.where(self.damage > 0, self.damage, np.nan)

    def pooled(self, kept: Bool[np.ndarray, " F_A"]) -> tuple[float, float]:
        """Sum ``repaired`` and ``damage`` over the kept latents, which must have partners."""
        return float(self.repaired[kept].sum()), float(self.damage[kept].sum())


def substitution(
    own: Contribution,
    other: Contribution,
    partner: Int[np.ndarray, " F_A"],
    products: Float[np.ndarray, " F_A"],
    scalar: Float[np.ndarray, " F_A"],
) -> Substitution:
    """Return the effect of replacing every latent of A by its partner in B.

    Args:
        own: contributions of A's latents to A's reconstruction.
        other: contributions of B's latents to A's reconstruction, with the same residual of A.
        partner: latent of B; −1 for none.
        products: Σ_t f_i g_j with the partner.
        scalar: w_i · v_j of the decoder rows.
    """
    damage = np.where(partner >= 0, own.taken_out, np.nan)
    inner = other.along[partner] + scalar * products
    energy = other.energy[partner]
    aligned = np.maximum(inner, 0) ** 2
    best = np.divide(aligned, energy, out=np.zeros_like(energy), where=energy > 0)
    return Substitution(damage, 2 * inner - energy, best)


def clip_quality(quality: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Clip R to 0 … 1, for means; keep NaN.

    An unbounded mean would be dominated by the few latents whose damage is nearly 0.
    """
    return np.clip(quality, 0.0, 1.0)


def row_products(
    a: Float[Tensor, "F_A D"], b: Float[Tensor, "F_B D"], partner: Int[Tensor, " F_A"]
) -> Float[Tensor, " F_A"]:
    """Return a_i · b_σ(i) for each i, in float64; 0 where there is no partner."""
    found = [
        (rows.double() * b[other.clamp(min=0)]).sum(1)
        for rows, other in zip(a.split(4096), partner.split(4096), strict=True)
    ]
    return torch.where(partner >= 0, torch.cat(found), 0.0)


def second_best_partners(
    a: Float[Tensor, "F_A D"],
    b: Float[Tensor, "F_B D"],
    partner: Int[Tensor, " F_A"],
    allowed_a: Bool[Tensor, " F_A"],
    allowed_b: Bool[Tensor, " F_B"],
) -> tuple[Int[Tensor, " F_A"], Int[Tensor, " F_B"]]:
    """Return, for each allowed latent, the allowed latent of the other side with the largest
    cosine, excluding its partner; −1 for other latents and where there is none.

    Computes both sides in one pass over all pairs, in float32 and in tiles, without holding the
    matrix. Cosines that are equal in float32 are ordered arbitrarily.

    Args:
        a, b: rows of length 1.
        partner: latent of B for each latent of A; −1 for none. B's partners are the same pairs.
    """
    i, j = allowed_a.nonzero().squeeze(1), allowed_b.nonzero().squeeze(1)
    of_a, of_b = torch.full_like(partner, -1), partner.new_full((len(b),), -1)
    if not (len(i) and len(j)):
        return of_a, of_b
    place = partner.new_full((len(b),), -1)
    place[j] = torch.arange(len(j), device=place.device)
    taken = torch.where(partner[i] >= 0, place[partner[i].clamp(min=0)], -1)
    rows_a, rows_b = a[i].float(), b[j].float()
    best = RunningMaxBothWays(len(i), len(j), str(a.device))
    for rows, columns in tiles(len(i), len(j)):
        cosines = rows_a[rows] @ rows_b[columns].T
        at = taken[rows] - columns.start
        inside = ((at >= 0) & (at < cosines.shape[1])).nonzero().squeeze(1)
        cosines[inside, at[inside]] = -torch.inf
        best.update(cosines, rows, columns)
    of_a[i] = torch.where(best.a > -torch.inf, j[best.of_a], -1)
    of_b[j] = torch.where(best.b > -torch.inf, i[best.of_b], -1)
    return of_a, of_b


def random_partners(
    firing_a: Int[np.ndarray, " F_A"],
    firing_b: Int[np.ndarray, " F_B"],
    partner: Int[np.ndarray, " F_A"],
    allowed: Bool[np.ndarray, " F_B"],
    seed: int,
) -> Int[np.ndarray, " F_A"]:
    """Draw, for each latent of A, a random allowed latent of B that fires about as often.

    The latent comes from the same decile of B's firing counts and is never the partner; −1 where
    the decile has no other latent.
    """
    kept = np.flatnonzero(allowed)
    if not len(kept):
        return np.full(len(firing_a), -1)
    edges = decile_edges(firing_b[kept])
    stratum_b = decile_of(firing_b[kept], edges)
    order = np.argsort(stratum_b, kind="stable")
    kept, stratum_b = kept[order], stratum_b[order]
    stratum = decile_of(firing_a, edges)
    first, last = (np.searchsorted(stratum_b, stratum, side) for side in ("left", "right"))
    # If the partner is in the stratum, count the other latents cyclically from the one after it, so
    # that the partner cannot be drawn.
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


def quality_by_coverage(
    quality: Float[np.ndarray, " n"], rank: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " known"]:
    """Return the mean quality of the r highest-ranking matches for each r; NaN are left out."""
    known = ~np.isnan(quality)
    order = np.argsort(-rank[known], kind="stable")
    return quality[known][order].cumsum() / np.arange(1, len(order) + 1)
