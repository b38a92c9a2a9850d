"""The evaluation ``absorption``: its settings, and the steps from an SAE to its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from reseed.activations.stream import generator
from reseed.activations.text_source import TextSource
from reseed.config import setting
from reseed.evaluate.absorption.causal import CausalRules, FoldCandidates, causal_absorption
from reseed.evaluate.absorption.projection import Alignment, NullCosines, Thresholds, null_cosines
from reseed.evaluate.absorption.records import main_latents, word_records
from reseed.evaluate.absorption.result import (
    DERIVED,
    LATENTS,
    METRICS,
    AbsorptionMeasurements,
    make_result,
)
from reseed.evaluate.base import (
    EvaluationInput,
    LoadedRun,
    Result,
    RunSource,
    needs_unembedding,
)
from reseed.evaluate.sparse_latents import SparseLatents, encode
from reseed.evaluate.splitting import MainLatents, find_fold_splits
from reseed.evaluate.word_classes import (
    ProbeQuality,
    kept_classes,
    probe_quality,
    refusal_reasons,
)
from reseed.evaluate.word_task import ProbedTask, WordTaskConfig
from reseed.sae.base import SAE
from reseed.store.results import FVU, L0

_DIRECTIONS = 0x64697265
_COUNTED = 10_000_000
"""Number of tokens of the training text in which word frequencies are counted."""


@dataclass(frozen=True)
class AbsorptionConfig(WordTaskConfig, name="absorption"):
    """Absorption: latents of a class are silent on words that other latents have absorbed.

    Args:
        cosine, full_cosine, share, absorbers: the published thresholds
            (`reseed.evaluate.absorption.projection.Thresholds`). A second measurement sets both
            cosines to the null cosine, found with random directions and permuted probes.
        null_directions: number of random directions, drawn with the activations' covariance.
        null_quantile: the null cosine is this quantile of the latents' cosines.
        causal: also measure the effect on the model's answer; this runs the whole model.
        causal_sample: maximum number of words of each class on which the effect is measured, over
            all folds, for each prompt seed.
        seed: seed of the random directions.
    """

    version: ClassVar[int] = 3
    title = "How much is hidden by absorption?"
    metrics = METRICS
    latents = LATENTS
    run_metrics = (FVU, L0)
    spare = (
        "absorption_fraction_derived_excess",
        "l0",
        "absorption_excess_letters",
        "absorption_fraction_untrained",
        "absorption_fraction_null",
        "absorption_full",
        "absorption_test_words",
        "fvu",
    )
    footnotes = (
        "**fraction**: the part of a letter's probe projection, in words with that letter, "
        "that other latents carry instead of the letter's own; **full**: fraction of words on "
        "which its own latents are silent and one other takes over. Both follow Chanin et al. "
        "and their thresholds, over **letters** whose probe is good enough and that have enough "
        "**words**. Lower is better.",
        "**permuted**: the same with letters assigned to words at random; **untrained**: the "
        "same for the untrained SAE. **excess**: fraction minus permuted, mean over the **excess "
        "letters** that have both. A value no higher than these is no sign of absorption. "
        "**derived**: with thresholds that meaningless directions do not reach in this "
        "dictionary. An SAE that reconstructs little can score well: check **FVU** and **L0**.",
    )

    cosine: float = setting(0.1, at_least=-1, at_most=1)
    full_cosine: float = setting(0.025, at_least=-1, at_most=1)
    share: float = setting(0.4, above=0, at_most=1)
    absorbers: int = setting(3, at_least=1)
    null_directions: int = setting(128, at_least=1)
    null_quantile: float = setting(0.999, above=0, below=1)
    causal: bool = False
    causal_sample: int = setting(200, at_least=1)
    seed: int = setting(0, at_least=0)

    def check(self, source: RunSource) -> None:
        super().check(source)
        if self.causal:
            needs_unembedding(self, source)
            tokenizer = source.tokenizer
            self.template(tokenizer, self.words(tokenizer)).check_answers()

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(self.cosine, self.full_cosine, self.share, self.absorbers)

    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        frequency = word_frequency(inputs, self.words(inputs.tokenizer).tokens.numpy())
        for repetitions, some in self.by_hookpoint(runs, inputs):
            quality = probe_quality(repetitions, self.probe_f1)
            for run in some:
                inputs.progress(f"absorption of {run.id}")
                yield run.id, self._evaluated(run, inputs, repetitions, quality, frequency)

    def _evaluated(
        self,
        run: LoadedRun,
        inputs: EvaluationInput,
        repetitions: list[ProbedTask],
        quality: ProbeQuality,
        frequency: np.ndarray,
    ) -> Result:
        reasons = refusal_reasons(repetitions[0], quality, self)
        kept = kept_classes(quality, reasons)
        measured = self.measured(run.sae, repetitions, kept)
        untrained = None
        if run.untrained is not None:
            # An untrained SAE has no inference threshold yet: half of its latents would be active.
            run.untrained.initialise_threshold(repetitions[0].x)
            untrained = self.measured(run.untrained, repetitions, kept, null=False)
        if self.causal:
            self._add_causal(measured, run, inputs, repetitions)
        return make_result(
            self, repetitions, measured, untrained, run.sae, quality, reasons, frequency
        )

    def measured(
        self,
        sae: SAE,
        repetitions: list[ProbedTask],
        kept: Sequence[Sequence[int]],
        null: bool = True,
    ) -> AbsorptionMeasurements:
        """Measure every word of the kept classes in every repetition, encoded once.

        Args:
            kept: the classes that count in each fold.
            null: also measure with permuted labels, and with thresholds derived from the null.
        """
        codes = [encode(sae, probed.x) for probed in repetitions]
        thresholds = {"": self.thresholds}
        cosines = None
        if null:
            cosines = self._null_cosines(sae, codes, repetitions)
            level = cosines.threshold
            thresholds[DERIVED] = Thresholds(level, level, self.share, self.absorbers)
        records, permuted, splits = [], [], []
        for probed, code in zip(repetitions, codes, strict=True):
            for fold, classes in enumerate(kept):
                members = (probed.members, *([probed.permuted_members(fold)] if null else []))
                mine, *others = find_fold_splits(self, probed, code, fold, classes, *members)
                splits.append((probed, fold, mine))
                records.append(word_records(sae, probed, fold, code, mine, thresholds))
                permuted += [
                    word_records(sae, probed, fold, code, each, thresholds, permuted=True)
                    for each in others
                ]
        return AbsorptionMeasurements(
            records=pd.concat(records, ignore_index=True),
            permuted=pd.concat(permuted, ignore_index=True) if null else None,
            splits=splits,
            null=cosines,
            l0=sum(len(code.value) for code in codes) / sum(len(code) for code in codes),
        )

    def _null_cosines(
        self, sae: SAE, codes: list[SparseLatents], repetitions: list[ProbedTask]
    ) -> NullCosines:
        return null_cosines(
            sae.W_dec,
            torch.unique(torch.cat([code.live for code in codes])),
            repetitions[0].x,
            torch.cat([p.probes["permuted_weight"].flatten(0, 1) for p in repetitions]),
            directions=self.null_directions,
            quantile=self.null_quantile,
            random=generator(_DIRECTIONS, self.seed),
        )

    def _add_causal(
        self,
        measured: AbsorptionMeasurements,
        run: LoadedRun,
        inputs: EvaluationInput,
        repetitions: list[ProbedTask],
    ) -> None:
        """Add two columns to the records: ``candidate``, whether the regression on the main latents
        gets the word wrong, and ``causal``, the number of absorbed words that it represents."""
        assert inputs.model is not None
        rules = CausalRules(self.causal_sample, self.full_cosine, self.icl_words)
        records = measured.records
        records["causal"] = 0.0
        records["candidate"] = False
        for probed in repetitions:
            here = records.prompt_seed == probed.prompt_seed
            folds = [
                FoldCandidates(
                    _missed(records.loc[here & (records.fold == fold)], probed, fold, splits),
                    main_latents(splits),
                    Alignment.of(run.sae.W_dec, probed.probes["weight"][fold]),
                )
                for of, fold, splits in measured.splits
                if of is probed
            ]
            found = causal_absorption(inputs.model, run.hook, run.sae, probed, folds, rules)
            words = records.loc[here, "word"]
            records.loc[here, "causal"] = words.map(found).fillna(0.0)
            records.loc[here, "candidate"] = words.isin(list(found))


def _missed(
    records: pd.DataFrame, probed: ProbedTask, fold: int, splits: list[MainLatents | None]
) -> np.ndarray:
    """Return words that the probe gets right and the main latents' regression gets wrong."""
    place = {word: i for i, word in enumerate(probed.folds[fold].test.tolist())}
    missed = []
    for word, number in zip(records["word"].tolist(), records["class"].tolist(), strict=True):
        split = splits[number]
        if split is not None and split.scores[place[word], len(split.main) - 1] <= 0:
            missed.append(word)
    return np.array(missed, dtype=np.int64)


def word_frequency(inputs: EvaluationInput, tokens: np.ndarray) -> np.ndarray:
    """Count each token in the first `_COUNTED` tokens of the training text."""
    assert isinstance(inputs.source, TextSource)
    text = np.asarray(inputs.source.train_store.tokens[:_COUNTED])
    return np.bincount(text, minlength=int(tokens.max()) + 1)[tokens]
