"""Adam (Kingma & Ba 2015) for one SAE, in a compiled loop where the kernels support it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from reseed.sae import kernels
from reseed.sae.base import SAE
from reseed.train.optim.base import SAEOptimizer, normalise_rows, row_blocks


class SAEAdam(SAEOptimizer):
    """The Adam optimiser (Kingma & Ba 2015).

    Args:
        lr: learning rate, also settable as ``param_groups[i]["lr"]`` or by `set_lr`.
        betas, eps: Adam's parameters.
        options: those of `SAEOptimizer`.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be in [0, 1), got {betas}")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"`eps` must be at least 0, got {eps}")
        super().__init__(sae, lr, {"betas": betas, "eps": eps}, **options)

    def _step(self, groups: list[dict[str, Any]]) -> None:
        tensors = [tensor for g in groups for tensor in (g["params"][0], g["params"][0].grad)]
        if kernels.supports(*tensors) and all(tensor.is_contiguous() for tensor in tensors):
            states = [self._state_of(group["params"][0]) for group in groups]
            renormalised = [self._renormalised(group) for group in groups]
            self.grad_norm = kernels.adam_step(groups, states, renormalised, self.max_grad_norm)
            self._constrain()
        else:
            super()._step(groups)

    def _update(self, groups: list[dict[str, Any]], factor: Tensor | None) -> None:
        for group in groups:
            self._adam(group, factor)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _adam(self, group: dict[str, Any], factor: Tensor | None) -> None:
        parameter = group["params"][0]
        state = self._state_of(parameter)
        renormalise = self._renormalised(group)
        beta1, beta2 = group["betas"]
        for rows in row_blocks(parameter):
            block, grad = parameter[rows], parameter.grad[rows]
            if factor is not None:
                grad.mul_(factor)
            if group["weight_decay"]:
                block.mul_(1 - group["lr"] * group["weight_decay"])
            adam(
                [block],
                [grad],
                [state["exp_avg"][rows]],
                [state["exp_avg_sq"][rows]],
                [],
                [state["step"].clone()],  # a copy, because `adam` increments it at every block
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            if renormalise:
                normalise_rows(block)
        state["step"] += 1
