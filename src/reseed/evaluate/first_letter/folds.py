"""Which words are for training, which to choose with, and which to measure on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.2
"""Of the training words."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Indices of words, sorted.

    Attributes:
        fit: what probes on latents are fitted to.
        validation: what latents are chosen by.
        test: what is measured on.
    """

    fit: Int[np.ndarray, " some"]
    validation: Int[np.ndarray, " some"]
    test: Int[np.ndarray, " some"]

    @property
    def train(self) -> Int[np.ndarray, " more"]:
        """All that is not for testing: what probes on activations are fitted to."""
        return np.sort(np.concatenate([self.fit, self.validation]))


def parts(labels: Int[np.ndarray, " n"], folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """The part of every word, with the same shares of each class in all of them.

    With one fold part 0 is for training and part 1, a fifth of the words of each class, for
    testing; with more the parts are as large as each other, and each is tested on in its turn.

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
            start += len(members)  # small classes do not all favour the first parts
    return part


def make_folds(
    labels: Int[np.ndarray, " n"], part: Int[np.ndarray, " n"], folds: int, seed: int
) -> list[Fold]:
    """Every fold, from the parts; validation words are drawn within each class."""
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
