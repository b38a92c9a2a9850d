"""Linear probes on activations, and on the few latents that predict a class best.

`train_probe` (recipe of Chanin et al. 2024, public code) trains one-versus-rest probes of all
classes at once: one linear layer, binary cross-entropy with positives weighted n_neg/n_pos, Adam
with a learning rate that falls geometrically by epoch. It computes in float32 for any dtype of the
model. Weights start at zero: the problem is convex, so only the batches' order is random.

`rank_latents` and `fit_nested` (Gurnee et al. 2023, as Chanin et al. 2024 use it): an L1-penalised
probe ranks the latents, then a regression is fitted on the best k for every k.

Shapes: n words, D `d_in`, F latents, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from reseed.evaluate.sparse_latents import SparseLatents

EPOCHS = 50
FIRST_RATE, LAST_RATE = 1e-2, 1e-5
WEIGHT_DECAY = 1e-4
BATCH, STEPS_PER_EPOCH = 4_096, 24
"""Maximum number of words in a batch, and minimum number of steps in an epoch. Without the minimum,
a vocabulary of thousands of words would be one batch, and a probe would train for only 50 steps."""
_RIDGE = 1e-6
"""L2 penalty added to the L1 penalty, as published."""
_TOLERANCE, _MAX_STEPS = 1e-9, 100


@dataclass(frozen=True, eq=False)
class Scores:
    """Agreement of predictions with a class, in [0, 1]; 0 if no positive prediction is right."""

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
        random: generator on the CPU that draws the batches.
    """
    x = x.float()
    weight = torch.zeros(member.shape[1], x.shape[1], device=x.device)
    bias = torch.zeros(member.shape[1], device=x.device)
    optimizer = torch.optim.Adam(
        [weight, bias], lr=FIRST_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    target, ratio = member.to(x.device), positive_weight(member).to(x.device)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch)
        for batch in batches(len(x), random):
            batch = batch.to(x.device)
            error = loss_gradient(x[batch] @ weight.T + bias, target[batch], ratio)
            weight.grad, bias.grad = error.T @ x[batch], error.sum(0)
            optimizer.step()
    return weight, bias


def learning_rate(epoch: int) -> float:
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


def precision_recall_f1(
    predicted: Bool[Tensor, "words ..."], member: Bool[Tensor, "words ..."]
) -> Scores:
    """Compute precision, recall and F1 of predictions, over words."""
    return scores_of((predicted & member).sum(0), predicted.sum(0), member.sum(0))


def scores_of(
    right: Int[Tensor, "*classes"], said: Int[Tensor, "*classes"], there: Int[Tensor, "*classes"]
) -> Scores:
    """Compute the scores from numbers of words.

    Args:
        right: words predicted to be of the class that are.
        said: words predicted to be of the class.
        there: words of the class.
    """
    right = right.double()
    return Scores(
        precision=right / said.clamp(min=1),
        recall=right / there.clamp(min=1),
        f1=2 * right / (said + there).clamp(min=1),
    )


def rank_latents(
    codes: SparseLatents, member: Bool[Tensor, "n C"], l1: float, most: int, random: torch.Generator
) -> Int[Tensor, "C most"]:
    """Rank the latents by (signed) weight in an L1-penalised probe of each class, best first.

    Adam minimises the mean weighted cross-entropy + ``l1``·‖w‖₁ of each class. The words are split
    into batches once and only the batches' order changes between epochs, so that the (word, latent)
    pairs of each batch are sorted once. Weights start at 0; those of latents that no word activates
    stay 0.
    """
    member = member.to(codes.value.device)
    live = codes.live
    compact = SparseLatents(
        codes.starts, torch.searchsorted(live, codes.latent), codes.value, max(1, len(live))
    )
    dealt = torch.randperm(len(codes), generator=random).split(batch_size(len(codes)))
    parts = [compact.rows(rows.to(live.device)) for rows in dealt]
    turned = [part.transposed() for part in parts]
    targets = [member[rows.to(live.device)] for rows in dealt]
    ratio, classes = positive_weight(member), member.shape[1]
    weight = torch.zeros(compact.num_latents, classes, device=live.device)
    bias = torch.zeros(classes, device=live.device)
    optimizer = torch.optim.Adam(
        [weight, bias], lr=learning_rate(0), weight_decay=_RIDGE, fused=True
    )
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch)
        for batch in torch.randperm(len(parts), generator=random).tolist():
            error = loss_gradient(parts[batch].matmul(weight) + bias, targets[batch], ratio)
            # The loss is the mean over classes, and so is the penalty.
            weight.grad = turned[batch].matmul(error).add_(weight.sign(), alpha=l1 / classes)
            bias.grad = error.sum(0)
            optimizer.step()
    full = torch.zeros(codes.num_latents, classes, device=live.device)
    full[live] = weight[: len(live)]
    # The sort is stable: among equal weights (0), the lowest latents come first.
    return full.T.sort(descending=True, stable=True).indices[:, :most].cpu()


@dataclass(frozen=True, eq=False)
class NestedProbe:
    """Logistic regressions on the first 1, 2, … K latents of a list.

    Attributes:
        weight: row k−1 holds the regression on the first k latents, 0 beyond.
        bias: bias of each regression.
    """

    weight: Float[Tensor, "K K"]
    bias: Float[Tensor, " K"]

    def score(self, columns: Float[Tensor, "n K"]) -> Float[Tensor, "n K"]:
        """Return each regression's score of each word; above 0 predicts the class."""
        return columns.double() @ self.weight.T + self.bias


def fit_nested(columns: Float[Tensor, "n K"], member: Bool[Tensor, " n"]) -> NestedProbe:
    """Fit balanced logistic regressions (classes of equal weight) with the penalty ½‖w‖².

    Each regression minimises ½‖w‖² + Σ_i s_i·log(1 + exp(−y_i·(w·f_i + b))), with
    s_i = n/(2·size of i's class), as scikit-learn's ``LogisticRegression(class_weight="balanced")``
    does. Newton's method solves all K together, exactly. Words that activate none of the latents
    are merged into one row per class.

    Raises:
        ValueError: all words or no words are of the class.
    """
    if not 0 < int(member.sum()) < len(member):
        raise ValueError("a regression needs words of the class and words of other classes")
    x, y, weights = _merged(columns.double().cpu(), member.cpu())
    total = columns.shape[1]
    inputs = functional.pad(x, (0, 1), value=1.0)
    # Row k−1 uses the first k columns and the constant.
    used = torch.ones(total, total + 1, dtype=torch.bool).tril()
    used[:, -1] = True
    penalty = used.double()
    penalty[:, -1] = 0
    solution = torch.zeros(total, total + 1, dtype=torch.float64)
    value = _objective(solution, inputs, y, weights, penalty)
    for _ in range(_MAX_STEPS):
        slope = torch.sigmoid(solution @ inputs.T)
        gradient = ((slope - y) * weights) @ inputs + penalty * solution
        gradient = gradient * used
        if float(gradient.abs().max()) <= _TOLERANCE * float(weights.sum()):
            break
        curvature = weights * slope * (1 - slope)
        hessian = torch.einsum("kn,ni,nj->kij", curvature, inputs, inputs)
        hessian = hessian * (used[:, :, None] & used[:, None, :])
        # 1 for unused columns and 1e-12 for the constant make the system solvable.
        hessian += torch.diag_embed(torch.where(used, penalty, 1.0))
        hessian[:, -1, -1] += 1e-12
        step = torch.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        solution, value = _descend(solution, step, value, inputs, y, weights, penalty)
    return NestedProbe(solution[:, :-1].contiguous(), solution[:, -1].contiguous())


def _merged(
    x: Float[Tensor, "n K"], member: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "m K"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return inputs, targets and weights. Words that activate none of the latents are merged into
    one row per class, which leaves the objective unchanged."""
    n, positive = len(member), int(member.sum())
    each = torch.where(member, n / (2 * positive), n / (2 * (n - positive))).double()
    some = x.any(1)
    none = torch.stack([each[~some & member].sum(), each[~some & ~member].sum()])
    return (
        torch.cat([x[some], x.new_zeros(2, x.shape[1])]),
        torch.cat([member[some].double(), torch.tensor([1.0, 0.0], dtype=torch.float64)]),
        torch.cat([each[some], none]),
    )


def _objective(
    solution: Tensor, inputs: Tensor, y: Tensor, weights: Tensor, penalty: Tensor
) -> Float[Tensor, " K"]:
    signed = (1 - 2 * y) * (solution @ inputs.T)
    loss = (weights * functional.softplus(signed)).sum(1)
    return loss + (penalty * solution.square()).sum(1) / 2


def _descend(
    solution: Tensor,
    step: Tensor,
    value: Tensor,
    inputs: Tensor,
    y: Tensor,
    weights: Tensor,
    penalty: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take a Newton step for each regression, halved until the objective does not increase."""
    length = torch.ones(len(solution), 1, dtype=torch.float64)
    for _ in range(40):
        tried = solution - length * step
        found = _objective(tried, inputs, y, weights, penalty)
        worse = found > value
        if not worse.any():
            break
        length = torch.where(worse[:, None], length / 2, length)
    else:
        tried = torch.where(worse[:, None], solution, tried)
        found = torch.where(worse, value, found)
    return tried, found
