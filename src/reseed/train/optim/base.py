"""The optimiser of one SAE, the order of its steps, and the constraints on its weights.

This is the only place that defines the order of one step:

1. With a unit-norm decoder, the component of each decoder row's gradient that is parallel to the
   row is removed (Bricken et al. 2023).
2. The global norm over all (projected) gradients of this SAE is clipped.
3. Weights decay (decoupled, as in AdamW), then the update: `SAEAdam` (``adam.py``), `SAESignSGD`
   (``sign_sgd.py``), `SAEMuon` (``muon.py``).
4. With a unit-norm decoder, decoder rows are scaled back to norm 1.
5. `Constraints` are applied, as they are before the first step: mixtures of archetypes are
   projected to the simplex and their relaxation into its ball; in aligned training E_j · d_j is
   set to 1, last, because it needs the final decoder.

Projection precedes clipping, as in dictionary_learning: a component that will not be applied should
not count in the norm. sparsify projects and does not clip. Steps 1 and 4 skip an archetypal
decoder, which is unit by construction. A schedule-free optimiser holds three sets of weights (see
``sign_sgd.py``); 4 and 5 apply to each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.base import SAE
from reseed.train.archetypes import archetypal_decoder

BLOCK_BYTES = 4 * 2**20
"""Size of the blocks of rows that are projected, updated and renormalised together, so that they
stay in the cache."""


class SAEOptimizer(torch.optim.Optimizer, ABC):
    """Base class of optimisers of one SAE, for all its parameters that require a gradient.

    On the CPU repeated or resumed steps are bit-identical, because `state_dict` is complete.

    Args:
        sae: the module whose parameters are updated.
        lr: learning rate; `set_lr` changes it.
        defaults: further entries of every group.
        encoder_weight_decay, decoder_weight_decay: decoupled decay of W_enc and of W_dec.
        max_grad_norm: maximum global norm of the gradients; None: no clipping.
        unit_norm_decoder: hold decoder rows at norm 1; None: as in the SAE's config.
        train_b_dec: if False, b_dec keeps its current value.
        aligned: hold E_j · d_j = 1 for every latent.

    Attributes:
        grad_norm: global norm before clipping at the last step; None without clipping.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float,
        defaults: dict[str, Any],
        *,
        encoder_weight_decay: float = 0.0,
        decoder_weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        unit_norm_decoder: bool | None = None,
        train_b_dec: bool = True,
        aligned: bool = False,
    ) -> None:
        _check(lr, encoder_weight_decay, decoder_weight_decay, max_grad_norm)
        if not train_b_dec:
            sae.b_dec.requires_grad_(False)
        decays = {"W_enc": encoder_weight_decay, "W_dec": decoder_weight_decay}
        groups = [
            {"params": [parameter], "name": name, "weight_decay": decays.get(name, 0.0)}
            for name, parameter in sae.named_parameters()
            if parameter.requires_grad
        ]
        super().__init__(groups, {"lr": lr, **defaults, "weight_decay": 0.0})
        self.max_grad_norm = max_grad_norm
        if unit_norm_decoder is None:
            unit_norm_decoder = sae.config.unit_norm_decoder
        self.unit_norm_decoder = unit_norm_decoder
        self.constraints = Constraints(sae, aligned=aligned)
        self.grad_norm: Tensor | None = None

    @abstractmethod
    def _update(self, groups: list[dict[str, Any]], factor: Tensor | None) -> None:
        """Do points 3 and 4 of a step for these groups, one parameter each.

        Args:
            factor: clipping factor of the gradients; None: no clipping.
        """

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return, by name, the weights that are measured and stored in place of the parameters."""
        return {}

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take one step with the present gradients; parameters without a gradient do not change."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        groups = [group for group in self.param_groups if group["params"][0].grad is not None]
        if groups:
            # Lightning may call this under its autocast, which must not apply to an update.
            with torch.autocast(groups[0]["params"][0].device.type, enabled=False):
                self._step(groups)
        return result

    def _step(self, groups: list[dict[str, Any]]) -> None:
        if self.unit_norm_decoder:
            for group in groups:
                if group["name"] == "W_dec":
                    _remove_parallel(group["params"][0])
        self.grad_norm, factor = self._clip(groups)
        self._update(groups, factor)
        self._constrain()

    def _constrain(self) -> None:
        self.constraints.project({g["name"]: g["params"][0] for g in self.param_groups})

    def _clip(self, groups: list[dict[str, Any]]) -> tuple[Tensor | None, Tensor | None]:
        """Return the global gradient norm and the factor that clips it."""
        if self.max_grad_norm is None or not groups:
            return None, None
        norms = [torch.linalg.vector_norm(group["params"][0].grad) for group in groups]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        return norm, (self.max_grad_norm / (norm + 1e-6)).clamp_max_(1.0)

    def _renormalised(self, group: dict[str, Any]) -> bool:
        return self.unit_norm_decoder and group["name"] == "W_dec"


def _check(
    lr: float,
    encoder_weight_decay: float,
    decoder_weight_decay: float,
    max_grad_norm: float | None,
) -> None:
    not_negative = {
        "lr": lr,
        "encoder_weight_decay": encoder_weight_decay,
        "decoder_weight_decay": decoder_weight_decay,
    }
    for name, value in not_negative.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be at least 0, got {value}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be above 0 or None, got {max_grad_norm}")


class Constraints:
    """The constraints of one SAE other than the unit norm, for any set of its weights.

    Args:
        sae: the SAE; an archetypal decoder must be in place already.
        aligned: hold E_j · d_j = 1 (see `align_rows`).
    """

    def __init__(self, sae: SAE, *, aligned: bool) -> None:
        self.archetypal = archetypal_decoder(sae)
        self.aligned = aligned

    @torch.no_grad()
    def project(self, weights: Mapping[str, Tensor]) -> None:
        """Project weights onto the constraints, in place.

        Args:
            weights: by the names of the SAE's parameters; frozen ones may be missing.
        """
        if self.archetypal is not None:
            self.archetypal.project(weights)
        if self.aligned:
            decoder = self.archetypal.decoder(weights) if self.archetypal else weights["W_dec"]
            align_rows(weights["W_enc"], decoder)


@torch.no_grad()
def normalise_rows(rows: Float[Tensor, "rows d_in"]) -> None:
    """Scale each row to norm 1, in place. A zero row does not change."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows.div_(norms.clamp_min_(torch.finfo(rows.dtype).tiny))


@torch.no_grad()
def align_rows(
    encoder: Float[Tensor, "num_latents d_in"], decoder: Float[Tensor, "num_latents d_in"]
) -> None:
    """Set E_j ← E_j + (1 − E_j·d_j) d_j/‖d_j‖², in place: the nearest E_j with E_j · d_j = 1.

    In aligned training (Brzozowski & Chung 2026, 2605.18629) a parametrisation of the encoder gives
    the same constraint; here the encoder is projected onto it after each step. The component of E_j
    orthogonal to d_j does not change. If d_j is zero no such E_j exists, and E_j does not change.
    """
    squared = decoder.square().sum(1, keepdim=True)
    missing = 1 - torch.linalg.vecdot(encoder, decoder)[:, None]
    encoder.addcmul_(decoder, missing / squared.clamp_min(torch.finfo(squared.dtype).tiny))


def _remove_parallel(decoder: Tensor) -> None:
    """Set g ← g − (g·d) d for rows d of norm 1, in place."""
    assert decoder.grad is not None
    for rows in row_blocks(decoder):
        block, grad = decoder[rows], decoder.grad[rows]
        parallel = torch.linalg.vecdot(grad, block)[:, None]
        grad.addcmul_(parallel, block, value=-1)


def row_blocks(parameter: Tensor) -> Iterator[slice]:
    """Yield the rows of a parameter in blocks of `BLOCK_BYTES`; on a GPU, all rows at once."""
    if parameter.device.type != "cpu" or parameter.ndim < 2:
        yield slice(None)
        return
    rows = max(1, BLOCK_BYTES // (parameter.shape[1] * parameter.element_size()))
    for start in range(0, len(parameter), rows):
        yield slice(start, start + rows)
