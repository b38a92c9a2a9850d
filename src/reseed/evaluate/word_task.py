"""A task on words: the words, the model's activations at them, and the probes.

Results about the model are computed once and stored (`ModelCache`): for every hookpoint and
prompt seed the activations at the words' tokens, and the probes of every fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.stream import generator
from reseed.config import digest, setting
from reseed.errors import ConfigError
from reseed.evaluate.base import (
    EvaluationConfig,
    EvaluationInput,
    LoadedRun,
    RunSource,
    needs_language_model,
)
from reseed.evaluate.probes import train_probe
from reseed.evaluate.word_split import Fold, make_folds, permute_words, split_words
from reseed.evaluate.words import (
    Prompts,
    Template,
    Words,
    first_letter_words,
    labelled_words,
    make_prompts,
)

VERSION = 2
"""Version of the stored results. Increase it when a code change alters them."""
LINES = {
    "first_letter": "{word} has the first letter: {answer}",
    "labelled": "{word} is of the class: {answer}",
}
_ACTIVATIONS = "word-activations"
_PROMPTS, _PROBES, _PERMUTED, _GATE = 0x70726F6D, 0x70726F62, 0x7065726D, 0x67617465


@dataclass(frozen=True)
class WordTaskConfig(EvaluationConfig):
    """Settings that all evaluations on words share.

    Args:
        task: ``first_letter``, or ``labelled``: the tokens and labels of ``task_file``.
        task_file: a csv file with columns ``token`` and ``label``.
        line: the text of a prompt line, with ``{word}`` and ``{answer}``; null uses the task's own
            (`LINES`).
        icl_words: number of example lines, each with its answer, before the word in question.
        prompt_seeds: seeds for sampling the example words; everything is measured once per seed.
        split_seed: seed of the split of the words into fit, validation and test sets.
        folds: number of folds, each with its own probes; every word is tested in one of them. With
            1, only a fifth of the words is tested: enough for vocabularies of tens of thousands of
            words, and faster.
        probe_f1: a class is evaluated if the F1 of its probe is above this, measured on other words
            than those that are then reported (`probe_quality`).
        min_test_words: a class is evaluated if at least this many words of it are measured; the
            spellings of a word ("dog", " Dog") count as one.
        max_latents: maximum number of latents that represent a class: k = 1 … ``max_latents`` are
            tried.
        f1_step: a further latent must raise F1 by more than this; .01 to .05 are equally valid.
        l1: weight of the L1 penalty of the probe that ranks the latents.
        confidence: confidence level of the intervals.
    """

    task: str = setting("first_letter", choices=tuple(LINES))
    task_file: str | None = None
    line: str | None = None
    icl_words: int = setting(10, at_least=0)
    prompt_seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int = setting(0, at_least=0)
    folds: int = setting(5, at_least=1)
    probe_f1: float = setting(0.6, at_least=0, below=1)
    min_test_words: int = setting(20, at_least=2)
    max_latents: int = setting(10, at_least=1)
    f1_step: float = setting(0.03, at_least=0, below=1)
    l1: float = setting(0.01, at_least=0)
    confidence: float = setting(0.95, above=0, below=1)

    def validate(self) -> None:
        if (self.task == "labelled") != (self.task_file is not None):
            rule = "is required with" if self.task == "labelled" else "is only for"
            raise ConfigError(
                f"{{key}} {rule} task=labelled; got {self.task_file!r} with task={self.task}",
                "task_file",
            )
        if not self.prompt_seeds or len(set(self.prompt_seeds)) < len(self.prompt_seeds):
            given = list(self.prompt_seeds)
            raise ConfigError(f"{{key}} must be one or more distinct seeds; got {given}",
                              "prompt_seeds")  # fmt: skip
        if min(self.prompt_seeds) < 0:
            raise ConfigError(
                f"{{key}} must be at least 0; got {min(self.prompt_seeds)}", "prompt_seeds"
            )
        line = self.line
        if line is not None and not (line.startswith("{word}") and "{answer}" in line):
            raise ConfigError(
                f"{{key}} must begin with {{word}} and contain {{answer}}; got {line!r}", "line"
            )

    @classmethod
    def remark(cls, values: Mapping[str, float]) -> str:
        if values.get(f"{cls.name}_letters") != 0:
            return ""
        weak, few = (
            f"{values.get(f'{cls.name}_{what}', 0):.0f}" for what in ("weak_probes", "few_words")
        )
        return (
            f"no letter can be evaluated: the F1 of the probe is not above `probe_f1` for {weak}, "
            f"and fewer than `min_test_words` words are measured for {few}; the table `letters` "
            "has each letter's reason"
        )

    def check(self, source: RunSource) -> None:
        needs_language_model(self, source)

    def words(self, tokenizer: Any) -> Words:
        """Return the words of the task."""
        if self.task_file is not None:
            return labelled_words(tokenizer, self.task_file)
        return first_letter_words(tokenizer)

    def template(self, tokenizer: Any, words: Words) -> Template:
        return Template.of(tokenizer, words, self.line or LINES[self.task])

    def by_hookpoint(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[list[ProbedTask], list[LoadedRun]]]:
        """Yield the task at each hookpoint, for all prompt seeds, and the runs of the hookpoint."""
        hooks = list(dict.fromkeys(run.hook for run in runs))
        for hook in hooks:
            repetitions = list(self.repetitions(inputs, hook, hooks))
            yield repetitions, [run for run in runs if run.hook == hook]

    def repetitions(
        self, inputs: EvaluationInput, hook: Hookpoint, hooks: Sequence[Hookpoint] = ()
    ) -> Iterator[ProbedTask]:
        """Yield the task at a hookpoint, once for each prompt seed.

        Args:
            hooks: hookpoints needed later; the same pass of the model stores their activations.
        """
        words = self.words(inputs.tokenizer)
        part = split_words(words, self.folds, self.split_seed)
        folds = make_folds(words, part, self.folds, self.split_seed)
        for seed in self.prompt_seeds:
            yield self._probed(inputs, hook, hooks, words, part, folds, seed)

    def _probed(
        self,
        inputs: EvaluationInput,
        hook: Hookpoint,
        hooks: Sequence[Hookpoint],
        words: Words,
        part: Int[np.ndarray, " n"],
        folds: list[Fold],
        seed: int,
    ) -> ProbedTask:
        model = inputs.model
        assert model is not None, "`check` refuses runs without a language model"
        template = self.template(inputs.tokenizer, words)

        def key_at(place: Hookpoint) -> dict[str, Any]:
            return self._key(model, place, words, template, seed)

        def activations() -> dict[str, Tensor]:
            others = [
                h for h in dict.fromkeys(hooks)
                if h != hook and inputs.model_cache.is_missing(_ACTIVATIONS, key_at(h))
            ]  # fmt: skip
            listed = ", ".join(map(str, (hook, *others)))
            inputs.progress(f"reading {len(words):,} words at {listed}, prompt seed {seed}")
            everything = np.arange(len(words))
            random = np.random.default_rng([_PROMPTS, seed])
            prompts = make_prompts(words, template, everything, part, self.icl_words, random)
            found = word_activations(model, [hook, *others], prompts)
            for other in others:
                inputs.model_cache.put(_ACTIVATIONS, key_at(other), {"x": found[other]})
            return {"x": found[hook]}

        key = key_at(hook)
        x = inputs.model_cache.get(_ACTIVATIONS, key, activations)["x"]

        def probes() -> dict[str, Tensor]:
            inputs.progress(f"training probes at {hook}, prompt seed {seed}")
            return train_probes(words, x.to(inputs.device), folds, seed)

        made = inputs.model_cache.get("word-probes", key, probes)
        return ProbedTask(words, template, x, part, folds, seed, made)

    def _key(
        self, model: LanguageModel, hook: Hookpoint, words: Words, template: Template, seed: int
    ) -> dict[str, Any]:
        found = model.resolved
        texts = [template.opening, sorted(template.after.items())]
        return {
            "version": VERSION,
            "fingerprints": dict(found.fingerprints),
            "model": found.config.signed(),
            "hookpoint": hook.key,
            "words": digest([words.tokens.tolist(), words.labels.tolist(), words.texts], 32),
            "classes": len(words.classes),
            "template": digest(texts, 32),
            "icl_words": self.icl_words,
            "split": [self.folds, self.split_seed],
            "prompt_seed": seed,
        }


def train_probes(
    words: Words, x: Float[Tensor, "n D"], folds: Sequence[Fold], seed: int
) -> dict[str, Tensor]:
    """Train the probes of every fold, by true and by permuted labels (`ProbedTask.probes`).

    Labels are permuted within the train and within the test words, so that the size of every class
    is the same in both.
    """
    found: dict[str, list[Tensor]] = {}

    def train(name: str, some: Int[np.ndarray, " m"], labels: Tensor, random: torch.Generator):
        member = F.one_hot(labels, len(words.classes)).bool()[some]
        weight, bias = train_probe(x[some], member, random)
        found.setdefault(f"{name}weight", []).append(weight.cpu())
        found.setdefault(f"{name}bias", []).append(bias.cpu())

    for number, fold in enumerate(folds):
        shuffler = np.random.default_rng([_PERMUTED, seed, number])
        permuted = words.labels.clone()
        for some in (fold.train, fold.test):
            permuted[some] = words.labels[permute_words(words, some, shuffler)]
        found.setdefault("permuted", []).append(permuted)
        random = generator(_PROBES, seed, number)
        train("", fold.train, words.labels, random)
        train("permuted_", fold.train, permuted, random)
    if len(folds) == 1:
        train("gate_", folds[0].fit, words.labels, generator(_GATE, seed))
    return {name: torch.stack(each) for name, each in found.items()}


@dataclass(frozen=True, eq=False)
class ProbedTask:
    """A task at a hookpoint for one prompt seed. All tensors are on the CPU.

    Attributes:
        words: the words.
        template: the tokens between the words of a prompt.
        x: activation at each word's token, in float32.
        part: index of each word's part of the split (`split_words`).
        folds: fit, validation and test words of each fold.
        prompt_seed: seed of the example words in the prompts.
        probes: ``weight`` [folds, C, D] and ``bias`` [folds, C]; ``permuted`` [folds, n], permuted
            labels, and their probes with the prefix ``permuted_``; with one fold, also probes that
            were fitted to the fit words alone, with the prefix ``gate_``.
    """

    words: Words
    template: Template
    x: Float[Tensor, "n D"]
    part: Int[np.ndarray, " n"]
    folds: list[Fold]
    prompt_seed: int
    probes: dict[str, Tensor] = field(repr=False)

    @property
    def num_classes(self) -> int:
        return len(self.words.classes)

    @cached_property
    def members(self) -> Bool[Tensor, "n C"]:
        return F.one_hot(self.words.labels, self.num_classes).bool()

    def permuted_members(self, fold: int) -> Bool[Tensor, "n C"]:
        """Return the membership by the permuted labels of a fold."""
        return F.one_hot(self.probes["permuted"][fold], self.num_classes).bool()

    @cached_property
    def test_scores(self) -> Float[Tensor, "n C"]:
        """The probes' scores of the test words; NaN for words that no fold tests."""
        return self._scores("")

    @cached_property
    def permuted_scores(self) -> Float[Tensor, "n C"]:
        """`test_scores` by the probes of the permuted labels."""
        return self._scores("permuted_")

    def _scores(self, prefix: str) -> Float[Tensor, "n C"]:
        scores = torch.full((len(self.x), self.num_classes), torch.nan)
        for number, fold in enumerate(self.folds):
            scores[fold.test] = self.score(prefix, number, fold.test)
        return scores

    def score(self, prefix: str, fold: int, some: Int[np.ndarray, " m"]) -> Float[Tensor, "m C"]:
        """Score some words by the probes of a fold; ``prefix`` says which (`probes`)."""
        weight, bias = (self.probes[f"{prefix}{name}"][fold] for name in ("weight", "bias"))
        return self.x[some] @ weight.T + bias


def word_activations(
    model: LanguageModel, hooks: Sequence[Hookpoint], prompts: Prompts
) -> dict[Hookpoint, Float[Tensor, "n D"]]:
    """Return the activation at each word's token; the model stops at the deepest hookpoint."""
    found: dict[Hookpoint, list[Tensor]] = {hook: [] for hook in hooks}
    start = 0
    for batch in model.activations(prompts.tokens, hooks):
        size = len(batch[hooks[0]])
        at = prompts.word_position[start : start + size]
        for hook, there in batch.items():
            rows = torch.arange(size, device=there.device)
            found[hook].append(there[rows, at.to(there.device)].float().cpu())
        start += size
    return {hook: torch.cat(parts) for hook, parts in found.items()}
