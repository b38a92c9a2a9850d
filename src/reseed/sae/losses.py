"""Terms and schedules that several losses share.

The file defines measures of error and the warm-up of a penalty; AuxK, by which dead latents learn
to reconstruct the error of the other latents (Gao et al. 2024, 2406.04093); and `PenaltySteering`,
a controller that steers a penalty weight towards a target L0 during training. A steered run gives
the first guess of a calibration (`reseed.study.calibrate`), from any initial weight. It is never
compared with other runs, because its penalty weight changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.distributed.process_group import shared_variance
from reseed.sae import kernels
from reseed.sae.base import SAE
from reseed.sae.sparse import sparse_decode, topk_encode
from reseed.system.rounding import above_rounding


def total_variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Return Σ‖x − x̄‖² over the batch: the squared error of predicting the batch's own mean.

    If several ranks share the batch, each gets an equal share of the whole batch's sum
    (`reseed.distributed.process_group`).
    """
    if kernels.supports(x) and not x.requires_grad and len(x):
        own = kernels.total_variance(x)
    else:
        own = (x - x.mean(0)).square_().sum()
    return shared_variance(x, own)


def has_variance(x: Float[Tensor, "batch d_in"], variance: Float[Tensor, ""]) -> Bool[Tensor, ""]:
    """Return whether a variance of the size of ``variance`` is above the rounding of ``x``."""
    return above_rounding(variance, torch.linalg.vector_norm(x.detach()) ** 2, x.dtype)


def variance_or_nan(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Return `total_variance`, or NaN if the rows are equal up to rounding.

    A loss relative to it is then NaN, so that the run ends (`reseed.train.run_state`).
    """
    variance = total_variance(x)
    return torch.where(has_variance(x, variance), variance, torch.nan)


def fvu(squared_error: Float[Tensor, ""], variance: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the fraction of variance unexplained: 0 for the identity, 1 for the mean."""
    return squared_error / variance


def ratio_or_zero(
    numerator: Float[Tensor, ""], denominator: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return ``numerator / denominator``, or 0 (gradient 0, never NaN) if that is not finite."""
    # Autograd differentiates both sides of a `where`, so the division itself must be safe.
    sound = (denominator > 0) & torch.isfinite(numerator) & torch.isfinite(denominator)
    safe = torch.where(sound, denominator, 1.0)
    return torch.where(sound, numerator / safe, 0.0)


def warmup_factor(index: int, total: int, fraction: float) -> float:
    """Return a factor that rises linearly from 0 to 1 over ``fraction`` of the steps, then is 1."""
    steps = fraction * total
    return 1.0 if steps <= 0 else min(1.0, index / steps)


DENSE_UP_TO = 4
"""Maximum number of dead latents, in units of k_aux, for which dense products are faster than sums
over pairs."""


def auxk_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " num_latents"],
    *,
    centred: bool = True,
    weights: Float[Tensor, " num_latents"] | None = None,
) -> Float[Tensor, ""]:
    """Return ‖ê − e‖² over the variance of e, ê from the k_aux largest *dead* latents (App. A.2).

    With `aux_denominator=input` the denominator is the variance of x. The loss is 0 if the
    denominator is not above the rounding of x. By default the loss is multiplied by
    min(dead / k_aux, 1) (`aux_scale`).

    The error is a constant here. Only dead rows (of encoder and decoder) get a gradient, and only
    where ReLU(W_enc (x − b_dec) + b_enc) is above 0.

    Args:
        error: e, detached.
        centred: subtract b_dec before the encoder, as the architecture does.
        weights: weights by which latents are chosen, as in `topk_encode`.
    """
    candidates = dead.nonzero().squeeze(1)
    if len(candidates) == 0:
        return error.new_zeros(())
    k_aux = sae.config.k_aux or max(1, sae.d_in // 2)
    b_dec = sae.b_dec.detach() if centred else None
    k = min(k_aux, len(candidates))
    if len(candidates) <= DENSE_UP_TO * k_aux:
        found = _dense(sae, x if b_dec is None else x - b_dec, candidates, k, weights)
    else:
        latents = topk_encode(
            x, sae.W_enc, sae.b_enc, k, b_dec=b_dec, among=candidates, weights=weights
        )
        found = sparse_decode(latents, sae.W_dec)
    miss = (found - error).square().sum()
    variance = total_variance(x.detach() if sae.config.aux_denominator == "input" else error)
    # The error of a reconstruction that is right up to rounding is rounding of x.
    variance = torch.where(has_variance(x, variance), variance, 0.0)
    scale = min(len(candidates) / k_aux, 1.0) if sae.config.aux_scale == "dead_fraction" else 1.0
    return scale * ratio_or_zero(miss, variance)


def _dense(
    sae: SAE,
    rows: Float[Tensor, "batch d_in"],
    candidates: Int[Tensor, " dead"],
    k: int,
    weights: Float[Tensor, " num_latents"] | None,
) -> Float[Tensor, "batch d_in"]:
    """Return ê by dense products of the dead latents alone."""
    latents = nn_functional.linear(rows, sae.W_enc[candidates], sae.b_enc[candidates]).relu()
    if k < len(candidates):
        choice = latents.detach() if weights is None else latents.detach() * weights[candidates]
        kept = torch.zeros_like(choice).scatter_(1, choice.topk(k, dim=1).indices, 1.0)
        latents = latents * kept
    return latents @ sae.W_dec[candidates]


def auxk_term(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " num_latents"],
    *,
    per: int,
    centred: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return α·AuxK for a loss whose reconstruction term is Σ‖e‖²/``per``, and AuxK itself.

    In TopK, AuxK and the reconstruction term are both relative to a variance. Here AuxK is
    multiplied by the batch's variance in the units of this loss, so that α has the same meaning.
    """
    aux = auxk_loss(sae, x, error.detach(), dead, centred=centred)
    return sae.config.aux_alpha * aux * (total_variance(x.detach()) / per), aux


BEGIN, HOLD = 0.1, 0.8
"""Fractions of the run between which the weight changes: after the warm-ups, before the decay."""
AVERAGED = 0.3
"""The final weight is the geometric mean over this fraction of the run before `HOLD`."""
GAIN = 8.0
"""Integral gain: a deviation of 1 in log L0 changes log λ by this much over a whole run."""


@dataclass
class PenaltySteering:
    """An integral controller on log L0, whose deviation is clipped to ±1.

    Attributes:
        target: the target L0.
        steps: length of the run.
        log_weight: log λ of the next step.
        sum, count: sum of log λ over the averaged steps, and their number.
    """

    target: float
    steps: int
    log_weight: float
    sum: float = 0.0
    count: int = 0

    @property
    def weight(self) -> float:
        """λ of the next step."""
        return math.exp(self.log_weight)

    def observe(self, index: int, l0: float) -> None:
        """Update the weight by the L0 of step ``index`` (0-based), made with the current weight."""
        begin, hold = round(BEGIN * self.steps), round(HOLD * self.steps)
        if not begin <= index < hold:
            return
        # An L0 of 0 has no logarithm; any small value does, because the deviation is bounded.
        deviation = math.log(max(l0, 1e-6) / self.target)
        self.log_weight += GAIN / self.steps * max(-1.0, min(1.0, deviation))
        if index >= hold - round(AVERAGED * self.steps):
            self.sum += self.log_weight
            self.count += 1
        if index == hold - 1 and self.count:
            self.log_weight = self.sum / self.count
