"""Feature splitting: the number of latents for one concept (Chanin et al. 2024, section 4).

k-sparse probing: an L1 probe ranks the latents, and for every k a logistic regression is fitted on
the first k latents. The main latents S are the first ones, as long as each raises F1. There are C
classes; each fold and prompt seed has its own S.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.stream import generator
from reseed.evaluate.base import EvaluationInput, LoadedRun, Metric, Result
from reseed.evaluate.probes import fit_nested, precision_recall_f1, rank_latents
from reseed.evaluate.sparse_latents import SparseLatents, encode
from reseed.evaluate.word_classes import (
    ProbeQuality,
    class_counts,
    count_metrics,
    kept_classes,
    probe_quality,
    refusal_reasons,
)
from reseed.evaluate.word_means import Ratios, interval_metrics, mean_over_classes
from reseed.evaluate.word_split import Fold
from reseed.evaluate.word_task import ProbedTask, WordTaskConfig
from reseed.store.results import L0

TOO_FEW_WORDS = "too few words to choose latents"
"""Reason why a class is not evaluated although its probe is good enough."""
CLASS = Metric(
    "splitting_class",
    help="index of the class that the latent stands for most often; −1 if there is none",
)
_RANKING = 0x72616E6B
_SCORES = ("f1", "precision", "recall", "probe_f1")


@dataclass(frozen=True, eq=False)
class MainLatents:
    """The latents of one class in one fold.

    Attributes:
        ranked: the latents tried, best first.
        main: the main latents S: the first ones of ``ranked``.
        scores: score of every test word by the regression on the first k latents, for each k.
    """

    ranked: Int[Tensor, " K"]
    main: Int[Tensor, " S"]
    scores: Float[Tensor, "test K"]


def choose_main(f1: Sequence[float], step: float) -> int:
    """Return the number of main latents: each must raise F1 by more than ``step``; at least 1."""
    size = 1
    while size < len(f1) and f1[size] > f1[size - 1] + step:
        size += 1
    return size


def find_splits(
    codes: SparseLatents,
    member: Bool[Tensor, "n C"],
    fold: Fold,
    *,
    most: int = 10,
    step: float = 0.03,
    l1: float = 0.01,
    random: torch.Generator,
) -> list[MainLatents | None]:
    """Find the main latents of every class; None if its fit or validation set has no words."""
    most = min(most, codes.num_latents)
    fit, validation, test = (codes.rows(part) for part in (fold.fit, fold.validation, fold.test))
    ranked = rank_latents(fit, member[fold.fit], l1, most, random)
    splits: list[MainLatents | None] = []
    for number, latents in enumerate(ranked):
        here, chosen = member[fold.fit, number], member[fold.validation, number]
        if not (0 < int(here.sum()) < len(here) and bool(chosen.any())):
            splits.append(None)
            continue
        probe = fit_nested(fit.columns(latents), here)
        found = probe.score(validation.columns(latents).cpu()) > 0
        f1 = precision_recall_f1(found, chosen[:, None].expand_as(found)).f1
        size = choose_main(f1.tolist(), step)
        splits.append(
            MainLatents(latents, latents[:size], probe.score(test.columns(latents).cpu()))
        )
    return splits


def find_fold_splits(
    config: WordTaskConfig,
    probed: ProbedTask,
    codes: SparseLatents,
    fold: int,
    kept: Sequence[int],
    *members: Bool[Tensor, "n C"],
) -> list[list[MainLatents | None]]:
    """Find the main latents of some classes in one fold; None for the other classes.

    Args:
        kept: these classes.
        members: classes of each word, by the true labels and by others (permuted ones); all are
            fitted together, and each has its own list.
    """
    lists: list[list[MainLatents | None]] = [[None] * probed.num_classes for _ in members]
    if not kept:
        return lists
    found = find_splits(
        codes,
        torch.cat([member[:, kept] for member in members], dim=1),
        probed.folds[fold],
        most=config.max_latents,
        step=config.f1_step,
        l1=config.l1,
        random=generator(_RANKING, probed.prompt_seed, fold),
    )
    for i, split in enumerate(found):
        lists[i // len(kept)][kept[i % len(kept)]] = split
    return lists


@dataclass(frozen=True)
class SplittingConfig(WordTaskConfig, name="splitting"):
    """Evaluation of how many latents represent each class of words, and how well the first does."""

    version: ClassVar[int] = 2
    title = "How many latents stand for a letter?"
    metrics = (
        *count_metrics("splitting"),
        Metric("splits", "splits", "number of latents that stand for a letter, minus one, by "
               "k-sparse probing: a further latent counts if it raises F1 by more than "
               "`evaluation.f1_step`", interval=True,
               advice="The step is a choice: .01 to .05 are equally valid."),
        Metric("splitting_probe_f1", "probe\nF1", "F1 of the probe on the model's activations, on "
               "words not used to choose the letters"),
        Metric("splitting_f1", "latent\nF1", "F1 of the firing of the letter's first latent on "
               "words not used to choose it", interval=True,
               advice="Compare it with `splitting_probe_f1`."),
        Metric("splitting_precision", "precision", "precision of the firing of that latent"),
        Metric("splitting_recall", "recall", "recall of the firing of that latent",
               advice="Low recall at high precision is a sign of absorption."),
        *(m for name in _SCORES for m in interval_metrics(f"splitting_{name}")),
    )  # fmt: skip
    latents = (CLASS,)
    run_metrics = (L0,)
    spare = ("l0",)
    footnotes = (
        "**letters**: classes of words that a probe finds in the model's activations (its F1 "
        "is above `probe_f1`) and that have enough words; all means are over these. **splits**: "
        "number of latents that stand for a letter, minus one (k-sparse probing).",
        "**latent F1**, **precision**, **recall**: of the firing of the letter's first latent "
        "on words not used to choose it; **probe**: on the activations themselves. Low recall "
        "at high precision is a sign of absorption. Compare at equal **L0**.",
    )

    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        for repetitions, some in self.by_hookpoint(runs, inputs):
            for run in some:
                yield run.id, self.measured(run, repetitions)

    def measured(self, run: LoadedRun, repetitions: list[ProbedTask]) -> Result:
        quality = probe_quality(repetitions, self.probe_f1)
        reasons = refusal_reasons(repetitions[0], quality, self)
        kept = kept_classes(quality, reasons)
        found = []
        for probed in repetitions:
            codes = encode(run.sae, probed.x)
            splits = [
                find_fold_splits(self, probed, codes, fold, classes, probed.members)[0]
                for fold, classes in enumerate(kept)
            ]
            found.append((probed, codes, splits))
        return _result(found, quality, reasons, self.confidence)


RepetitionSplits = list[tuple[ProbedTask, SparseLatents, list[list[MainLatents | None]]]]


def _result(
    found: RepetitionSplits, quality: ProbeQuality, reasons: list[str], confidence: float
) -> Result:
    letters = letter_table(found, quality, reasons)
    kept = letters.loc[letters["reason"] == ""]
    metrics: dict[str, float | int | None] = class_counts("splitting", letters["reason"].tolist())
    weights = quality.weights(kept.index.tolist())
    metrics["splits"] = (
        float(np.average(kept["splits"], weights=list(weights.values()))) if weights else None
    )
    for name, ratios in _score_ratios(found).items():
        mean = mean_over_classes(ratios, weights, confidence=confidence)
        metrics |= mean.metrics(f"splitting_{name}")
        for end in ("low", "high"):
            letters[f"{name}_{end}"] = mean.classes[end]
    curves = pd.DataFrame(
        [
            {"class": row["class"], "k": k + 1, "f1": f1}
            for row in letters.to_dict("records")
            for k, f1 in enumerate(row["f1_by_k"])
        ],
        columns=["class", "k", "f1"],
    )
    tables = {"letters": letters.drop(columns="f1_by_k"), "f1_by_k": curves}
    num_latents, num_classes = found[0][1].num_latents, len(letters)
    each = [split for _, _, splits in found for split in splits]
    main = main_classes(each, kept.index.tolist(), num_latents, num_classes)
    return Result(metrics, tables, {"splitting_class": main})


def letter_table(
    found: RepetitionSplits, quality: ProbeQuality, reasons: list[str]
) -> pd.DataFrame:
    """Return a row for each class: its splits, and the scores of its first main latent and probe.

    ``precision``, ``recall`` and ``f1`` score the firing of the first main latent on test words,
    ``f1_by_k`` the regressions on the first k latents.
    """
    words = found[0][0].words
    rows = []
    for number, name in enumerate(words.classes):
        row: dict[str, object] = {
            "class": name,
            "words": int((words.labels == number).sum()),
            **quality.columns(number),
            "reason": reasons[number],
            "probe_precision": float(quality.scores.precision[number]),
            "probe_recall": float(quality.scores.recall[number]),
        }
        rows.append(row | _of_latents(found, number))
        if not reasons[number] and np.isnan(rows[-1]["splits"]):
            rows[-1]["reason"] = TOO_FEW_WORDS
    return pd.DataFrame(rows)


def _of_latents(found: RepetitionSplits, number: int) -> dict[str, object]:
    sizes, fired, by_k, member, mains = [], [], [], [], []
    for probed, codes, splits in found:
        for fold, each in zip(probed.folds, splits, strict=True):
            split = each[number]
            if split is None:
                continue
            fired.append(codes.rows(fold.test).columns(split.main[:1])[:, 0].cpu() > 0)
            by_k.append(split.scores > 0)
            member.append(probed.members[fold.test, number])
            sizes.append(len(split.main))
            mains.append(split.main.tolist())
    if not sizes:
        nothing = dict.fromkeys(("splits", "precision", "recall", "f1"), float("nan"))
        return {**nothing, "main": [], "f1_by_k": []}
    there = torch.cat(member)
    scores = precision_recall_f1(torch.cat(fired), there)
    curve = torch.cat(by_k)
    return {
        "splits": float(np.mean(sizes)) - 1,
        "precision": float(scores.precision),
        "recall": float(scores.recall),
        "f1": float(scores.f1),
        "main": mains,
        "f1_by_k": precision_recall_f1(curve, there[:, None].expand_as(curve)).f1.tolist(),
    }


def _score_ratios(found: RepetitionSplits) -> dict[str, Ratios]:
    """Return the scores `_SCORES` as ratios over test words, of the classes that are fitted."""
    parts: list[tuple[np.ndarray, ...]] = []
    for seed, (probed, codes, splits) in enumerate(found):
        for fold, each in zip(probed.folds, splits, strict=True):
            test, number = torch.from_numpy(fold.test), [c for c, s in enumerate(each) if s]
            first = torch.tensor([s.main[0] for s in each if s], dtype=torch.long)
            there = probed.members[test][:, number]
            fired = codes.rows(test).columns(first).cpu() > 0
            scored = probed.test_scores[test][:, number] > 0
            row, column = (there | fired | scored).nonzero(as_tuple=True)
            word = probed.words.spelling_ids[fold.test[row.numpy()]]
            flags = (flag[row, column].numpy() for flag in (there, fired, scored))
            classes = np.array(number, dtype=np.int64)[column.numpy()]
            parts.append((classes, word, np.full(len(row), seed), *flags))
    number, word, seed, there, fired, scored = map(np.concatenate, zip(*parts, strict=True))
    words = found[0][0].words
    shape = (len(found), len(words.classes), words.num_spellings)

    # A latent that fires on no test word has a precision of 0, as in the table of letters.
    fires = np.bincount(number, fired, len(words.classes)) > 0

    def ratio(top: np.ndarray, *bottom: np.ndarray) -> Ratios:
        whole = np.stack(bottom).sum(0, dtype=np.float64)
        return Ratios.of(number, word, seed, len(bottom) * (top & there), whole, shape)

    return {
        "f1": ratio(fired, fired, there),
        "precision": ratio(fired, np.where(fires[number], fired, there)),
        "recall": ratio(fired, there),
        "probe_f1": ratio(scored, scored, there),
    }


def main_classes(
    folds: Iterable[Sequence[MainLatents | None]],
    kept: Sequence[int],
    num_latents: int,
    num_classes: int,
) -> Int[np.ndarray, " F"]:
    """Return the class that each latent is most often main for; −1: none.

    Args:
        folds: splits of every class, in each fold and repetition.
        kept: the classes that are evaluated.
    """
    votes = np.zeros((num_latents, num_classes), dtype=np.int32)
    for splits in folds:
        for number in kept:
            split = splits[number]
            if split is not None:
                votes[split.main.numpy(), number] += 1
    return np.where(votes.any(1), votes.argmax(1), -1).astype(np.int32)
