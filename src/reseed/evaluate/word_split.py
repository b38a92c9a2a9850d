"""The split of a task's words into three sets, and the random permutation of their labels.

Probes are fitted to the first set (fit), latents are chosen on the second (validation), and both
are measured on the third (test). All spellings of a word (" dog", "dog", "Dog") are in one set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from reseed.evaluate.words import Words

HELD_BACK = 5
"""With one fold a fifth of the words is for testing; of the others a fifth is for validation."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Indices of words, sorted.

    Attributes:
        fit: words that probes on latents are fitted to.
        validation: words on which latents are chosen.
        test: words on which latents and probes are measured.
    """

    fit: Int[np.ndarray, " some"]
    validation: Int[np.ndarray, " some"]
    test: Int[np.ndarray, " some"]

    @property
    def train(self) -> Int[np.ndarray, " more"]:
        """All words outside the test set; probes on activations are fitted to these words."""
        return np.sort(np.concatenate([self.fit, self.validation]))


def split_words(words: Words, folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """Assign every word to a part of the split, stratified by class (`_deal`).

    All spellings of a word are in one part, so no probe is tested on another spelling of a word
    that it was fitted to. With one fold, part 0 is for training and part 1, a fifth of the words,
    for testing. With more folds, the parts are equally large, and each fold tests on one of them.

    Args:
        seed: random seed; the same seed, words and number of folds give the same split.
    """
    random = np.random.default_rng([0x70617274, seed])
    everything = np.arange(len(words))
    if folds == 1:
        return (_deal(words, everything, HELD_BACK, random) == HELD_BACK - 1).astype(np.int64)
    return _deal(words, everything, folds, random)


def make_folds(words: Words, part: Int[np.ndarray, " n"], folds: int, seed: int) -> list[Fold]:
    """Make every fold from the parts; validation words are sampled as the parts are."""
    made = []
    for number in range(folds):
        test = part == (1 if folds == 1 else number)
        random = np.random.default_rng([0x76616C, seed, number])
        train = np.flatnonzero(~test)
        validation = _deal(words, train, HELD_BACK, random) == HELD_BACK - 1
        made.append(Fold(train[~validation], train[validation], np.flatnonzero(test)))
    return made


def _deal(
    words: Words, some: Int[np.ndarray, " n"], parts: int, random: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Deal some of the words into parts; return the part of each.

    The spellings of a word go together into the part that has the fewest words of its class so far,
    and of these into the one with the fewest words. Words of many spellings are dealt first, so
    that the others can even out the parts; words of as many spellings in a random order.
    """
    spelling, labels = words.spelling_ids[some].tolist(), words.labels[some].tolist()
    groups: dict[int, list[int]] = {}
    for i in random.permutation(len(some)).tolist():
        groups.setdefault(spelling[i], []).append(i)
    of_class = [[0] * parts for _ in words.classes]
    of_all, part = [0] * parts, np.zeros(len(some), dtype=np.int64)
    for members in sorted(groups.values(), key=len, reverse=True):
        own = [of_class[labels[i]] for i in members]
        best = min(range(parts), key=lambda p: (sum(sizes[p] for sizes in own), of_all[p]))
        for sizes in (*own, *[of_all] * len(members)):
            sizes[best] += 1
        part[members] = best
    return part


def permute_words(
    words: Words, some: Int[np.ndarray, " n"], random: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Return, for each of some words, the word whose label it gets in a random permutation.

    The spellings of a word get the labels of the spellings of one other word with as many, so that
    permuted labels depend on each other as the true ones do.
    """
    order = some[np.argsort(words.spelling_ids[some], kind="stable")]
    _, first, sizes = np.unique(words.spelling_ids[order], return_index=True, return_counts=True)
    taken = np.empty(len(words), dtype=np.int64)
    for size in np.unique(sizes):
        places = first[sizes == size][:, None] + np.arange(size)
        taken[order[places]] = order[random.permutation(places)]
    return taken[some]
