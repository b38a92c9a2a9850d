"""Linear probes: one against the rest, for all classes at once.

n words, D `d_in`, C classes. Recipe of Chanin et al. 2024 (public code): one linear layer, binary
cross-entropy with positives weighted n_neg/n_pos, Adam with a learning rate that falls
geometrically by epoch. Float32 for any dtype of the model. Weights start at zero: the problem is
convex, so only the batches' order is random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPOCHS = 50
FIRST_RATE, LAST_RATE = 1e-2, 1e-5
WEIGHT_DECAY = 1e-4
BATCH, STEPS_PER_EPOCH = 4_096, 24
"""Most words in a batch, and least steps in an epoch: else a vocabulary of thousands would be one
batch, and a probe would train for 50 steps."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Agreement of predictions with a class, each a value in [0, 1]; 0 if nothing is right."""

    precision: Float[Tensor, "*classes"]
    recall: Float[Tensor, "*classes"]
    f1: Float[Tensor, "*classes"]


def train_probe(
    x: Float[Tensor, "n D"], member: Bool[Tensor, "n C"], random: torch.Generator
) -> tuple[Float[Tensor, "C D"], Float[Tensor, " C"]]:
    """Train a probe of every class; return weights and biases.

    Args:
        x: activations, on any device.
        member: membership of words in classes; a class may have no word.
        random: decides the batches; on the CPU.
    """
    x = x.float()
    weight = torch.zeros(member.shape[1], x.shape[1], device=x.device)
    bias = torch.zeros(member.shape[1], device=x.device)
    optimizer = torch.optim.Adam(
        [weight, bias], lr=FIRST_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    target, ratio = member.to(x.device), positive_weight(member).to(x.device)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = rate(epoch)
        for batch in batches(len(x), random):
            batch = batch.to(x.device)
            error = loss_gradient(x[batch] @ weight.T + bias, target[batch], ratio)
            weight.grad, bias.grad = error.T @ x[batch], error.sum(0)
            optimizer.step()
    return weight, bias


def rate(epoch: int) -> float:
    """Return the learning rate: it falls geometrically from `FIRST_RATE` towards `LAST_RATE`."""
    return FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (epoch / EPOCHS)


def batch_size(n: int) -> int:
    """Return the number of words in a batch of a set of n."""
    return max(1, min(BATCH, -(-n // STEPS_PER_EPOCH)))


def batches(n: int, random: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Yield batches of all n indices in a random order."""
    yield from torch.randperm(n, generator=random).split(batch_size(n))


def positive_weight(member: Bool[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """Return n_neg/n_pos; 1 if there are no positives."""
    positive = member.sum(0)
    return torch.where(positive > 0, (len(member) - positive) / positive.clamp(min=1), 1.0)


def loss_gradient(
    score: Float[Tensor, "n C"], target: Bool[Tensor, "n C"], ratio: Float[Tensor, " C"]
) -> Float[Tensor, "n C"]:
    """Return the gradient of the mean weighted cross-entropy with respect to the scores."""
    probability = score.sigmoid()
    return torch.where(target, ratio * (probability - 1), probability) / score.numel()


def agreement(predicted: Bool[Tensor, "words ..."], member: Bool[Tensor, "words ..."]) -> Scores:
    """Compute precision, recall and F1 of predictions, over words."""
    right = (predicted & member).sum(0).double()
    said, there = predicted.sum(0), member.sum(0)
    return Scores(
        precision=right / said.clamp(min=1),
        recall=right / there.clamp(min=1),
        f1=2 * right / (said + there).clamp(min=1),
    )
