"""Split of the words into fit, validation and test sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.2
"""Fraction of the training words."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Indices of words, sorted.

    Attributes:
        fit: words that probes on latents are fitted to.
        validation: words that latents are chosen by.
        test: words that are measured.
    """

    fit: Int[np.ndarray, " some"]
    validation: Int[np.ndarray, " some"]
    test: Int[np.ndarray, " some"]

    @property
    def train(self) -> Int[np.ndarray, " more"]:
        """All but the test words; probes on activations are fitted to them."""
        return np.sort(np.concatenate([self.fit, self.validation]))


def parts(labels: Int[np.ndarray, " n"], folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """Assign every word to a part of the split, with the same shares of each class in every part.

    With one fold, part 0 is for training and part 1, a fifth of the words of each class, for
    testing. With more folds, the parts are equally large, and each fold tests on one of them.

    Args:
        labels: class of every word.
        seed: the draw is a function of it and of the labels.
    """
    random = np.random.default_rng([0x70617274, seed])
    part = np.zeros(len(labels), dtype=np.int64)
    start = 0
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if folds == 1:
            part[members[: round(TEST_FRACTION * len(members))]] = 1
        else:
            part[members] = (start + np.arange(len(members))) % folds
            start += len(members)  # else all small classes would favour the first parts
    return part


def make_folds(
    labels: Int[np.ndarray, " n"], part: Int[np.ndarray, " n"], folds: int, seed: int
) -> list[Fold]:
    """Make every fold from the parts; validation words are drawn within each class."""
    made = []
    for number in range(folds):
        test = part == (1 if folds == 1 else number)
        random = np.random.default_rng([0x76616C, seed, number])
        validation = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero((labels == label) & ~test))
            validation[members[: round(VALIDATION_FRACTION * len(members))]] = True
        fit = ~(test | validation)
        made.append(Fold(*(np.flatnonzero(which) for which in (fit, validation, test))))
    return made
