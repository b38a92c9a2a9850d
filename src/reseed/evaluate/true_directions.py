"""Decoder rows of an SAE compared with true feature directions.

Letters: F latents, N true features, D `d_in`, w a decoder row of length 1, u a feature's direction
of length 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_BLOCK = 1_024
"""Number of latents that are fitted at once."""
_DEPENDENT = 1e-4
"""A feature closer than this to the span of others counts as dependent on them."""


@dataclass(frozen=True, eq=False)
class DirectionMatch:
    """Match of each latent with true features. A zero or non-finite row has cosine 0 with all.

    Attributes:
        feature: the feature with the largest |cos|, −1 for a row without direction.
        cosine: the (signed) cosine with that feature.
        composite: cosine with the best non-negative sum of at most 3 features.
        group: largest norm of the projection of w onto the subspace of one group, 0 without groups.
        mcc: mean |cos| over min(F, N) pairs of a latent and a feature, assigned so that the mean
            is largest.
    """

    feature: Int[Tensor, " F"]
    cosine: Float[Tensor, " F"]
    composite: Float[Tensor, " F"]
    group: Float[Tensor, " F"]
    mcc: float


MAX_MATCHED = 32_768
"""With more latents and more features than this, the mean matched cosine is NaN."""


def match_directions(
    rows: Float[Tensor, "F D"],
    dictionary: Float[Tensor, "N D"],
    groups: Float[Tensor, "groups rank D"],
    candidates: int = 12,
) -> DirectionMatch:
    """Compare decoder rows with true features, on the CPU.

    Memory: the cosines in float32 and their assignment in float64, 12·F·N bytes.

    Args:
        rows: decoder rows of any length.
        dictionary: the features.
        groups: an orthonormal basis per group.
        candidates: see `nonnegative_cosine`.
    """
    rows, dictionary = unit(rows), unit(dictionary)
    cosines = rows.float() @ dictionary.float().T
    best = cosines.abs().max(dim=1)
    feature = best.indices
    nearest = cosines.topk(min(candidates, len(dictionary)), dim=1).indices
    return DirectionMatch(
        feature=torch.where(rows.any(dim=1), feature, -1),
        cosine=cosines.gather(1, feature[:, None])[:, 0],
        composite=nonnegative_cosine(rows, dictionary, nearest),
        group=_group_norm(rows, groups),
        mcc=matched_cosine(cosines),
    )


def unit(rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Scale the rows to length 1, in float64; a row that is zero or not finite becomes zero."""
    rows = rows.detach().cpu().double()
    rows = torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, 0.0)
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def matched_cosine(cosines: Float[Tensor, "F N"]) -> float:
    """Return the mean |cos| of the best assignment; unmatched rows or columns do not count.

    NaN if both sides have more than `MAX_MATCHED`: scipy's dense solver would take hours.
    """
    if min(cosines.shape) > MAX_MATCHED:
        return float("nan")
    # The solver copies a matrix with more rows than columns.
    square = cosines.T if len(cosines) > cosines.shape[1] else cosines
    cost = square.double().abs_().neg_().numpy()
    i, j = linear_sum_assignment(cost)
    return -float(cost[i, j].mean())


def nonnegative_cosine(
    rows: Float[Tensor, "n D"],
    dictionary: Float[Tensor, "N D"],
    nearest: Int[Tensor, "n candidates"],
) -> Float[Tensor, " n"]:
    """Return the largest cosine of each row with a non-negative sum of at most 3 features.

    This tries every set of 1, 2 or 3 candidates: the unconstrained least-squares fit of a set
    counts if all its coefficients are positive, and the best of these is the non-negative fit
    (features outside the set have coefficient 0). The result is exact over all features if they are
    orthogonal or no more than the candidates. Otherwise a better fit may use another feature, so
    the cosine is a lower bound: a composite can be missed, but none is found wrongly.

    Args:
        rows: rows of length 1, or zero.
        dictionary: rows of length 1.
        nearest: indices of each row's candidates, the features with the largest cosines.
    """
    fits = []
    for row, chosen in zip(rows.split(_BLOCK), nearest.split(_BLOCK), strict=True):
        features = dictionary[chosen]
        gram = features @ features.mT
        fits.append(_best_fit(gram, (features @ row[:, :, None])[:, :, 0]))
    return torch.cat(fits).float()


def _best_fit(
    gram: Float[Tensor, "n candidates candidates"], along: Float[Tensor, "n candidates"]
) -> Float[Tensor, " n"]:
    """Compute the cosine from the features' cosines with each other and with the row.

    For w and all u of length 1 and the fit p = Σ c·u: |p|² = p·w = Σ c·(u·w), so cos(p, w) = |p|.
    """
    best = along.amax(dim=1).clamp(min=0)
    for size in (2, 3):
        if size > along.shape[1]:
            break
        sets = torch.combinations(torch.arange(along.shape[1]), size)
        target = along[:, sets]
        factor, failed = torch.linalg.cholesky_ex(gram[:, sets[:, :, None], sets[:, None, :]])
        coefficients = torch.cholesky_solve(target[..., None], factor)[..., 0]
        # The factor's diagonal is each feature's distance from the span of those before it.
        independent = (factor.diagonal(dim1=-2, dim2=-1) > _DEPENDENT).all(dim=-1)
        allowed = (failed == 0) & independent & (coefficients > 0).all(dim=-1)
        squared = torch.where(allowed, (target * coefficients).sum(dim=-1), 0.0)
        best = torch.maximum(best, squared.clamp(0, 1).sqrt().amax(dim=1))
    return best


def _group_norm(
    rows: Float[Tensor, "n D"], groups: Float[Tensor, "groups rank D"]
) -> Float[Tensor, " n"]:
    count, rank, width = groups.shape
    if count * rank == 0:
        return torch.zeros(len(rows))
    bases = groups.detach().cpu().double().reshape(-1, width)
    return torch.cat(
        [
            (part @ bases.T).unflatten(1, (count, rank)).norm(dim=2).amax(dim=1)
            for part in rows.split(_BLOCK)
        ]
    ).float()
