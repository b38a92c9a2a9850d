"""The causal form on small models whose attributions are known by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reseed.activations.hookpoint import Hookpoint
from reseed.evaluate.absorption.causal import (
    MARGIN,
    STEPS,
    _sampled,
    integrated_gradient,
    is_absorbed,
    margin,
)
from reseed.evaluate.absorption.projection import Alignment
from reseed.evaluate.codes import Codes
from reseed.evaluate.first_letter.prompts import Prompts

HOOK = Hookpoint("module", 0, "layer")
D = 4


class Small(nn.Module):
    """Embeds tokens; the logits at each place read the sum of all places up to it."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(12, D), nn.Identity()
        self.head = nn.Linear(D, 12, bias=False)
        self.power = power
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        seen = self.layer(self.embed(input_ids)).pow(self.power).cumsum(1)
        return SimpleNamespace(logits=self.head(seen)[:, logits_to_keep])


def asked() -> tuple[Prompts, Tensor, Tensor]:
    """Three prompts of two lengths, the answers' tokens, and the right classes."""
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [2, 4, 6, 8, 10]])
    prompts = Prompts(tokens, at=torch.tensor([2, 1, 3]), end=torch.tensor([4, 3, 4]))
    answers = torch.tensor([[9, 10, 11]] * 2 + [[3, 4, 5]])
    return prompts, answers, torch.tensor([0, 2, 1])


def head_gradient(model: Small, answers: Tensor, labels: Tensor) -> Tensor:
    """Right answer's row less the mean of the others'."""
    rows = model.head.weight[answers]
    right = rows[torch.arange(len(labels)), labels]
    return right - (rows.sum(1) - right) / (answers.shape[1] - 1)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_of_a_linear_model_it_is_the_gradient_of_the_metric(batch: int) -> None:
    model, (prompts, answers, labels) = Small(), asked()
    z = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    found = integrated_gradient(model, HOOK, prompts, answers, labels, z, batch)
    assert torch.allclose(found, head_gradient(model, answers, labels), atol=1e-6)


def test_the_path_takes_the_latents_away_and_leaves_the_error() -> None:
    """Of Σ x², the gradient at a point is 2x·g: the mean over the path by hand."""
    model, (prompts, answers, labels) = Small(power=2), asked()
    z = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    x = model.embed(prompts.tokens)[torch.arange(3), prompts.at]
    shares = [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    mean_point = torch.stack([x - (1 - share) * z for share in shares]).mean(0)
    wanted = 2 * mean_point * head_gradient(model, answers, labels)
    assert len(shares) == STEPS
    found = integrated_gradient(model, HOOK, prompts, answers, labels, z, 2)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gradients_are_had_where_none_are_wanted() -> None:
    model, (prompts, answers, labels) = Small(), asked()
    z = torch.ones(3, D)
    found = integrated_gradient(model, HOOK, prompts, answers, labels, z, 2)
    with torch.no_grad():
        again = integrated_gradient(model, HOOK, prompts, answers, labels, z, 2)
    assert found.equal(again)


def test_the_metric_by_hand() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0], [0.0, 2.0, 4.0]])
    assert margin(scores, torch.tensor([0, 1])).tolist() == [3.0, 0.0]


def codes_of(dense: Tensor) -> Codes:
    token, latent = dense.nonzero(as_tuple=True)
    starts = F.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    return Codes(starts, latent, dense[token, latent], dense.shape[1])


CASES = {  # what the metric loses without each latent, their cosines, absorbed
    "one carries it": ([3, 1], [0.5, 0.5], True),
    "two carry it": ([3, 2.5], [0.5, 0.5], False),
    "just enough": ([3, 3 - MARGIN], [0.5, 0.5], True),
    "too little": ([0.9], [0.5], False),
    "the only one": ([1.1], [0.5], True),
    "it does not point that way": ([3], [0.01], False),
    "it speaks against": ([-3], [0.5], False),
    "one for, one against: the silent come between": ([3, -2.5], [0.5, 0.5], True),
    "none": ([], [], False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_absorbed(case: str) -> None:
    """Latents of activation 1; row j has its cosine with p = e0, and its effect along e_{j+1}."""
    losses, cosines, wanted = CASES[case]
    W_dec = torch.zeros(4, 6)
    dense, gradient = torch.zeros(1, 4), torch.zeros(1, 6)
    for j, (loss, cosine) in enumerate(zip(losses, cosines, strict=True)):
        sine = (1 - cosine**2) ** 0.5
        W_dec[j, 0], W_dec[j, j + 1] = cosine, sine
        dense[0, j], gradient[0, j + 1] = 1.0, loss / sine
    p = torch.eye(6)[:1]
    found = is_absorbed(
        codes_of(dense), gradient, W_dec, torch.tensor([0]), Alignment.of(W_dec, p), 0.025
    )
    assert found.tolist() == [wanted]


def test_where_no_latent_is_silent_the_next_is_the_one_against() -> None:
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = torch.eye(2)[:1]
    found = is_absorbed(
        codes_of(torch.tensor([[1.0, 1.0]])), torch.tensor([[3.0, -2.5]]), W_dec,
        torch.tensor([0]), Alignment.of(W_dec, p), 0.025,
    )  # fmt: skip
    assert found.tolist() == [False]  # 3 − |−2.5| is below the margin


def test_a_sample_stands_for_all() -> None:
    silent = torch.tensor([True] * 8 + [False] * 2 + [True] * 3)
    labels = torch.tensor([0] * 10 + [1] * 3)
    kept, weight = _sampled(silent, labels, 4, seed=0)
    assert (labels[kept] == 0).sum() == 4
    assert silent[kept].all()
    assert weight[labels[kept] == 0].tolist() == [2.0] * 4
    assert weight[labels[kept] == 1].tolist() == [1.0] * 3
    assert float(weight.sum()) == int(silent.sum())
    assert _sampled(silent, labels, 4, seed=0)[0].equal(kept)
    nothing, _ = _sampled(torch.zeros(3, dtype=torch.bool), torch.zeros(3).long(), 4, seed=0)
    assert len(nothing) == 0
