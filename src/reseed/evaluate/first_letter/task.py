"""A task on words: the words, what the model makes of them, and the probes.

What is about the model is made once and kept (`SharedResults`): for every hookpoint and seed of the
prompts the activations at the words' tokens, and the probes of every fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.stream import generator
from reseed.config import ConfigError, digest, setting
from reseed.evaluate.base import Evaluated, EvaluationConfig, needs_language_model
from reseed.evaluate.first_letter.folds import Fold, make_folds, parts
from reseed.evaluate.first_letter.probes import Scores, agreement, train_probe
from reseed.evaluate.first_letter.prompts import Prompts, Template, make_prompts
from reseed.evaluate.first_letter.words import Words, first_letter_words, labelled_words

VERSION = 1
"""Raised when code changes what is kept."""
LINES = {
    "first_letter": "{word} has the first letter: {answer}",
    "labelled": "{word} is of the class: {answer}",
}
_ACTIVATIONS = "word-activations"
_PROMPTS, _PROBES, _PERMUTED = 0x70726F6D, 0x70726F62, 0x7065726D


@dataclass(frozen=True)
class WordTaskConfig(EvaluationConfig):
    """What evaluations by words have in common.

    Args:
        task: ``first_letter``, or ``labelled``: the tokens and labels of ``task_file``.
        task_file: a csv file with columns ``token`` and ``label``.
        line: what a prompt says of a word, with ``{word}`` and ``{answer}``; null is the task's
            own (`LINES`).
        icl_words: lines with the answer before the word in question.
        prompt_seeds: which words these are; each seed is a repetition of the whole measurement.
        split_seed: which words are for training, to choose with, and to measure on.
        folds: 1: a fifth of the words is measured on; more (5 for vocabularies of thousands): every
            word is, in one of so many folds with probes of its own.
        probe_f1: classes are evaluated whose probe has a test F1 above it.
        max_latents: k = 1 … so many latents are tried as the ones that stand for a class.
        f1_step: a further latent must raise F1 by more than this; .01 to .05 are as valid.
        l1: weight of the penalty by which latents are ranked.
    """

    task: str = setting("first_letter", choices=tuple(LINES))
    task_file: str | None = None
    line: str | None = None
    icl_words: int = setting(10, at_least=0)
    prompt_seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int = setting(0, at_least=0)
    folds: int = setting(1, at_least=1)
    probe_f1: float = setting(0.6, at_least=0, below=1)
    max_latents: int = setting(10, at_least=1)
    f1_step: float = setting(0.03, at_least=0, below=1)
    l1: float = setting(0.01, at_least=0)

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
                f"{{key}} must begin with {{word}} and hold {{answer}}; got {line!r}", "line"
            )

    def check(self, resolved: Any) -> None:
        needs_language_model(self, resolved)

    def words(self, tokenizer: Any) -> Words:
        """The words of the task."""
        if self.task_file is not None:
            return labelled_words(tokenizer, self.task_file)
        return first_letter_words(tokenizer)

    def template(self, tokenizer: Any, words: Words) -> Template:
        return Template.of(tokenizer, words, self.line or LINES[self.task])

    def repetitions(
        self, evaluated: Evaluated, hook: Hookpoint, hooks: Sequence[Hookpoint] = ()
    ) -> Iterator[Probed]:
        """The task at a hookpoint, once for each seed of the prompts.

        Args:
            hooks: whose activations will be wanted too: one pass of the model reads them all.
        """
        words = self.words(evaluated.tokenizer)
        labels = words.labels.numpy()
        part = parts(labels, self.folds, self.split_seed)
        folds = make_folds(labels, part, self.folds, self.split_seed)
        for seed in self.prompt_seeds:
            yield self._probed(evaluated, hook, hooks, words, part, folds, seed)

    def _probed(
        self,
        evaluated: Evaluated,
        hook: Hookpoint,
        hooks: Sequence[Hookpoint],
        words: Words,
        part: Int[np.ndarray, " n"],
        folds: list[Fold],
        seed: int,
    ) -> Probed:
        model = evaluated.model
        assert model is not None, "`check` has refused what has no language model"
        template = self.template(evaluated.tokenizer, words)

        def key_at(place: Hookpoint) -> dict[str, Any]:
            return self._key(model, place, words, template, seed)

        def activations() -> dict[str, Tensor]:
            others = [
                h for h in dict.fromkeys(hooks)
                if h != hook and evaluated.shared.lacks(_ACTIVATIONS, key_at(h))
            ]  # fmt: skip
            listed = ", ".join(map(str, (hook, *others)))
            evaluated.note(f"reading {len(words):,} words at {listed}, prompts of seed {seed}")
            everything = np.arange(len(words))
            random = np.random.default_rng([_PROMPTS, seed])
            prompts = make_prompts(words, template, everything, part, self.icl_words, random)
            found = word_activations(model, [hook, *others], prompts)
            for other in others:
                evaluated.shared.keep(_ACTIVATIONS, key_at(other), {"x": found[other]})
            return {"x": found[hook]}

        key = key_at(hook)
        x = evaluated.shared.get(_ACTIVATIONS, key, activations)["x"]

        def probes() -> dict[str, Tensor]:
            evaluated.note(f"probes at {hook}, prompts of seed {seed}")
            found: dict[str, list[Tensor]] = {}
            for fold, each in enumerate(folds):
                random = generator(_PROBES, seed, fold)
                permuted = words.labels.clone()
                # Within what is trained on, and within what is tested on: sizes stay.
                for some in (each.train, each.test):
                    order = torch.randperm(len(some), generator=generator(_PERMUTED, seed, fold))
                    permuted[some] = words.labels[some[order.numpy()]]
                found.setdefault("permuted", []).append(permuted)
                for name, labels in (("", words.labels), ("permuted_", permuted)):
                    member = F.one_hot(labels, len(words.classes)).bool()[each.train]
                    there = x[each.train].to(evaluated.device)
                    weight, bias = train_probe(there, member, random)
                    found.setdefault(f"{name}weight", []).append(weight.cpu())
                    found.setdefault(f"{name}bias", []).append(bias.cpu())
            return {name: torch.stack(each) for name, each in found.items()}

        made = evaluated.shared.get("word-probes", key, probes)
        return Probed(words, template, x, part, folds, seed, made)

    def _key(
        self, model: LanguageModel, hook: Hookpoint, words: Words, template: Template, seed: int
    ) -> dict[str, Any]:
        """All that decides activations and probes."""
        found = model.resolved
        texts = [template.opening, sorted(template.after.items())]
        return {
            "version": VERSION,
            "fingerprints": dict(found.fingerprints),
            "model": found.config.signed(),
            "hookpoint": [hook.site, hook.layer, hook.module],
            "words": digest([words.tokens.tolist(), words.labels.tolist(), words.texts], 32),
            "classes": len(words.classes),
            "template": digest(texts, 32),
            "icl_words": self.icl_words,
            "split": [self.folds, self.split_seed],
            "prompt_seed": seed,
        }


@dataclass(frozen=True, eq=False)
class Probed:
    """A task at a hookpoint for one seed of the prompts. All on the CPU.

    Attributes:
        words: the words.
        template: what stands between them.
        x: activation at each word's token, in float32.
        part: of the split, of each word.
        folds: the folds.
        prompt_seed: of the words in the prompts.
        probes: ``weight`` [folds, C, D] and ``bias`` [folds, C]; with the prefix ``permuted_``
            those of labels that were permuted, which are ``permuted`` [folds, n].
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
        """Which word is of which class."""
        return F.one_hot(self.words.labels, self.num_classes).bool()

    def permuted_members(self, fold: int) -> Bool[Tensor, "n C"]:
        """The same of the permuted labels of a fold."""
        return F.one_hot(self.probes["permuted"][fold], self.num_classes).bool()

    @cached_property
    def test_scores(self) -> Float[Tensor, "n C"]:
        """The probes' scores of each word where it is tested on; NaN of others."""
        return self._scores("")

    @cached_property
    def permuted_scores(self) -> Float[Tensor, "n C"]:
        """The same by the probes of the permuted labels."""
        return self._scores("permuted_")

    def _scores(self, prefix: str) -> Float[Tensor, "n C"]:
        scores = torch.full((len(self.x), self.num_classes), torch.nan)
        for number, fold in enumerate(self.folds):
            weight, bias = (self.probes[f"{prefix}{n}"][number] for n in ("weight", "bias"))
            scores[fold.test] = self.x[fold.test] @ weight.T + bias
        return scores

    @cached_property
    def tested(self) -> Bool[Tensor, " n"]:
        """Which words are tested on, in one fold or another."""
        return ~self.test_scores[:, 0].isnan()


def probe_quality(repetitions: list[Probed]) -> Scores:
    """Of the probes on test words, over all folds and seeds of the prompts: [C]."""
    tested = [p.tested for p in repetitions]
    scores = torch.cat([p.test_scores[t] for p, t in zip(repetitions, tested, strict=True)])
    members = torch.cat([p.members[t] for p, t in zip(repetitions, tested, strict=True)])
    return agreement(scores > 0, members)


def word_activations(
    model: LanguageModel, hooks: Sequence[Hookpoint], prompts: Prompts
) -> dict[Hookpoint, Float[Tensor, "n D"]]:
    """Activation at each word's token; the model is stopped at the deepest hookpoint."""
    found: dict[Hookpoint, list[Tensor]] = {hook: [] for hook in hooks}
    start = 0
    for batch in model.activations(prompts.tokens, hooks):
        size = len(batch[hooks[0]])
        at = prompts.at[start : start + size]
        for hook, there in batch.items():
            rows = torch.arange(size, device=there.device)
            found[hook].append(there[rows, at.to(there.device)].float().cpu())
        start += size
    return {hook: torch.cat(parts) for hook, parts in found.items()}
