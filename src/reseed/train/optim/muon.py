"""Muon: momentum whose singular values are brought near 1 (Jordan et al. 2024).

Muon updates W_enc and W_dec; Adam updates biases, thresholds and everything else. As in sparsify's
trainer the update is orthogonalised Nesterov momentum times 0.2·√(longer side), which gives it the
size of an Adam update (root mean square 0.2 per weight; Liu et al. 2025, 2502.16982), so that the
learning rate does not depend on the width. The iteration runs in float32; sparsify's runs in
bfloat16.

`torch.optim.Muon` has the same update (``adjust_lr_fn="match_rms_adamw"``) but is not used: its
iteration is always in bfloat16, which has 8 significant bits. It also takes
only matrices, so Adam would be a second optimiser with its own clipping and schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.base import SAE
from reseed.train.optim.adam import SAEAdam
from reseed.train.optim.base import normalise_rows

MATRICES = ("W_enc", "W_dec")
STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class SAEMuon(SAEAdam):
    """An optimiser with Muon for the matrices and Adam for the rest.

    Args:
        lr: learning rate of the matrices.
        adam_lr: learning rate of the other parameters; `set_lr` keeps the ratio of the two rates.
        momentum: momentum of the matrices (an exponential mean with Nesterov's look-ahead).
        options: those of `SAEAdam`.
    """

    def __init__(
        self, sae: SAE, lr: float, *, adam_lr: float, momentum: float = 0.95, **options: Any
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}")
        if not adam_lr >= 0:
            raise ValueError(f"`adam_lr` must be at least 0, got {adam_lr}")
        if not lr > 0:
            raise ValueError(f"`lr` must be above 0, got {lr}")
        super().__init__(sae, lr, **options)
        for group in self.param_groups:
            group["momentum"] = momentum
            group["lr_ratio"] = 1.0 if group["name"] in MATRICES else adam_lr / lr
        self.set_lr(lr)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the matrices for the next steps, and Adam's in proportion."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_ratio"]

    def _update(self, groups: list[dict[str, Any]], factor: Tensor | None) -> None:
        for group in groups:
            if group["name"] in MATRICES:
                self._muon(group, factor)
            else:
                self._adam(group, factor)

    def _muon(self, group: dict[str, Any], factor: Tensor | None) -> None:
        parameter = group["params"][0]
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        grad = parameter.grad if factor is None else parameter.grad.mul_(factor)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(state["momentum"], group["momentum"])
        size = 0.2 * max(parameter.shape) ** 0.5
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(orthogonalised(ahead), alpha=group["lr"] * size)
        if self._renormalised(group):
            normalise_rows(parameter)


@torch.no_grad()
def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return U S' Vᵀ for a matrix U S Vᵀ, with S' near 1, by five Newton–Schulz steps.

    The matrix is first divided by its Frobenius norm; each step then applies
    p(s) = 3.4445 s − 4.775 s³ + 2.0315 s⁵ to the singular values. With Jordan's coefficients p is
    steep at 0 and not exact at 1: five steps bring singular values above 1/500 of that norm into
    0.68 … 1.21. A zero matrix stays zero.

    The Gram matrix of the shorter side is used: 2·short²·long + short³ multiplications per step.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(STEPS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if tall else x
