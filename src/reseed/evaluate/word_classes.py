"""The classes of words that are evaluated: those whose probe is good and that have enough words.

Classes are chosen on other words than those on which they are then measured. Otherwise the F1 of
the chosen probes would be too high: by chance, some are good on the words that choose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.evaluate.probes import Scores, scores_of
from reseed.evaluate.word_task import ProbedTask, WordTaskConfig
from reseed.store.results import Metric
from reseed.system.console import counted

WEAK_PROBE = "F1 of the probe"
"""Beginning of the reason why a class whose probe is not good enough is not evaluated."""


def count_metrics(name: str) -> tuple[Metric, ...]:
    """Return the metrics of an evaluation on words that count its classes."""
    return (
        Metric(
            f"{name}_letters",
            "letters",
            "number of classes of words that are evaluated; all means are over these",
            count=True,
            advice="With few letters a mean says little about the others.",
        ),
        Metric(
            f"{name}_weak_probes",
            help="number of classes that are not evaluated because the F1 of their probe is not "
            "above `evaluation.probe_f1`",
        ),
        Metric(
            f"{name}_few_words",
            help="number of classes that are not evaluated because fewer than "
            "`evaluation.min_test_words` words of them are measured",
        ),
    )


@dataclass(frozen=True, eq=False)
class ProbeQuality:
    """Classes that the probes find, and how well they find them on words apart from that choice.

    Attributes:
        gate: the F1 that decides, in each fold.
        kept: mask of the classes that count in each fold.
        scores: scores on the test words of the folds where the class counts, [C]; on those of all
            folds for a class that counts in none.
        tested: number of different test words of each class in each fold.
    """

    gate: Float[Tensor, "folds C"]
    kept: Bool[Tensor, "folds C"]
    scores: Scores
    tested: Int[np.ndarray, "folds C"]

    @property
    def test_words(self) -> Int[np.ndarray, " C"]:
        """Number of different test words in the folds of `scores`."""
        return (self.tested * _counting(self.kept).numpy()).sum(0)

    def weights(self, classes: Sequence[int]) -> dict[int, float]:
        """Return the weight of some classes in means: the number of folds where each counts.

        A class that counts in few folds does so where its own words are its worst, because the
        better ones decide about the others. Means of equal weights would be too low.
        """
        return {number: float(self.kept[:, number].sum()) for number in classes}

    def columns(self, number: int) -> dict[str, object]:
        """Return the columns of a class in tables: ``test_words``, ``folds``, ``gate_f1`` (mean
        over folds) and ``probe_f1``."""
        return {
            "test_words": int(self.test_words[number]),
            "folds": int(self.kept[:, number].sum()),
            "gate_f1": float(self.gate[:, number].mean()),
            "probe_f1": float(self.scores.f1[number]),
        }


def probe_quality(repetitions: Sequence[ProbedTask], above: float) -> ProbeQuality:
    """Choose the classes by the F1 of their probes, and score these on other words.

    A class counts in a fold if the F1 on the test words of all other folds is higher than
    ``above``. With one fold, the F1 is that of the gate probes on validation words. F1 pools all
    prompt seeds.
    """
    first = repetitions[0]
    own = torch.stack([_counts(repetitions, "", k, f.test) for k, f in enumerate(first.folds)])
    if len(first.folds) > 1:
        gate = scores_of(*(own.sum(0) - own).unbind(1)).f1
    else:
        validation = first.folds[0].validation
        gate = scores_of(*_counts(repetitions, "gate_", 0, validation)).f1[None]
    kept = gate > above
    return ProbeQuality(
        gate=gate,
        kept=kept,
        scores=scores_of(*(own * _counting(kept)[:, None]).sum(0)),
        tested=np.array([first.words.distinct(fold.test) for fold in first.folds]),
    )


def _counting(kept: Bool[Tensor, "folds C"]) -> Bool[Tensor, "folds C"]:
    """Return the folds where each class counts; all for a class that counts in none."""
    return torch.where(kept.any(0), kept, True)


def _counts(
    repetitions: Sequence[ProbedTask], prefix: str, fold: int, some: Int[np.ndarray, " m"]
) -> Int[Tensor, "3 C"]:
    """Count, over some words and all repetitions, the right positive predictions of a fold's
    probes, all positive predictions, and the members of each class."""
    said = torch.cat([p.score(prefix, fold, some) > 0 for p in repetitions])
    there = torch.cat([p.members[some] for p in repetitions])
    return torch.stack([(said & there).sum(0), said.sum(0), there.sum(0)])


def refusal_reasons(probed: ProbedTask, quality: ProbeQuality, config: WordTaskConfig) -> list[str]:
    """Return the reason why each class cannot be evaluated; empty if it can."""
    counts = np.bincount(probed.words.labels.numpy(), minlength=probed.num_classes)
    everywhere, folds = quality.tested.sum(0), len(probed.folds)
    reasons = []
    for number, tested in enumerate(quality.test_words.tolist()):
        there = int(quality.kept[:, number].sum())
        if not counts[number]:
            reasons.append("no word")
        elif everywhere[number] < config.min_test_words:
            reasons.append(few_words(everywhere[number], "", config))
        elif not there:
            f1 = float(quality.gate[:, number].max())
            reasons.append(f"{WEAK_PROBE} {f1:.2f}, not above {config.probe_f1:g}")
        elif tested < config.min_test_words:
            where = f" in {there} of {folds} folds, where its probe is good"
            reasons.append(few_words(tested, where, config))
        else:
            reasons.append("")
    return reasons


def few_words(number: int, which: str, config: WordTaskConfig) -> str:
    """Return the reason to refuse a class of which only a few words are measured."""
    return f"{counted(number, 'test word')}{which}, fewer than {config.min_test_words}"


def kept_classes(quality: ProbeQuality, reasons: Sequence[str]) -> list[list[int]]:
    """List the classes that count in each fold: not refused, and with a good probe there."""
    return [
        [c for c, reason in enumerate(reasons) if not reason and kept[c]]
        for kept in quality.kept.tolist()
    ]


def class_counts(name: str, reasons: Sequence[str]) -> dict[str, float | int | None]:
    """Return the metrics `count_metrics` of an evaluation ``name``."""
    weak = sum(reason.startswith(WEAK_PROBE) for reason in reasons)
    there = sum(not reason for reason in reasons)
    few = len(reasons) - weak - there
    return {f"{name}_letters": there, f"{name}_weak_probes": weak, f"{name}_few_words": few}
