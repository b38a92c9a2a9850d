"""Sparse codes, probes on them, and the main latents of a class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import codes_of, words_of
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from reseed.evaluate.probes import (
    batch_size,
    fit_nested,
    learning_rate,
    loss_gradient,
    positive_weight,
    precision_recall_f1,
    rank_latents,
    train_probe,
)
from reseed.evaluate.sparse_latents import encode
from reseed.evaluate.splitting import choose_main, find_splits
from reseed.evaluate.word_split import Fold, make_folds, split_words
from reseed.sae import base
from reseed.sae.relu import ReLUConfig


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(n: int, latents: int, seed: int = 0, density: float = 0.2) -> Tensor:
    random = seeded(seed)
    fires = torch.rand(n, latents, generator=random) < density
    return fires * torch.rand(n, latents, generator=random)


# Codes against dense tensors.


def test_codes_equal_the_saes_dense_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = ReLUConfig(num_latents=30).build(6, seeded())
    x = torch.randn(50, 6, generator=seeded(1))
    x[7] = 0  # no latent fires
    dense = sae.encode(x)
    whole = encode(sae, x)
    assert whole.columns(torch.arange(30)).equal(dense)
    monkeypatch.setattr(base, "DENSE_BYTES", 4 * 30 * 8)
    in_blocks = encode(sae, x)
    assert in_blocks.latent.equal(whole.latent)
    assert in_blocks.starts.equal(whole.starts)
    assert not whole.value.is_inference()


def test_operations_on_codes_equal_those_on_dense_tensors() -> None:
    dense = sparse(40, 12)
    dense[[0, 5]] = 0
    dense[:, 4] = 0
    codes = codes_of(dense)
    matrix = torch.randn(12, 3, generator=seeded(1))
    assert len(codes) == 40
    assert torch.allclose(codes.matmul(matrix), dense @ matrix, atol=1e-6)
    chosen = np.array([5, 3, 3, 39, 0])
    assert codes.rows(chosen).columns(torch.arange(12)).equal(dense[chosen])
    assert codes.columns(torch.tensor([7, 2])).equal(dense[:, [7, 2]])
    turned = codes.transposed()
    assert turned.columns(torch.arange(40)).equal(dense.T)
    assert codes.live.tolist() == dense.any(0).nonzero()[:, 0].tolist()
    best = codes.top_pairs(codes.value, 2)
    for i, pairs in enumerate(best.tolist()):
        wanted = sorted(dense[i][dense[i] > 0].tolist(), reverse=True)[:2]
        assert [float(codes.value[p]) for p in pairs if p >= 0] == wanted
    some = codes.top_pairs(codes.value, 1, codes.latent == 3)[:, 0]
    assert ((some >= 0) == (dense[:, 3] > 0)).all()


def test_operations_work_on_codes_without_any_pair() -> None:
    codes = codes_of(torch.zeros(3, 5))
    assert codes.matmul(torch.ones(5, 2)).tolist() == [[0.0, 0.0]] * 3
    assert codes.top_pairs(codes.value, 2).tolist() == [[-1, -1]] * 3
    assert codes.columns(torch.tensor([1])).tolist() == [[0.0]] * 3


# Probes.


def test_the_gradient_equals_that_of_torchs_loss() -> None:
    random = seeded()
    score = torch.randn(20, 4, generator=random, requires_grad=True)
    target = torch.rand(20, 4, generator=random) < 0.3
    ratio = positive_weight(target)
    assert ratio.tolist() == pytest.approx(((~target).sum(0) / target.sum(0)).tolist())
    F.binary_cross_entropy_with_logits(score, target.float(), pos_weight=ratio).backward()
    assert score.grad is not None
    assert torch.allclose(loss_gradient(score.detach(), target, ratio), score.grad, atol=1e-7)


def test_a_class_without_words_gives_finite_probes() -> None:
    member = torch.tensor([[True, False], [False, False]] * 40)
    x = torch.where(member[:, :1], 1.0, -1.0)
    weight, bias = train_probe(x, member, seeded())
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    scores = precision_recall_f1(x @ weight.T + bias > 0, member)
    assert scores.f1.tolist() == [1, 0]
    assert scores.precision.tolist() == [1, 0]
    assert scores.recall.tolist() == [1, 0]


def test_the_rate_falls_geometrically_and_batches_shrink_with_the_set() -> None:
    assert learning_rate(0) == 1e-2
    assert learning_rate(25) / learning_rate(0) == pytest.approx((1e-5 / 1e-2) ** 0.5)
    assert [batch_size(n) for n in (1, 240, 3_800, 100_000)] == [1, 10, 159, 4_096]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probes_are_float32_and_find_the_classes_directions(dtype: torch.dtype) -> None:
    random = seeded()
    labels = torch.randint(3, (1_200,), generator=random)
    centres = 3 * torch.eye(8)[:3]
    x = (centres[labels] + torch.randn(1_200, 8, generator=random)).to(dtype)
    member = F.one_hot(labels, 3).bool()
    weight, bias = train_probe(x, member, seeded())
    assert weight.dtype == torch.float32
    assert precision_recall_f1(x.float() @ weight.T + bias > 0, member).f1.min() > 0.85
    assert weight.argmax(1).tolist() == [0, 1, 2]
    again, _ = train_probe(x, member, seeded())
    assert again.equal(weight)


def test_scores_by_hand() -> None:
    predicted = torch.tensor([[True], [True], [True], [False]])
    member = torch.tensor([[True], [False], [True], [True]])
    scores = precision_recall_f1(predicted, member)
    assert (scores.precision.item(), scores.recall.item()) == pytest.approx((2 / 3, 2 / 3))
    assert scores.f1.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_nested_regressions_equal_scipys_minimum(density: float) -> None:
    """scipy minimises the same objective over all words by another method."""
    columns = sparse(300, 4, density=density).double() * torch.tensor([1, 30, 5, 0.1])
    noise = torch.randn(300, generator=seeded(5), dtype=torch.float64)
    member = columns[:, 0] + columns[:, 1] / 20 + 0.4 * noise > 0.6
    found = fit_nested(columns, member)
    positive = int(member.sum())
    weights = np.where(member, 300 / (2 * positive), 300 / (2 * (300 - positive)))
    sign = np.where(member, 1, -1)
    for k in range(1, 5):
        x = columns[:, :k].numpy()

        def objective(w: np.ndarray, x: np.ndarray = x) -> float:
            margin = sign * (x @ w[:-1] + w[-1])
            return w[:-1] @ w[:-1] / 2 + (weights * np.logaddexp(0, -margin)).sum()

        best = minimize(objective, np.zeros(k + 1), method="BFGS", options={"gtol": 1e-8})
        own = np.append(found.weight[k - 1, :k].numpy(), found.bias[k - 1])
        assert objective(own) <= best.fun + 1e-9
        assert own == pytest.approx(best.x, abs=1e-4)
        assert (found.weight[k - 1, k:] == 0).all()
    scores = found.score(columns)
    assert scores[:, 1].tolist() == pytest.approx(
        (columns[:, :2] @ found.weight[1, :2] + found.bias[1]).tolist()
    )


def test_regressions_are_undecided_on_silent_latents_and_exact_on_perfect_ones() -> None:
    member = torch.tensor([True] * 5 + [False] * 20)
    silent = fit_nested(torch.zeros(25, 2), member)
    assert silent.score(torch.zeros(1, 2)).abs().max() < 1e-6  # balanced: undecided
    columns = torch.where(member, 2.0, 0.0)[:, None]
    told = fit_nested(columns, member)
    assert ((told.score(columns)[:, 0] > 0) == member).all()
    with pytest.raises(ValueError, match="words of the class and words of other classes"):
        fit_nested(columns, torch.ones(25, dtype=torch.bool))


def test_ranking_by_signed_weight() -> None:
    """The latent that fires on the class comes first, the one that fires on all others last. The
    weight of an uninformative latent is about 0, of a silent one exactly 0."""
    random = seeded()
    labels = torch.randint(4, (2_000,), generator=random)
    member = F.one_hot(labels, 4).bool()
    dense = sparse(2_000, 12, seed=1, density=0.1)
    dense[:, 3] = member[:, 0] * 1.0
    dense[:, 8] = ~member[:, 0] * 1.0
    dense[:, 5] = 0
    ranked = rank_latents(codes_of(dense), member, 0.01, 12, seeded())
    assert ranked.shape == (4, 12)
    assert ranked[0, 0] == 3
    assert ranked[0, -1] == 8
    assert ranked[1:, 0].ne(3).all()
    assert rank_latents(codes_of(dense), member, 0.01, 12, seeded()).equal(ranked)


def test_ranking_recovers_the_latents_that_define_the_class() -> None:
    """Three latents with true weights 3, 2 and 1.2 define the class."""
    dense = sparse(1_500, 20, seed=2, density=0.3)
    random = seeded(3)
    truth = torch.zeros(20)
    truth[[2, 9, 13]] = torch.tensor([3.0, 2.0, 1.2])
    member = (dense @ truth + 0.3 * torch.randn(1_500, generator=random) > 1.2)[:, None]
    member = torch.cat([member, ~member], dim=1)
    ranked = rank_latents(codes_of(dense), member, 0.01, 3, seeded())
    assert ranked[0].tolist() == [2, 9, 13]


# Main latents.


@pytest.mark.parametrize(
    ("f1", "size"),
    [
        ([0.5], 1),
        ([0.5, 0.6, 0.7, 0.71, 0.9], 3),
        ([0.5, 0.53, 0.9], 1),  # the gain must exceed the step
        ([0.5, 0.531, 0.52, 0.9], 2),  # the first smaller gain ends the list
        ([0.0, 0.0], 1),
    ],
)
def test_main_latents_end_at_the_first_small_gain_in_f1(f1: list[float], size: int) -> None:
    assert choose_main(f1, 0.03) == size


def split_world(children: int) -> tuple[Tensor, Tensor]:
    """Make latents of 1,200 words of three classes; class 0 is split among ``children`` latents."""
    random = seeded()
    labels = torch.randint(3, (1_200,), generator=random)
    dense = sparse(1_200, 16, seed=1, density=0.05)
    dense[:, :8] = 0
    kind = torch.randint(children, (1_200,), generator=random)
    for child in range(children):
        dense[:, child] = ((labels == 0) & (kind == child)) * 1.0
    dense[:, 6], dense[:, 7] = (labels == 1) * 1.0, (labels == 2) * 1.0
    return dense, labels


def folds_of(labels: Tensor) -> Fold:
    words = words_of(labels.tolist())
    return make_folds(words, split_words(words, 1, 0), 1, 0)[0]


@pytest.mark.parametrize("children", [1, 2, 3])
def test_a_split_class_has_all_its_latents_as_main(children: int) -> None:
    dense, labels = split_world(children)
    member = F.one_hot(labels, 4).bool()
    fold = folds_of(labels)
    splits = find_splits(codes_of(dense), member, fold, random=seeded())
    assert splits[3] is None  # a class without words
    assert splits[0] is not None
    assert splits[1] is not None
    assert sorted(splits[0].main.tolist()) == list(range(children))
    assert splits[1].main.tolist() == [6]
    test = member[fold.test, 0]
    assert ((splits[0].scores[:, children - 1] > 0) == test).all()
    assert precision_recall_f1(splits[0].scores[:, :1] > 0, test[:, None]).precision.item() == 1


def test_an_sae_with_fewer_latents_than_the_most_tries_all() -> None:
    dense, labels = split_world(1)
    splits = find_splits(
        codes_of(dense[:, :7]), F.one_hot(labels, 3).bool(), folds_of(labels), random=seeded()
    )
    assert splits[0] is not None
    assert splits[0].ranked.shape == (7,)
