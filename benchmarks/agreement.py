"""Check that reseed and a peer do the same work: loss, gradients and weights from the same start.

For each peer, reseed is configured by its `Matched`, and the peer gets reseed's weights. Then

1. the loss of a batch and its gradient for every parameter have to be equal, up to a factor;
2. the weights after eight steps of each library's own training have to be equal.

If a peer's formulation differs by design (`Matched` has the reason), the gradients concerned are
left out of the first comparison, and the second is shown but not required.

Adam's first steps have full size whatever the size of the gradient. If one of the 25 million
gradients is only rounding error, or the k-th latent and the next are equal to the last bits, then
summing in another order moves a weight by up to a step. So a few rows may differ.
"""

from __future__ import annotations

from typing import Any

from contenders import ARCHITECTURES
from contenders.base import Contender, Matched
from contenders.ours import Reseed, ReseedClipped

STEPS = 8
SAME_ROW = 1e-5
"""Relative difference up to which a row of weights counts as equal."""
AGREEING_ROWS = 0.99
SAME_IN_ALL = 1e-4
SAME_GRADIENT = 1e-4
"""Relative difference up to which a loss, or a whole gradient, counts as equal."""


def compare(
    architecture: str, name: str, size: tuple[int, int], batches: list[Any]
) -> dict[str, Any]:
    """Measure how far one peer is from reseed.

    Raises:
        SystemExit: they differ where they should agree.
    """
    peer = ARCHITECTURES[architecture][name](architecture, *size)
    matched = peer.matched(*size)
    ours = ReseedClipped(architecture, *size, matched.sae, matched.optimizer)
    ours.start(batches[0])
    peer.copy_from(ours.weights())
    start = _start(ours, peer, matched, batches[0])
    for index in range(STEPS):
        ours.step(batches[index % len(batches)])
        peer.step(batches[index % len(batches)])
    reasons = {"differs": dict(matched.differs), "diverges": matched.diverges}
    result = {**start, **reasons, **_weights(ours, peer, matched)}
    _check(architecture, name, result)
    return result


def _start(ours: Reseed, peer: Contender, matched: Matched, x: Any) -> dict[str, Any]:
    """Return the relative differences of the first loss and its gradients."""
    loss, gradients = ours.gradients(x)
    expected_loss, expected = peer.gradients(x)
    assert set(gradients) == set(expected), (set(gradients), set(expected))
    return {
        "loss": abs(matched.factor * loss / expected_loss - 1),
        "gradients": {
            parameter: float(
                (matched.factor * gradient - expected[parameter]).norm()
                / expected[parameter].norm()
            )
            for parameter, gradient in gradients.items()
        },
    }


def _weights(ours: Reseed, peer: Contender, matched: Matched) -> dict[str, float]:
    """Return the relative difference of all weights, and the fraction of rows that are equal."""
    expected = peer.weights()
    rows, total = [], []
    for name, tensor in ours.weights().items():
        if name == "log_threshold":  # peers store θ itself
            tensor = tensor.exp()
        difference = tensor - expected[name]
        total.append(float(difference.norm() / expected[name].norm()))
        if tensor.ndim == 2:
            rows.append(difference.norm(dim=1) / expected[name].norm(dim=1))
    same = min(float((row < SAME_ROW).double().mean()) for row in rows)
    return {"weights": max(total), "rows": same}


def _check(architecture: str, name: str, result: dict[str, Any]) -> None:
    far = {
        parameter: f"{distance:.0e}"
        for parameter, distance in result["gradients"].items()
        if parameter not in result["differs"] and not distance <= SAME_GRADIENT
    }
    if far or not result["loss"] <= SAME_GRADIENT:
        raise SystemExit(
            f"{architecture}: not the same work: at the same weights the loss differs from "
            f"{name}'s by {result['loss']:.0e}, gradients by {far}"
        )
    if result["differs"] or result["diverges"]:
        return
    if not (result["rows"] >= AGREEING_ROWS and result["weights"] <= SAME_IN_ALL):
        raise SystemExit(
            f"{architecture}: not the same work: after {STEPS} steps {result['rows']:.2%} of the "
            f"rows agree with {name}'s within {SAME_ROW:.0e}, all weights within "
            f"{result['weights']:.0e}"
        )


def told(name: str, result: dict[str, Any]) -> str:
    """Describe a result in words."""
    differs, gradients = result["differs"], result["gradients"]
    furthest = max(value for key, value in gradients.items() if key not in differs)
    lines = [
        f"{name}: at the same weights loss within {result['loss']:.0e}, gradients within "
        f"{furthest:.0e}; after {STEPS} steps {result['rows']:.2%} of the rows within "
        f"{SAME_ROW:.0e}, all weights within {result['weights']:.0e}"
    ]
    for reason in dict.fromkeys(differs.values()):
        apart = [f"{key} by {gradients[key]:.0e}" for key in differs if differs[key] == reason]
        lines.append(f"  gradients not expected to agree, {', '.join(apart)}: {reason}")
    if result["diverges"]:
        lines.append(f"  weights not expected to agree: {result['diverges']}")
    return "\n".join(lines)
