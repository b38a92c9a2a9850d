"""Feature splitting: the number of latents for one concept (Chanin et al. 2024, section 4).

k-sparse probing: an L1 probe ranks the latents, and for every k a logistic regression is fitted on
the first k latents. The main latents S are the first ones, as long as each raises F1. There are C
classes; each fold and prompt seed has its own S.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.stream import generator
from reseed.evaluate.base import EvaluationInput, LoadedRun, Metric, Result
from reseed.evaluate.probes import Scores, fit_nested, precision_recall_f1, rank_latents
from reseed.evaluate.sparse_latents import SparseLatents, encode
from reseed.evaluate.word_task import ProbedTask, WordTaskConfig, probe_quality
from reseed.evaluate.words import Fold
from reseed.store.results import L0

TOO_FEW_WORDS = "too few words to choose latents"
"""Reason why a class is not evaluated although its probe is good enough."""
LETTERS = Metric(
    "splitting_letters",
    "letters",
    "number of classes of words that are evaluated, because the F1 of their probe is above "
    "`evaluation.probe_f1` and they have enough words; all means are over these",
    count=True,
    advice="With few letters a mean says little about the others.",
)
CLASS = Metric(
    "splitting_class",
    help="index of the class that the latent stands for most often; −1 if there is none",
)
_RANKING = 0x72616E6B


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


def find_all_splits(
    config: WordTaskConfig, probed: ProbedTask, codes: SparseLatents
) -> list[list[MainLatents | None]]:
    """Find the main latents of every class in every fold of a repetition (one prompt seed)."""
    folds = range(len(probed.folds))
    return [find_fold_splits(config, probed, codes, fold, probed.members) for fold in folds]


def find_fold_splits(
    config: WordTaskConfig,
    probed: ProbedTask,
    codes: SparseLatents,
    fold: int,
    member: Bool[Tensor, "n C"],
) -> list[MainLatents | None]:
    """Find the main latents of every class in one fold.

    Args:
        member: classes of each word; they may differ from the task's (permuted labels).
    """
    return find_splits(
        codes,
        member,
        probed.folds[fold],
        most=config.max_latents,
        step=config.f1_step,
        l1=config.l1,
        random=generator(_RANKING, probed.prompt_seed, fold),
    )


@dataclass(frozen=True)
class SplittingConfig(WordTaskConfig, name="splitting"):
    """Evaluation of how many latents represent each class of words, and how well the first does."""

    title = "How many latents stand for a letter?"
    metrics = (
        LETTERS,
        Metric("splits", "splits", "number of latents that stand for a letter, minus one, by "
               "k-sparse probing: a further latent counts if it raises F1 by more than "
               "`evaluation.f1_step`", interval=True,
               advice="The step is a choice: .01 to .05 are equally valid."),
        Metric("splitting_probe_f1", "probe\nF1", "F1 of the probe on the model's activations"),
        Metric("splitting_f1", "latent\nF1", "F1 of the firing of the letter's first latent on "
               "words not used to choose it", interval=True,
               advice="Compare it with `splitting_probe_f1`."),
        Metric("splitting_precision", "precision", "precision of the firing of that latent"),
        Metric("splitting_recall", "recall", "recall of the firing of that latent",
               advice="Low recall at high precision is a sign of absorption."),
    )  # fmt: skip
    latents = (CLASS,)
    run_metrics = (L0,)
    spare = ("l0",)
    footnotes = (
        "**letters**: classes of words that a probe finds in the model's activations (its F1 "
        "is above `probe_f1`); all means are over these. **splits**: number of latents that "
        "stand for a letter, minus one (k-sparse probing).",
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
        found = []
        for probed in repetitions:
            codes = encode(run.sae, probed.x)
            found.append((probed, codes, find_all_splits(self, probed, codes)))
        return _result(found, self)


def refusal_reasons(repetitions: list[ProbedTask], quality: Scores, gate: float) -> list[str]:
    """Return the reason why each class cannot be evaluated; empty if it can."""
    words = repetitions[0].words
    counts = np.bincount(words.labels.numpy(), minlength=len(words.classes))
    reasons = []
    for count, f1 in zip(counts, quality.f1.tolist(), strict=True):
        if not count:
            reasons.append("no word")
        elif f1 <= gate:
            reasons.append(f"F1 of the probe {f1:.2f}, not above {gate:g}")
        else:
            reasons.append("")
    return reasons


RepetitionSplits = list[tuple[ProbedTask, SparseLatents, list[list[MainLatents | None]]]]


def _result(found: RepetitionSplits, config: WordTaskConfig) -> Result:
    repetitions = [probed for probed, _, _ in found]
    quality = probe_quality(repetitions)
    letters = letter_table(found, quality, refusal_reasons(repetitions, quality, config.probe_f1))
    kept = letters.loc[letters["reason"] == ""]
    columns = {
        "splits": "splits",
        "splitting_f1": "f1",
        "splitting_precision": "precision",
        "splitting_recall": "recall",
        "splitting_probe_f1": "probe_f1",
    }
    metrics: dict[str, float | int | None] = {
        name: float(kept[column].mean()) if len(kept) else None for name, column in columns.items()
    }
    curves = pd.DataFrame(
        [
            {"class": row["class"], "k": k + 1, "f1": f1}
            for row in letters.to_dict("records")
            for k, f1 in enumerate(row["f1_by_k"])
        ],
        columns=["class", "k", "f1"],
    )
    tables = {"letters": letters.drop(columns="f1_by_k"), "f1_by_k": curves}
    num_latents, num_classes = found[0][1].num_latents, repetitions[0].num_classes
    each = [split for _, _, splits in found for split in splits]
    main = main_classes(each, kept.index.tolist(), num_latents, num_classes)
    return Result({"splitting_letters": len(kept), **metrics}, tables, {"splitting_class": main})


def letter_table(found: RepetitionSplits, quality: Scores, reasons: list[str]) -> pd.DataFrame:
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
            "reason": reasons[number],
            "probe_precision": float(quality.precision[number]),
            "probe_recall": float(quality.recall[number]),
            "probe_f1": float(quality.f1[number]),
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
