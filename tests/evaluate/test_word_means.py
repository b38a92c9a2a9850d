"""Means over classes of words: by hand, against a dense program, and simulated coverage."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
from scipy import stats

from reseed.evaluate.word_means import Ratios, mean_over_classes

Rows = list[tuple[int, int, int, float]]


def ratios(rows: Rows, classes: int = 4, words: int = 12, seeds: int = 3) -> Ratios:
    """Make the ratios of records: class, word, prompt seed, value."""
    number, word, seed = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    value = np.array([row[3] for row in rows])
    return Ratios.of(number, word, seed, value, np.ones(len(rows)), (seeds, classes, words))


def equal(*classes: int) -> dict[int, float]:
    """Give classes equal weights."""
    return dict.fromkeys(classes, 1.0)


def test_a_difference_is_paired_over_the_letters_that_have_both_values() -> None:
    """Letter 2 has no value in the baseline and letter 3 none in the first: the difference of the
    two means would be (1 + 0 + 1) / 3 − (0.5 + 1 + 1) / 3 = −1/6."""
    first = ratios([(0, 0, 0, 1.0), (1, 1, 0, 0.0), (2, 2, 0, 1.0)])
    baseline = ratios([(0, 3, 0, 0.25), (0, 4, 0, 0.75), (1, 5, 0, 1.0), (3, 6, 0, 1.0)])
    found = mean_over_classes(first, equal(0, 1, 2, 3), baseline)
    assert found.mean == ((1 - 0.5) + (0 - 1)) / 2
    assert found.classes["mean"].to_dict() == {0: 0.5, 1: -1.0}
    assert mean_over_classes(first, equal(0, 1, 2, 3)).mean == pytest.approx(2 / 3)
    assert mean_over_classes(first, equal(0, 2), baseline).mean == 0.5, "only kept letters count"


def test_an_interval_over_words_by_hand() -> None:
    """One class of four words with the values 0, 1, 1, 1: the mean is 3/4, its standard error
    √(3/16 · 4/3 / 4) = 1/4, the factor of the logit scale 16/3, and there are 3 degrees of
    freedom."""
    found = mean_over_classes(ratios([(0, w, 0, float(w > 0)) for w in range(4)]), equal(0))
    reach = stats.t.ppf(0.975, 3) / 4 * 16 / 3
    assert found.mean == 0.75
    ends = [log(found.low / (1 - found.low)), log(found.high / (1 - found.high))]
    assert ends == pytest.approx([log(3) - reach, log(3) + reach])
    assert found.classes.loc[0, ["low", "high", "words"]].tolist() == [found.low, found.high, 4]


def test_an_interval_over_prompt_seeds_by_hand() -> None:
    """The seeds' means over two classes are .3, .4 and .5: the standard error is .1/√3."""
    rows = [(c, w, s, 0.25 + 0.1 * s + 0.1 * c) for c in (0, 2) for w in range(3) for s in range(3)]
    found = mean_over_classes(
        ratios([(c, w + 3 * c, s, v - 0.05) for c, w, s, v in rows]), equal(0, 2)
    )
    assert found.mean == pytest.approx(0.4)
    reach = stats.t.ppf(0.975, 2) * 0.1 / sqrt(3) / (0.4 * 0.6)
    ends = [found.prompts_low, found.prompts_high]
    assert [log(p / (1 - p)) for p in ends] == pytest.approx(
        [log(2 / 3) - reach, log(2 / 3) + reach]
    )
    two = mean_over_classes(ratios([r for r in rows if r[2] < 2], seeds=2), equal(0, 2))
    assert np.isnan([two.prompts_low, two.prompts_high]).all(), "two seeds are too few"


def test_the_draws_of_permuted_labels_widen_an_interval_by_hand() -> None:
    """Two draws of two words each, with the values .2 and .6: the variance over words is 4·(.2/4)²
    · 4/3 = 1/75, over draws 2·(2·.2/4)² · 2 = 1/25, with 3 degrees of freedom and 1."""
    rows = [(0, w, 0, 0.2 + 0.4 * (w > 1)) for w in range(4)]
    number, word, seed, value = (np.array(each) for each in zip(*rows, strict=True))
    draw, shape = word // 2, (1, 1, 4)
    null = Ratios.of(number, word, seed, value, np.ones(4), shape, draw)
    found = mean_over_classes(null, equal(0))
    variance = 1 / 75 + 1 / 25
    freedom = variance**2 / ((1 / 75) ** 2 / 3 + (1 / 25) ** 2 / 1)
    reach = stats.t.ppf(0.975, freedom) * sqrt(variance) / (0.4 * 0.6)
    ends = [log(p / (1 - p)) for p in (found.low, found.high)]
    assert ends == pytest.approx([log(2 / 3) - reach, log(2 / 3) + reach])
    assert found.classes.loc[0, "low"] == pytest.approx(found.low)
    # The draws of a baseline widen the interval of a difference as much.
    same = Ratios.of(number, word, seed, np.full(4, 0.5), np.ones(4), shape)
    difference = mean_over_classes(same, equal(0), null)
    assert difference.high - difference.mean == pytest.approx(
        stats.t.ppf(0.975, freedom) * sqrt(variance)
    )


def test_prompt_seeds_are_compared_over_the_same_classes() -> None:
    """Class 1 has no record under seed 2; the means of the seeds are those of class 0."""
    rows = [(0, w, s, 0.2 + 0.1 * s) for w in range(3) for s in range(3)]
    alone = mean_over_classes(ratios(rows), equal(0))
    rows += [(1, w, s, 0.9) for w in range(4, 7) for s in range(2)]
    both = mean_over_classes(ratios(rows), equal(0, 1))
    spread = [log(m.prompts_high / (1 - m.prompts_high)) - log(m.mean / (1 - m.mean))
              for m in (alone, both)]  # fmt: skip
    slopes = [1 / (m.mean * (1 - m.mean)) for m in (alone, both)]
    assert spread[0] / slopes[0] == pytest.approx(spread[1] / slopes[1])


def test_without_variation_or_with_a_single_word_there_is_no_interval() -> None:
    alike = mean_over_classes(
        ratios([(0, w, s, 0.5) for w in range(4) for s in range(3)]), equal(0)
    )
    single = mean_over_classes(
        ratios([(0, 0, 0, 0.5), (1, 1, 0, 0.2), (1, 2, 0, 0.4)]), equal(0, 1)
    )
    never = mean_over_classes(ratios([(0, w, 0, 0.0) for w in range(4)]), equal(0))
    for found, mean in ((alike, 0.5), (single, 0.4), (never, 0.0)):
        assert found.mean == pytest.approx(mean)
        assert np.isnan([found.low, found.high, found.prompts_low, found.prompts_high]).all()
    nothing = mean_over_classes(ratios([(0, 0, 0, 0.5)]), equal())
    assert np.isnan([nothing.mean, nothing.low, nothing.prompts_low]).all()
    assert len(nothing.classes) == 0
    metrics = nothing.metrics("absorption_full")
    assert set(metrics.values()) == {None}


def records(random: np.random.Generator, words: int, most: int = 4) -> Rows:
    """Draw records of words that are in one or two of three classes."""
    found: Rows = []
    for word in range(words):
        for number in random.choice(3, random.integers(1, 3), replace=False):
            found += [
                (int(number), word, s, float(random.random()))
                for s in range(3)
                for _ in range(random.integers(0, most))
            ]
    return found


@pytest.mark.parametrize("difference", [False, True])
def test_the_standard_error_is_that_of_a_dense_program(difference: bool) -> None:
    """The program loops over the records, and removes each word's part of each class: V = Σ_w (Σ_c
    √(n/(n−1)) · (sum of w − mean · number of w) / N / C)², the difference within the same word."""
    random = np.random.default_rng(3)
    first, baseline = records(random, 12), records(random, 12)
    mean, by_word, parts, counts = 0.0, np.zeros(12), np.zeros((3, 12)), []
    for number in range(3):
        sizes = []
        for sign, rows in ((1, first), (-1, baseline))[: 1 + difference]:
            own = [row for row in rows if row[0] == number]
            average = sum(row[3] for row in own) / len(own)
            n = len({row[1] for row in own})
            sizes.append(n)
            mean += sign * average / 3
            for _, word, _, value in own:
                part = sign * sqrt(n / (n - 1)) * (value - average) / len(own)
                by_word[word] += part / 3
                parts[number, word] += part
        counts.append(min(sizes))
    variance = float((by_word**2).sum())
    each = (parts**2).sum(1) / 9
    freedom = variance**2 / sum(v**2 / (n - 1) for v, n in zip(each, counts, strict=True))
    reach = stats.t.ppf(0.95, freedom) * sqrt(variance)
    found = mean_over_classes(
        ratios(first, 3), equal(0, 1, 2), ratios(baseline, 3) if difference else None, 0.9
    )
    assert found.mean == pytest.approx(mean)
    ends = np.array([found.low, found.high])
    if difference:
        assert ends == pytest.approx([mean - reach, mean + reach])
    else:
        slope = mean * (1 - mean)
        assert np.log(ends / (1 - ends)) == pytest.approx(
            [log(mean / (1 - mean)) - reach / slope, log(mean / (1 - mean)) + reach / slope]
        )


SIX = equal(*range(6))
LETTERS = {"common": (20, 60, 0.3), "rare": (20, 60, 0.03), "few": (20, 22, 0.5)}
"""Fewest and most words of a letter, and the mean of their fractions."""


def drawn(random: np.random.Generator, case: str) -> tuple[Ratios, Ratios, Ratios]:
    """Draw six letters, whose words have one to three spellings and three prompt seeds. Most of a
    word's spread is common to its records.

    Returns:
        the values; a baseline of mean 1/4 + half of theirs, correlated with them; the values with
        each record as a word of its own.
    """
    least, most, mean = LETTERS[case]
    sizes = random.integers(least, most + 1, 6)
    number = np.repeat(np.arange(6), sizes)
    level = mean * np.linspace(0.6, 1.4, 6)[number]
    forms = random.integers(1, 4, len(number))
    absorbed = random.random(len(number)) < level
    word = np.repeat(np.arange(len(number)), 3 * forms)
    seed = np.concatenate([np.tile(np.arange(3), n) for n in forms])
    n = len(word)
    again = random.random(n) < 0.1
    value = np.where(again, random.random(n) < level[word], absorbed[word]).astype(np.float64)
    twin = np.where(random.random(n) < 0.5, value, random.random(n) < 0.5)

    def made(unit: np.ndarray, top: np.ndarray) -> Ratios:
        return Ratios.of(number[word], unit, seed, top, np.ones(n), (3, 6, int(unit[-1]) + 1))

    return made(word, value), made(word, twin), made(np.arange(n), value)


@pytest.mark.slow
@pytest.mark.parametrize("case", LETTERS)
def test_intervals_over_words_cover_the_truth(case: str) -> None:
    """At least .93 of the 95% intervals, of the mean and of the difference to the baseline, hold
    the truth, within twice the error of the simulation: .914, so that a coverage of .90 fails.
    Those over records hold it less often."""
    random, draws, mean = np.random.default_rng(11), 1_000, LETTERS[case][2]
    inside = np.zeros(2)
    by_record = 0
    for draw in range(draws):
        values, baseline, records_alone = drawn(random, case)
        for i, (found, truth) in enumerate(
            (
                (mean_over_classes(values, SIX), mean),
                (mean_over_classes(values, SIX, baseline), mean / 2 - 0.25),
            )
        ):
            inside[i] += found.low <= truth <= found.high
        if draw < 200:
            found = mean_over_classes(records_alone, SIX)
            by_record += found.low <= mean <= found.high
    coverage = inside / draws
    assert coverage.min() > 0.93 - 2 * sqrt(0.93 * 0.07 / draws), coverage
    assert by_record / 200 < 0.85, by_record


def test_intervals_of_a_null_cover_the_mean_over_permutations() -> None:
    """Fifteen draws, each with an effect on every letter that its words share (its own main
    latents), and words with an effect of their own."""
    random, draws, mean = np.random.default_rng(2), 400, 0.4
    inside = words_alone = 0
    number, word, draw = (each.ravel() for each in np.indices((4, 60, 3)))
    draw = 5 * draw + (word // 12)  # each word is tested in one of five folds
    unit, shape = 60 * number + word, (3, 4, 240)
    for _ in range(draws):
        effect = random.normal(0, 0.1, (4, 15))[number, draw] + random.normal(0, 0.2, 240)[unit]
        value = mean + effect
        for with_draws in (True, False):
            null = Ratios.of(
                number, unit, draw // 5, value, np.ones(len(value)), shape,
                draw if with_draws else None,
            )  # fmt: skip
            found = mean_over_classes(null, equal(*range(4)))
            inside += with_draws and found.low <= mean <= found.high
            words_alone += not with_draws and found.low <= mean <= found.high
    assert inside / draws > 0.93 - 2 * sqrt(0.93 * 0.07 / draws)
    assert words_alone < inside


@pytest.mark.parametrize(("seeds", "folds"), [(3, 1), (3, 5)])
def test_what_a_draw_has_in_common_for_all_letters_counts_once(seeds: int, folds: int) -> None:
    """A draw permutes the letters of all words at once. Effects of a draw that all letters share
    are known from as few values as there are draws, however many letters there are."""
    random, studies, inside = np.random.default_rng(4), 600, 0
    number, word, seed = (each.ravel() for each in np.indices((6, 30, seeds)))
    draw, unit = folds * seed + word * folds // 30, 30 * number + word
    for _ in range(studies):
        effect = random.normal(0, 0.1, seeds * folds)[draw]
        value = 0.4 + effect + random.normal(0, 0.02, len(unit))
        null = Ratios.of(
            number, unit, seed, value, np.ones(len(unit)), (seeds, 6, 180), draw
        )  # fmt: skip
        found = mean_over_classes(null, equal(*range(6)))
        inside += found.low <= 0.4 <= found.high
    assert inside / studies > 0.93 - 2 * sqrt(0.93 * 0.07 / studies)
