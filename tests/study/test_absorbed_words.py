"""Overlap of the words that two SAEs absorb: by hand, and against chance."""

from __future__ import annotations

from itertools import permutations as orders

import numpy as np
import pandas as pd
import pytest

from reseed.study.absorbed_words import absorbed_overlap, usual

Tables = tuple[pd.DataFrame, pd.DataFrame]


def tables(absorbed: dict[str, list[float]], main: dict[str, list[int]], **more: str) -> Tables:
    """Make ``letters`` and ``words`` of an SAE from the absorption fractions of each class."""
    letters = pd.DataFrame(
        [{"class": name, "reason": more.get(name, ""), "main": [[j] for j in mains]}
         for name, mains in main.items()]
    )  # fmt: skip
    words = pd.DataFrame(
        [{"class": name, "token": 1_000 * i + t, "text": f"{name}{t}", "fraction": fraction,
          "frequency": 10 * (t % 7)}
         for i, (name, fractions) in enumerate(absorbed.items())
         for t, fraction in enumerate(fractions)]
    )  # fmt: skip
    return letters, words


def test_overlap_counts_matched_classes_by_hand() -> None:
    flags = [1.0, 0.6, 0.0, 0.0, 0.0, 0.0]
    first = tables({"a": flags, "b": flags}, {"a": [4], "b": [5]})
    second = tables({"a": flags, "b": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]}, {"a": [7], "b": [8]})
    partner = np.full(10, -1)
    partner[4] = 7  # no latent of b is matched
    found = absorbed_overlap(first, second, partner)
    assert (found.classes, found.words, found.jaccard) == (1, 6, 1.0)
    rows = found.by_class.set_index("class")
    assert rows.loc["a"].to_dict() == {
        "matched": True, "words": 6, "first": 2, "second": 2, "both": 2
    }  # fmt: skip
    assert not rows.loc["b", "matched"]
    partner[5] = 8
    both = absorbed_overlap(first, second, partner)
    assert both.classes == 2
    assert both.jaccard == pytest.approx(2 / 6)


def test_chance_permutes_words_of_similar_frequency() -> None:
    """Two strata of three words: enumerate all permutations."""
    first = tables({"a": [1, 0, 0, 1, 1, 0]}, {"a": [0]})
    second = tables({"a": [1, 0, 0, 0, 1, 0]}, {"a": [0]})
    for _, words in (first, second):
        words["frequency"] = [1, 1, 1, 9, 9, 9]
    found = absorbed_overlap(first, second, np.array([0]), permutations=40_000)
    a, b = np.array([1, 0, 0, 1, 1, 0]), np.array([1, 0, 0, 0, 1, 0])
    shared = [
        int((a[:3] * b[list(left)]).sum() + (a[3:] * b[list(right)]).sum())
        for left in orders([0, 1, 2])
        for right in orders([3, 4, 5])
    ]
    jaccards = [s / (a.sum() + b.sum() - s) for s in shared]
    assert found.expected == pytest.approx(np.mean(jaccards), abs=0.01)
    assert found.p == pytest.approx(np.mean([s >= 2 for s in shared]), abs=0.01)


def test_equal_words_overlap_beyond_chance_and_independent_words_do_not() -> None:
    random = np.random.default_rng(0)
    mine, other = (list((random.random(400) < 0.3).astype(float)) for _ in range(2))
    first, unlike = tables({"a": mine}, {"a": [0]}), tables({"a": other}, {"a": [0]})
    by_chance = absorbed_overlap(first, unlike, np.array([0]))
    assert by_chance.p > 0.05
    assert by_chance.jaccard == pytest.approx(by_chance.expected, abs=0.05)
    assert absorbed_overlap(first, first, np.array([0])).p < 0.01


def test_a_word_needs_half_of_its_records_and_a_class_must_be_evaluable_in_both() -> None:
    letters, words = tables({"a": [1.0, 0.0]}, {"a": [0]})
    twice = pd.concat([words, words.assign(fraction=0.0), words.assign(fraction=0.0)])
    found = absorbed_overlap((letters, twice), (letters, words), np.array([0]))
    assert found.by_class.loc[0, "first"] == 0
    assert found.jaccard == 0
    refused = tables({"a": [1.0, 0.0]}, {"a": [0]}, a="no word")
    nothing = absorbed_overlap(refused, (letters, words), np.array([0]))
    assert (nothing.classes, nothing.words) == (0, 0)
    assert np.isnan([nothing.jaccard, nothing.expected, nothing.p]).all()


def test_a_word_is_absorbed_if_one_of_its_spellings_is() -> None:
    first = tables({"a": [1, 0, 0, 0, 1]}, {"a": [0]})
    second = tables({"a": [0, 1, 0, 0, 0]}, {"a": [0]})
    for _, words in (first, second):
        words["text"] = ["axe", " Axe", "ant", " ant", "arm"]
    found = absorbed_overlap(first, second, np.array([0]))
    assert found.words == 3
    assert found.by_class.loc[0, ["first", "second", "both"]].tolist() == [2, 1, 1]
    assert found.jaccard == 1 / 2


@pytest.mark.parametrize("together", [True, False])
def test_p_values_of_independent_saes_are_below_a_twentieth_in_a_twentieth(together: bool) -> None:
    """Words have one to four spellings, which an SAE absorbs together or each by chance. The share
    of p-values below .05 is at most .05, within twice the error of the simulation."""
    random, studies, small = np.random.default_rng(0), 150, 0
    for study in range(studies):
        word = np.repeat(np.arange(120), random.integers(1, 5, 120))
        frequency, both = random.integers(1, 1_000, 120)[word], []
        for _ in range(2):
            letters, words = tables({"a": [0.0] * len(word)}, {"a": [0]})
            flags = random.random(120)[word] if together else random.random(len(word))
            texts = [f"{' ' * i}{w}" for i, w in enumerate(word)]
            words = words.assign(fraction=(flags < 0.2) * 1.0, frequency=frequency, text=texts)
            both.append((letters, words))
        found = absorbed_overlap(both[0], both[1], np.array([0]), permutations=99, seed=study)
        small += found.p <= 0.05
    assert small / studies < 0.05 + 2 * np.sqrt(0.05 * 0.95 / studies)


def test_usual_latents_are_main_in_at_least_half_of_the_folds() -> None:
    assert usual([[3], [3, 5], [5], [9]]) == {3, 5}
    assert usual([]) == set()
