"""The split of words by spelling, stratified by class, and the permutation of their labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
from evaluation_helpers import words_of
from hypothesis import given
from hypothesis import strategies as st

from reseed.evaluate.word_split import make_folds, permute_words, split_words
from reseed.evaluate.words import Words


@st.composite
def vocabularies(draw: st.DrawFn) -> Words:
    """Draw words of one to four spellings, all of one class."""
    forms = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=80))
    texts, labels = [], []
    for i, (label, number) in enumerate(forms):
        word = "".join(chr(ord("a") + int(digit)) for digit in str(i))
        spelt = (word, f" {word}", word.upper(), f" {word.upper()}")[:number]
        texts += spelt
        labels += [label] * number
    return words_of(labels, texts)


@given(vocabularies(), st.integers(1, 6), st.integers(0, 9))
def test_a_split_is_a_partition_without_a_common_spelling(
    words: Words, folds: int, seed: int
) -> None:
    part = split_words(words, folds, seed)
    made = make_folds(words, part, folds, seed)
    assert (split_words(words, folds, seed) == part).all()
    assert len(made) == folds
    spelt = np.array([text.strip().lower() for text in words.texts])
    for fold in made:
        sets = (fold.fit, fold.validation, fold.test)
        assert sorted(np.concatenate(sets)) == list(range(len(words)))
        assert (fold.train == np.sort(np.concatenate(sets[:2]))).all()
        first, second, third = (set(spelt[some]) for some in sets)
        assert not first & second
        assert not first & third
        assert not second & third
    if folds > 1:
        assert sorted(np.concatenate([fold.test for fold in made])) == list(range(len(words)))
        tested = [set(spelt[fold.test]) for fold in made]
        assert sum(map(len, tested)) == len(set(spelt))


@given(vocabularies(), st.integers(1, 6), st.integers(0, 9))
def test_a_split_is_stratified_up_to_the_spellings_of_one_word(
    words: Words, folds: int, seed: int
) -> None:
    """The parts of a class differ by at most the spellings of one word; with one fold, its test
    words are the smallest, or one of five equal, fifth."""
    labels = words.labels.numpy()
    made = make_folds(words, split_words(words, folds, seed), folds, seed)
    most = max(Counter(words.spelling_ids.tolist()).values())
    for label in set(labels.tolist()):
        n = int((labels == label).sum())
        sizes = [int((labels[fold.test] == label).sum()) for fold in made]
        if folds == 1:
            assert abs(sizes[0] - n / 5) <= most
        else:
            assert max(sizes) - min(sizes) <= most
        for fold in made:
            train = int((labels[fold.train] == label).sum())
            assert abs(int((labels[fold.validation] == label).sum()) - train / 5) <= most


def test_words_of_one_spelling_are_split_into_exact_fifths() -> None:
    words = words_of([0] * 50 + [1] * 25)
    for folds, parts in ((1, 1), (5, 5)):
        made = make_folds(words, split_words(words, folds, 3), folds, 3)
        counts = [np.bincount(words.labels.numpy()[fold.test]).tolist() for fold in made]
        assert counts == [[10, 5]] * parts
        inner = [np.bincount(words.labels.numpy()[fold.validation]).tolist() for fold in made]
        assert inner == [[8, 4]] * parts


def test_another_seed_gives_another_split() -> None:
    words = words_of([i % 3 for i in range(300)])
    first, second = (split_words(words, 5, seed) for seed in (0, 1))
    assert (first != second).any()
    validation = [make_folds(words, first, 5, seed)[0].validation.tolist() for seed in (0, 1)]
    assert validation[0] != validation[1]


def test_a_word_whose_spellings_are_of_two_classes_stays_in_one_part() -> None:
    words = words_of([0, 1] * 10, [form for i in range(10) for form in (f"w{i}", f" W{i}")])
    part = split_words(words, 5, 0)
    assert (part[::2] == part[1::2]).all()
    assert np.bincount(part).tolist() == [4] * 5


@given(vocabularies(), st.integers(0, 9))
def test_permuted_labels_go_from_word_to_word_with_all_spellings(words: Words, seed: int) -> None:
    some = np.arange(len(words))[:: 1 + seed % 2]
    taken = permute_words(words, some, np.random.default_rng(seed))
    assert sorted(taken) == sorted(some)
    ids = words.spelling_ids
    for own in set(ids[some].tolist()):
        others = ids[taken[ids[some] == own]]
        assert len(set(others.tolist())) == 1
        assert (ids[some] == own).sum() == (ids[some] == others[0]).sum()


def test_different_words_are_counted_once_whatever_their_spellings() -> None:
    words = words_of([0, 0, 0, 1, 1], ["dog", " Dog", "cat", " ox", "ox"])
    assert words.num_spellings == 3
    assert words.distinct(np.array([0, 1, 2, 3])) == [2, 1]
    assert words.distinct(np.array([], dtype=np.int64)) == [0, 0]
