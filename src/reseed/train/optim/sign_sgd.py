"""Schedule-free sign descent, the optimiser of most public SAEs that have several seeds.

sparsify's trainer calls it signum. It is SignSGD (Bernstein et al. 2018, 1802.04434) inside the
wrapper of *The Road Less Scheduled* (Defazio et al. 2024, 2405.15682), with momentum 0.95, no
warm-up and no decay. Three sets of weights, equal at the start, are updated together:

    y = (1 − β) z + β x                     the parameters, at which the gradient is taken
    z ← z − η (sign(∂L/∂y) + λ y)           the fast weights; λ is the weight decay
    x ← (1 − c) x + c z,  c = η²_max / Σ η²_max     the mean of z, which is measured and stored

η_max is the largest rate so far, so that after a warm-up every z has the same weight.

Constraints are applied to each of the three sets, because each must be an SAE of the declared kind:
to z after its step, to x after its mean, and to y last. (sparsify renormalises the decoder of y,
and through it x, before each batch; the norms of z are not bounded, and the norms of stored rows
are not exactly 1.) Clipping has no effect on the sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reseed.sae.base import SAE
from reseed.train.optim.base import SAEOptimizer, normalise_rows


class SAESignSGD(SAEOptimizer):
    """The optimiser of schedule-free sign descent.

    Args:
        lr: η; it may warm up but must not decay (the mean replaces the decay).
        momentum: β.
        options: those of `SAEOptimizer`.
    """

    def __init__(self, sae: SAE, lr: float, *, momentum: float = 0.95, **options: Any) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}")
        super().__init__(
            sae, lr, {"momentum": momentum, "lr_max": 0.0, "weight_sum": 0.0}, **options
        )

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return x, by name, for every parameter that has been updated."""
        return self._all("x", [g for g in self.param_groups if self.state[g["params"][0]]])

    def _update(self, groups: list[dict[str, Any]], factor: Tensor | None) -> None:
        for group in groups:
            self._descend(group)
        self._hold("z", groups)
        for group in groups:
            self._average(group)
        self._hold("x", groups)
        for group in groups:
            parameter = group["params"][0]
            state = self.state[parameter]
            torch.lerp(state["x"], state["z"], 1 - group["momentum"], out=parameter)
            if self._renormalised(group):
                normalise_rows(parameter)

    def _descend(self, group: dict[str, Any]) -> None:
        parameter = group["params"][0]
        state = self.state[parameter]
        if not state:
            state["z"], state["x"] = parameter.clone(), parameter.clone()
        if group["weight_decay"]:
            state["z"].sub_(parameter, alpha=group["lr"] * group["weight_decay"])
        state["z"].sub_(parameter.grad.sign(), alpha=group["lr"])

    def _average(self, group: dict[str, Any]) -> None:
        state = self.state[group["params"][0]]
        group["lr_max"] = max(group["lr"], group["lr_max"])
        weight = group["lr_max"] ** 2
        group["weight_sum"] += weight
        if weight > 0:
            state["x"].lerp_(state["z"], weight / group["weight_sum"])

    def _hold(self, which: str, groups: list[dict[str, Any]]) -> None:
        """Do points 4 and 5 of a step (``base.py``) for one of the three sets."""
        for group in groups:
            if self._renormalised(group):
                normalise_rows(self.state[group["params"][0]][which])
        self.constraints.project(self._all(which, self.param_groups))

    def _all(self, which: str, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return, by name, z or x of these groups; before the first step, the parameter itself."""
        parameters = {group["name"]: group["params"][0] for group in groups}
        return {name: self.state[p].get(which, p) for name, p in parameters.items()}
