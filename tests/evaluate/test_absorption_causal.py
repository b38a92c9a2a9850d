"""Causal absorption on small models whose attributions are known by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_helpers import codes_of
from torch import Tensor, nn

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.places import Place
from reseed.evaluate.absorption.causal import (
    MARGIN,
    STEPS,
    _sampled,
    integrated_gradient,
    is_absorbed,
    margin,
)
from reseed.evaluate.absorption.projection import Alignment
from reseed.evaluate.words import Prompts

HOOK = Hookpoint("module", 0, "layer")
D = 4


class Small(nn.Module):
    """A model that embeds tokens; the logits at each position read the sum up to it."""

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
    """Make three prompts of two lengths, answer tokens and right classes."""
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [2, 4, 6, 8, 10]])
    prompts = Prompts(tokens, torch.tensor([2, 1, 3]), torch.tensor([4, 3, 4]))
    answers = torch.tensor([[9, 10, 11]] * 2 + [[3, 4, 5]])
    return prompts, answers, torch.tensor([0, 2, 1])


def loaded(model: Small) -> Any:
    return SimpleNamespace(model=model, place=lambda hook: Place(hook.module), is_checking=False)


def head_gradient(model: Small, answers: Tensor, labels: Tensor) -> Tensor:
    """Return the right answer's row minus the mean of the others'."""
    rows = model.head.weight[answers]
    right = rows[torch.arange(len(labels)), labels]
    return right - (rows.sum(1) - right) / (answers.shape[1] - 1)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_linear_models_integrated_gradient_is_its_gradient(batch: int) -> None:
    model, (prompts, answers, labels) = Small(), asked()
    z = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    found = integrated_gradient(loaded(model), HOOK, prompts, answers, labels, z, batch)
    assert torch.allclose(found, head_gradient(model, answers, labels), atol=1e-6)


def test_the_path_removes_the_latents_and_keeps_the_error() -> None:
    """The gradient of Σ x² at a point is 2x·g; its mean over the path is by hand."""
    model, (prompts, answers, labels) = Small(power=2), asked()
    z = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    x = model.embed(prompts.tokens)[torch.arange(3), prompts.word_position]
    shares = [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    mean_point = torch.stack([x - (1 - share) * z for share in shares]).mean(0)
    wanted = 2 * mean_point * head_gradient(model, answers, labels)
    assert len(shares) == STEPS
    found = integrated_gradient(loaded(model), HOOK, prompts, answers, labels, z, 2)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gradients_are_computed_under_no_grad() -> None:
    model, (prompts, answers, labels) = Small(), asked()
    z = torch.ones(3, D)
    found = integrated_gradient(loaded(model), HOOK, prompts, answers, labels, z, 2)
    with torch.no_grad():
        again = integrated_gradient(loaded(model), HOOK, prompts, answers, labels, z, 2)
    assert found.equal(again)


def test_the_margin_by_hand() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0], [0.0, 2.0, 4.0]])
    assert margin(scores, torch.tensor([0, 1])).tolist() == [3.0, 0.0]


CASES = {  # the metric's loss without each latent, the latents' cosines, absorbed
    "one latent carries the metric": ([3, 1], [0.5, 0.5], True),
    "two latents carry the metric": ([3, 2.5], [0.5, 0.5], False),
    "exactly the margin": ([3, 3 - MARGIN], [0.5, 0.5], True),
    "below the margin": ([0.9], [0.5], False),
    "a single latent": ([1.1], [0.5], True),
    "too small a cosine": ([3], [0.01], False),
    "opposite effect": ([-3], [0.5], False),
    "silent latents rank before opposite ones": ([3, -2.5], [0.5, 0.5], True),
    "no latent": ([], [], False),
}


@pytest.mark.parametrize("case", CASES)
def test_is_absorbed_by_hand(case: str) -> None:
    """Every latent has activation 1; row j has its cosine with p = e0, its effect along e_{j+1}."""
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


def test_if_no_latent_is_silent_the_second_may_have_the_opposite_effect() -> None:
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = torch.eye(2)[:1]
    found = is_absorbed(
        codes_of(torch.tensor([[1.0, 1.0]])), torch.tensor([[3.0, -2.5]]), W_dec,
        torch.tensor([0]), Alignment.of(W_dec, p), 0.025,
    )  # fmt: skip
    assert found.tolist() == [False]  # 3 − |−2.5| is below the margin


def test_sample_weights_sum_to_the_number_of_silent_words() -> None:
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
