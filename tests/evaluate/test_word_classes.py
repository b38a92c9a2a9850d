"""The choice of classes by their probes, and their scores on other words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import words_of
from torch import Tensor

from reseed.evaluate.probes import precision_recall_f1
from reseed.evaluate.splitting import SplittingConfig
from reseed.evaluate.word_classes import kept_classes, probe_quality, refusal_reasons
from reseed.evaluate.word_split import Fold, make_folds, split_words
from reseed.evaluate.word_task import ProbedTask
from reseed.evaluate.words import Template, Words


def probed(words: Words, scores: Tensor, folds: list[Fold], seed: int = 0) -> ProbedTask:
    """Make a task whose probes give each word its ``scores`` [n, C] in every fold."""
    classes = len(words.classes)
    probes = {
        f"{prefix}{name}": torch.stack([value] * len(folds))
        for prefix in ("", "gate_")
        for name, value in (("weight", torch.eye(classes)), ("bias", torch.zeros(classes)))
    }
    part = np.zeros(len(words), dtype=np.int64)
    return ProbedTask(words, Template((), {}, {}, {}), scores, part, folds, seed, probes)


def fold_of(test: list[int], n: int, validation: tuple[int, ...] = ()) -> Fold:
    others = [i for i in range(n) if i not in test and i not in validation]
    return Fold(*(np.array(some, dtype=np.int64) for some in (others, validation, test)))


def test_the_fold_that_is_scored_does_not_choose() -> None:
    """Two folds. The probe of class 0 is right on words 0 to 3 (fold 0) and wrong on the others:
    fold 0, where it is right, does not count, because fold 1 decides about it."""
    words = words_of([0, 0, 1, 1] * 2)
    right = torch.tensor([[1.0, -1]] * 2 + [[-1.0, 1]] * 2)
    task = probed(
        words, torch.cat([right, -right]), [fold_of([0, 1, 2, 3], 8), fold_of([4, 5, 6, 7], 8)]
    )
    found = probe_quality([task], 0.6)
    assert found.gate.tolist() == [[0, 0], [1, 1]]
    assert found.kept.tolist() == [[False, False], [True, True]]
    assert found.scores.f1.tolist() == [0, 0]
    assert found.test_words.tolist() == [2, 2]
    assert kept_classes(found, ["", "refused"]) == [[], [0]]


def test_one_fold_is_decided_on_validation_words() -> None:
    words = words_of([0, 0, 1, 1] * 2)
    right = torch.tensor([[1.0, -1]] * 2 + [[-1.0, 1]] * 2)
    task = probed(words, torch.cat([right, -right]), [fold_of([0, 1, 2, 3], 8, (4, 5, 6, 7))])
    found = probe_quality([task], 0.6)
    assert found.kept.tolist() == [[False, False]]
    assert found.scores.f1.tolist() == [1, 1], "a class that counts nowhere has the F1 of all folds"
    swapped = probed(words, torch.cat([right, -right]), [fold_of([4, 5, 6, 7], 8, (0, 1, 2, 3))])
    assert probe_quality([swapped], 0.6).kept.all()


@pytest.mark.parametrize("folds", [1, 5])
def test_the_f1_of_the_chosen_classes_is_not_raised_by_the_choice(folds: int) -> None:
    """All probes are equally good, so their F1 differ by chance alone. Of the classes above the
    bound, the F1 on the same words is higher than that of all, and the F1 on other words is not."""
    random, labels = torch.Generator().manual_seed(1), torch.arange(200).repeat_interleave(60)
    words = words_of(labels.tolist())
    member = torch.nn.functional.one_hot(labels).bool()
    said = torch.where(member, torch.rand(member.shape, generator=random) < 0.6, False) | (
        torch.rand(member.shape, generator=random) < 0.4 / 200
    )
    made = make_folds(words, split_words(words, folds, 0), folds, 0)
    tested = np.concatenate([fold.test for fold in made])
    same = precision_recall_f1(said[tested], member[tested]).f1
    found = probe_quality([probed(words, said.float() - 0.5, made)], 0.6)
    weights = found.weights([c for c in range(200) if found.kept[:, c].any()])
    assert 40 < len(weights) < 199
    noise = float(same.std()) / len(weights) ** 0.5
    chosen = found.scores.f1[list(weights)]
    mean = np.average(chosen, weights=list(weights.values()))
    assert abs(mean - float(same.mean())) < 3 * noise
    assert float(same[same > 0.6].mean() - same.mean()) > 3 * noise


def test_a_class_with_few_words_has_a_reason() -> None:
    """Class 0 has 20 words and class 1 has 19, with two spellings each; class 2 has a bad probe;
    class 3 has a good one on the last fold's words alone."""
    labels = [0] * 20 + [1] * 38 + [2] * 30 + [3] * 30
    texts = [
        f"{c}-{i // 2 if c == 1 else i}".rjust(9 + (c == 1 and i % 2)) for i, c in enumerate(labels)
    ]
    words = words_of(labels, texts)
    made = make_folds(words, split_words(words, 5, 0), 5, 0)
    scores = torch.nn.functional.one_hot(torch.tensor(labels)) - 0.5
    scores[58:] = -0.5
    right = made[4].test[made[4].test >= 88]
    scores[right, 3] = 0.5
    found = probe_quality([probed(words, scores, made)], 0.2)
    reasons = refusal_reasons(probed(words, scores, made), found, SplittingConfig(probe_f1=0.2))
    assert reasons[0] == ""
    assert reasons[1] == "19 test words, fewer than 20"
    assert reasons[2] == "F1 of the probe 0.00, not above 0.2"
    assert found.kept[:, 3].tolist() == [True] * 4 + [False]
    assert found.test_words.tolist() == [20, 19, 30, 24]
    few = refusal_reasons(
        probed(words, scores, made), found, SplittingConfig(probe_f1=0.2, min_test_words=25)
    )
    assert few[3] == "24 test words in 4 of 5 folds, where its probe is good, fewer than 25"
    assert few[0] == "20 test words, fewer than 25"
