"""Interface of the contenders, and the settings that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

BATCH = 4_096
LEARNING_RATE = 2e-4
STEPS = 1_000_000
"""Long enough that no schedule changes a value within the benchmark."""

K = 32
L1 = 5.0
"""Coefficient of the L1 penalties, which sum over the latents; inputs have E‖x‖ = √D."""
L0 = 1e-3
"""Coefficient of the L0 penalty that is added to ‖e‖²/D."""
TARGET_L0 = 32.0
THRESHOLD = 1e-3
BANDWIDTH = 1e-3
"""JumpReLU's initial θ and its ε for inputs with E‖x‖² = 1; both are multiplied by √D here."""
PREFIXES = (0.0625, 0.125, 0.25, 0.5, 1.0)
THRESHOLD_RATE = 0.01

FVU_LOSSES = ("topk", "batch_topk", "matryoshka")
"""Architectures whose loss is a fraction of the batch's variance in reseed and sparsify.

Their batches are scaled to a variance of 1 per token, so that this fraction equals the mean squared
error of the other libraries. The batches of the other architectures have E‖x‖ = √D, as their
recipes require.
"""


@dataclass(frozen=True)
class Matched:
    """Settings with which reseed's gradient equals a peer's, up to a factor.

    Attributes:
        sae: options of the architecture's configuration.
        optimizer: arguments of `SAEAdam`.
        factor: the peer's loss as a multiple of reseed's.
        differs: parameters whose gradient differs by design → the reason.
        diverges: reason why weights diverge although all gradients are equal at equal weights.
            With this or `differs`, only the first gradients have to agree.
    """

    sae: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    differs: Mapping[str, str] = field(default_factory=dict)
    diverges: str | None = None


class Contender(ABC):
    """An SAE of some library and its training step.

    Args:
        architecture: a key of `ARCHITECTURES`.

    Parameters and gradients are exchanged under reseed's names and in reseed's shapes: rows of
    W_enc and of W_dec are latents.
    """

    needs: ClassVar[str | None] = None
    """Name of the library's module; None for reseed."""

    module: Any
    """The `torch.nn.Module` with the parameters."""

    @abstractmethod
    def __init__(self, architecture: str, d_in: int, num_latents: int) -> None: ...

    @abstractmethod
    def step(self, x: Any) -> None:
        """Run one training step as the library does it."""

    @abstractmethod
    def loss(self, x: Any) -> Any:
        """Return the scalar that a step on x would differentiate."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return the library's parameters by reseed's names, in the library's shapes."""

    def matched(self, d_in: int, num_latents: int) -> Matched:
        """Return the settings with which reseed does the same work."""
        return Matched()

    def weights(self) -> dict[str, Any]:
        """Return views of the parameters in reseed's shapes."""
        return {name: self._turned(name, p.detach()) for name, p in self.parameters().items()}

    def gradients(self, x: Any) -> tuple[float, dict[str, Any]]:
        """Return the loss of x and its gradient for each parameter, without an update."""
        for parameter in self.module.parameters():
            parameter.grad = None
        loss = self.loss(x)
        loss.backward()
        found = {
            name: self._turned(name, p.grad.clone())
            for name, p in self.parameters().items()
            if p.grad is not None
        }
        for parameter in self.module.parameters():
            parameter.grad = None
        return float(loss.detach()), found

    def copy_from(self, weights: Mapping[str, Any]) -> None:
        """Copy reseed's weights into this contender."""
        for name, own in self.weights().items():
            own.copy_(weights[name])

    def _turned(self, name: str, tensor: Any) -> Any:
        """Return a view of a tensor of a parameter's shape, in reseed's shape."""
        return tensor


class LearnsThreshold(Contender):
    """JumpReLU SAE that learns θ, where reseed learns log θ."""

    def gradients(self, x: Any) -> tuple[float, dict[str, Any]]:
        loss, found = super().gradients(x)
        # ∂L/∂log θ = θ ∂L/∂θ
        found["log_threshold"] *= self.parameters()["log_threshold"].detach()
        return loss, found

    def copy_from(self, weights: Mapping[str, Any]) -> None:
        super().copy_from({**weights, "log_threshold": weights["log_threshold"].exp()})


def scaled(architecture: str, batches: list[Any]) -> list[Any]:
    """Scale the batches to the units that the architecture's loss requires; see `FVU_LOSSES`."""
    if architecture in FVU_LOSSES:
        return [x * (len(x) / (x - x.mean(0)).square().sum()).sqrt() for x in batches]
    norm = sum(float(x.norm(dim=1).mean()) for x in batches) / len(batches)
    return [x * (x.shape[1] ** 0.5 / norm) for x in batches]
