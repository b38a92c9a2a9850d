"""The result of ``absorption``: metrics, and tables for a closer look at absorbed words."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from reseed.evaluate.absorption.projection import Alignment, NullCosines
from reseed.evaluate.absorption.records import record_ratios
from reseed.evaluate.base import Metric, Result
from reseed.evaluate.splitting import CLASS, TOO_FEW_WORDS, MainLatents, main_classes
from reseed.evaluate.word_classes import ProbeQuality, class_counts, count_metrics, few_words
from reseed.evaluate.word_means import Mean, Ratios, interval_metrics, mean_over_classes
from reseed.evaluate.word_task import ProbedTask, WordTaskConfig
from reseed.sae.base import SAE

DERIVED = "_derived"
"""Suffix of columns and metrics measured with thresholds derived from the null."""
_EXAMPLES = 12
_OPTIONAL = ("causal", "fraction_untrained", "full_untrained", "fraction_untrained_excess",
             "full_untrained_excess")  # fmt: skip
_MEANS = (
    *("fraction", "full", f"fraction{DERIVED}", f"full{DERIVED}", "fraction_null"),
    *(f"fraction{DERIVED}_null", "fraction_excess", f"fraction{DERIVED}_excess", *_OPTIONAL),
)
_PAIRED = (
    "mean over the letters that have both values, each of at least "
    "`evaluation.min_test_words` words, paired by letter and word"
)

METRICS = (
    *count_metrics("absorption"),
    Metric("absorption_test_words", "words", "number of test words of these letters that the probe "
           "gets right; the spellings of a word count as one", count=True),
    Metric("absorption_fraction", "fraction", "part of a letter's probe projection, in words with "
           "that letter, that other latents carry instead of the letter's own", interval=True,
           advice="The published thresholds suit a d_in of some thousand. In narrower models "
           "random directions exceed them: read it with `absorption_fraction_excess` and "
           "`absorption_fraction_untrained_excess`."),
    Metric("absorption_fraction_null", "permuted", "`absorption_fraction` with letters assigned to "
           "words at random", interval=True),
    Metric("absorption_fraction_excess", "excess", "`absorption_fraction` minus its value with "
           f"permuted letters; {_PAIRED}", interval=True),
    Metric("absorption_excess_letters", "excess,\nletters", "number of letters in "
           "`absorption_fraction_excess` and `absorption_fraction_derived_excess`", count=True),
    Metric("absorption_full", "full", "fraction of words on which the letter's own latents are "
           "silent and one other latent carries the projection", advice="It has no value with "
           "permuted letters beside it: their latents hardly fire on test words, so nearly every "
           "word would count, whatever the SAE."),
    Metric("absorption_fraction_untrained", "untrained", "`absorption_fraction` of the untrained "
           "SAE", interval=True, optional=True),
    Metric("absorption_fraction_untrained_excess", help="`absorption_fraction` minus that of the "
           f"untrained SAE; {_PAIRED}", optional=True),
    Metric("absorption_untrained_excess_letters", help="number of letters in "
           "`absorption_fraction_untrained_excess`", optional=True),
    Metric("absorption_fraction_derived", "derived", "`absorption_fraction` with "
           "`absorption_cosine_derived` as the threshold of cosines", interval=True,
           advice="For narrow models. It can miss absorption."),
    Metric("absorption_fraction_derived_null", help="`absorption_fraction_derived` with letters "
           "assigned to words at random"),
    Metric("absorption_fraction_derived_excess", "derived,\nexcess",
           "`absorption_fraction_derived` minus its value with permuted letters; " + _PAIRED,
           interval=True),
    Metric("absorption_full_derived", help="`absorption_full` with the derived threshold"),
    Metric("absorption_full_untrained", help="`absorption_full` of the untrained SAE",
           optional=True),
    Metric("absorption_full_untrained_excess", help="`absorption_full` minus that of the untrained "
           f"SAE; {_PAIRED}", optional=True),
    Metric("absorption_causal", help="fraction of words on which the letter's own latents are "
           "silent and one other has by far the largest effect on the model's answer",
           optional=True, advice="Only with `evaluation.causal=true`, at layers where the "
           "information about the word is still at the word's token."),
    *(
        metric
        for name in _MEANS
        for metric in interval_metrics(f"absorption_{name}", name in _OPTIONAL)
    ),
    Metric("absorption_cosine_derived", help="the derived threshold, the larger of the next two: "
           "directions without meaning do not reach it in this dictionary"),
    Metric("absorption_cosine_random", help="quantile `evaluation.null_quantile` of the cosines of "
           "latents with random directions that have the activations' covariance"),
    Metric("absorption_cosine_permuted", help="the same quantile of their cosines with probes of "
           "permuted letters"),
    Metric("absorption_l0", help="active latents per word", advice="The more latents are active, "
           "the more exceed a threshold by chance: compare an SAE with its untrained self only if "
           "their values are similar."),
    Metric("absorption_l0_untrained", help="active latents per word of the untrained SAE",
           optional=True),
)  # fmt: skip
LATENTS = (
    Metric("absorption_is_absorber", "absorbers", "fraction of latents that take part in absorbing "
           "some word", advice="True or false for each latent."),
    replace(CLASS, name="absorption_class"),
    Metric("absorption_words", help="number of words that the latent helps to absorb"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class AbsorptionMeasurements:
    """Measurements of one SAE over all repetitions.

    Attributes:
        records: the table of `word_records`.
        permuted: the same for permuted labels.
        splits: the main latents of each class, in each repetition and fold.
        null: cosines of the decoder with null directions.
        l0: mean number of active latents per word.
    """

    records: pd.DataFrame
    permuted: pd.DataFrame | None
    splits: list[tuple[ProbedTask, int, list[MainLatents | None]]]
    null: NullCosines | None
    l0: float


def make_result(
    config: WordTaskConfig,
    repetitions: list[ProbedTask],
    measured: AbsorptionMeasurements,
    untrained: AbsorptionMeasurements | None,
    sae: SAE,
    quality: ProbeQuality,
    reasons: list[str],
    frequency: np.ndarray,
) -> Result:
    """Make the result of one SAE.

    Args:
        untrained: measurements of the SAE at initialisation.
        reasons: why each class cannot be evaluated; empty if it can.
        frequency: count of each word in the text.
    """
    records, null = measured.records, measured.null
    assert null is not None
    probed = repetitions[0]
    words = _word_counts(records, probed)
    split = {c for _, _, each in measured.splits for c, found in enumerate(each) if found}
    reasons = [
        reason or _lack(int(words[number]), number in split, config)
        for number, reason in enumerate(reasons)
    ]
    kept = [number for number, reason in enumerate(reasons) if not reason]
    means = _means(measured, untrained, repetitions, quality.weights(kept), config)
    cosine = _cosines(repetitions, sae)
    absorbers = absorber_table(records, repetitions, cosine, kept)
    metrics = class_counts("absorption", reasons) | {
        "absorption_test_words": int(words[kept].sum())
    }
    metrics |= _metrics(means, null) | {"absorption_l0": measured.l0}
    if untrained is not None:
        metrics["absorption_l0_untrained"] = untrained.l0
    letters = _letter_table(means, measured, repetitions, quality, reasons, cosine)
    letters.insert(3, "right_words", words)
    null_words = _word_counts(measured.permuted, probed)
    letters.insert(list(letters).index("fraction_null"), "fraction_null_words", null_words)
    return Result(
        metrics,
        {
            "letters": letters,
            "words": _word_table(records, probed, frequency),
            "absorbers": absorbers,
        },
        _latent_columns(measured, absorbers, kept, sae.num_latents, probed.num_classes),
    )


def _word_counts(records: pd.DataFrame | None, probed: ProbedTask) -> np.ndarray:
    """Count the different words of each class in the records."""
    assert records is not None
    word = probed.words.spelling_ids[records["word"].to_numpy()]
    pairs = np.unique(np.stack([records["class"].to_numpy(), word]).astype(np.int64), axis=1)
    return np.bincount(pairs[0], minlength=probed.num_classes)


def _lack(words: int, split: bool, config: WordTaskConfig) -> str:
    """Return the reason why a class with so many different words in its records is refused.

    Args:
        split: whether main latents were found for it.
    """
    if not split:
        return TOO_FEW_WORDS
    which = " that the probe gets right"
    return few_words(words, which, config) if words < config.min_test_words else ""


def _means(
    measured: AbsorptionMeasurements,
    untrained: AbsorptionMeasurements | None,
    repetitions: list[ProbedTask],
    kept: dict[int, float],
    config: WordTaskConfig,
) -> dict[str, Mean]:
    """Compute the means `_MEANS` over the kept classes, which have weights.

    A mean of a baseline, and the differences to it, are over those with enough words in it.
    """
    assert measured.permuted is not None
    confidence = config.confidence

    def enough(of: Ratios) -> dict[int, float]:
        words, draws = (of.bottom > 0).sum(1), np.inf
        if of.draws is not None and of.draws[1].shape[1] > 1:
            draws = (of.draws[1] > 0).sum(1)
        there = (words >= config.min_test_words) & (draws > 1)
        return {number: weight for number, weight in kept.items() if there[number]}

    def ratios(of: pd.DataFrame, *columns: str) -> dict[str, Ratios]:
        permuted = of is measured.permuted
        return {
            name: record_ratios(of, name, repetitions, permuted) for name in columns if name in of
        }

    def means(of: dict[str, Ratios], end: str = "") -> dict[str, Mean]:
        return {
            f"{name}{end}": mean_over_classes(each, enough(each), confidence=confidence)
            for name, each in of.items()
        }

    def excess(over: dict[str, Ratios], end: str) -> dict[str, Mean]:
        return {
            f"{name}{end}": mean_over_classes(own[name], enough(each), each, confidence)
            for name, each in over.items()
        }

    own = ratios(
        measured.records, "fraction", "full", f"fraction{DERIVED}", f"full{DERIVED}", "causal"
    )
    null = ratios(measured.permuted, "fraction", f"fraction{DERIVED}")
    found = means(own) | means(null, "_null") | excess(null, "_excess")
    if untrained is not None:
        start = ratios(untrained.records, "fraction", "full")
        found |= means(start, "_untrained") | excess(start, "_untrained_excess")
    return found


def _metrics(means: dict[str, Mean], null: NullCosines) -> dict[str, float | int | None]:
    found: dict[str, float | int | None] = {}
    for name, mean in means.items():
        found |= mean.metrics(f"absorption_{name}")
    for whose in ("", "_untrained"):
        if f"fraction{whose}_excess" in means:
            letters = len(means[f"fraction{whose}_excess"].classes)
            found[f"absorption{whose}_excess_letters"] = letters
    found["absorption_cosine_derived"] = _known(null.threshold)
    found["absorption_cosine_random"] = _known(null.random)
    found["absorption_cosine_permuted"] = _known(null.permuted)
    return found


def _letter_table(
    means: dict[str, Mean],
    measured: AbsorptionMeasurements,
    repetitions: list[ProbedTask],
    quality: ProbeQuality,
    reasons: list[str],
    cosine: np.ndarray,
) -> pd.DataFrame:
    """Make a row for each class, evaluable or not; ``main_cosine`` is the mean cosine of the first
    main latents of the class with its probe."""
    probed = repetitions[0]
    counts = np.bincount(probed.words.labels.numpy(), minlength=probed.num_classes)
    right = torch.stack([(p.test_scores > 0) & p.members for p in repetitions])
    rights = right.sum((0, 1)).tolist()
    main = defaultdict(list)
    for _, _, splits in measured.splits:
        for number, split in enumerate(splits):
            if split is not None:
                main[number].append(split.main.tolist())
    rows = []
    for number, name in enumerate(probed.words.classes):
        row: dict[str, object] = {
            "class": name,
            "words": int(counts[number]),
            **quality.columns(number),
            "reason": reasons[number],
            "right": int(rights[number]),
            "main": main[number],
            "main_cosine": _mean_cosine(cosine[number], main[number]),
        }
        for what, mean in means.items():
            known = mean.classes.to_dict("index").get(number, {})
            row[what] = known.get("mean", np.nan)
            row |= {f"{what}_{end}": known.get(end, np.nan) for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def _word_table(records: pd.DataFrame, probed: ProbedTask, frequency: np.ndarray) -> pd.DataFrame:
    words = probed.words
    index = records["word"].to_numpy()
    table = records.drop(columns="word")
    table.insert(0, "text", [words.texts[i] for i in index])
    table.insert(0, "token", words.tokens.numpy()[index])
    table["class"] = [words.classes[i] for i in records["class"]]
    table["frequency"] = frequency[index]
    return table


def _mean_cosine(cosine: np.ndarray, main: list[list[int]]) -> float:
    """Average over the first main latents of folds and repetitions; NaN if there are none."""
    first = [latents[0] for latents in main if latents]
    return float(cosine[first].mean()) if first else float("nan")


def _cosines(repetitions: list[ProbedTask], sae: SAE) -> np.ndarray:
    """Average the cosines of probes and latents over folds and repetitions: [C, F]."""
    return np.mean(
        [Alignment.of(sae.W_dec, weight).cosine.cpu().numpy()
         for probed in repetitions for weight in probed.probes["weight"]],
        axis=0,
    )  # fmt: skip


def absorber_table(
    records: pd.DataFrame, repetitions: list[ProbedTask], cosine: np.ndarray, kept: list[int]
) -> pd.DataFrame:
    """List the latents that absorb words of each evaluable class, that with the most words first.

    Columns: ``class``, ``latent``, ``words`` (number of distinct words that it helps to absorb),
    ``strongest`` (number of words to which it contributes more than any other latent), ``cosine``
    with the probe, ``share`` (its contribution / the word's probe projection, mean over words),
    ``examples``.
    """
    words = repetitions[0].words
    absorbed = records.loc[(records["fraction"] > 0) & records["class"].isin(kept)]
    shares: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    first: Counter[tuple[int, int, int]] = Counter()
    columns = ("class", "word", "projection", "absorbers", "contributions")
    for number, word, whole, latents, parts in zip(*(absorbed[c] for c in columns), strict=True):
        for rank, (latent, part) in enumerate(zip(latents, parts, strict=True)):
            if latent >= 0:
                shares[number, latent][word].append(part / whole)
                first[number, latent, word] += rank == 0
    rows = []
    for (number, latent), by_word in shares.items():
        average = {word: float(np.mean(values)) for word, values in by_word.items()}
        best = sorted(average, key=lambda word: -average[word])
        rows.append(
            {
                "class": words.classes[number],
                "latent": latent,
                "words": len(average),
                "strongest": sum(first[number, latent, word] > 0 for word in average),
                "cosine": float(cosine[number, latent]),
                "share": float(np.mean(list(average.values()))),
                "examples": [words.texts[word] for word in best[:_EXAMPLES]],
            }
        )
    names = ["class", "latent", "words", "strongest", "cosine", "share", "examples"]
    table = pd.DataFrame(rows, columns=names)
    order = ["class", "words", "latent"]
    return table.sort_values(order, ascending=[True, False, True], ignore_index=True)


def _latent_columns(
    measured: AbsorptionMeasurements,
    absorbers: pd.DataFrame,
    kept: list[int],
    num_latents: int,
    num_classes: int,
) -> dict[str, np.ndarray]:
    """Return each latent's class as a main latent (−1: none) and the number of words it absorbs."""
    folds = [splits for _, _, splits in measured.splits]
    counts = np.zeros(num_latents, dtype=np.int64)
    np.add.at(counts, absorbers["latent"].to_numpy(dtype=np.int64), absorbers["words"].to_numpy())
    return {
        "absorption_class": main_classes(folds, kept, num_latents, num_classes),
        "absorption_is_absorber": counts > 0,
        "absorption_words": counts,
    }


def _known(value: float) -> float | None:
    """Return None for NaN, the value of a metric that cannot be evaluated."""
    return None if np.isnan(value) else float(value)
