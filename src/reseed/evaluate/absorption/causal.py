"""Absorption measured by its causal effect, as in the paper. It needs a layer where the information
about the word is still at the word's token.

The metric is the logit of the right answer minus the mean of the others, at the last token.
Integrated gradients attribute the metric to the latents at the word. The SAE's error is added back,
so that with all latents in place the model is unchanged. Chanin et al. 2024, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.intervention import intervene
from reseed.activations.language_model import LanguageModel
from reseed.evaluate.absorption.projection import SILENT, Alignment
from reseed.evaluate.sparse_latents import SparseLatents, encode, gather_pairs
from reseed.evaluate.word_task import ProbedTask, word_activations
from reseed.evaluate.words import Prompts, make_prompts
from reseed.sae.base import SAE

STEPS = 6
"""Number of steps of the integral: all latents at 1, 5/6, … 1/6 of their activation."""
MARGIN = 1.0
"""Minimum by which the effect of the strongest latent exceeds that of the second strongest."""
_FRESH, _SAMPLE = 0x66726573, 0x73616D70


@dataclass(frozen=True)
class CausalRules:
    """Settings of the causal measure.

    Attributes:
        sample: maximum number of words of a class to measure, over all folds; results are scaled
            up to all of its words.
        cosine: minimum cosine of the latent's decoder row with the probe's direction.
        icl_words: number of example lines, each with its answer, before the word in question.
    """

    sample: int = 200
    cosine: float = 0.025
    icl_words: int = 10


@dataclass(frozen=True, eq=False)
class FoldCandidates:
    """The words of one fold whose effect may be measured.

    Attributes:
        words: test words that the probe gets right and the main latents' regression gets wrong.
        main: S of each class.
        alignment: of the latents with the fold's probes.
    """

    words: Int[np.ndarray, " n"]
    main: Sequence[Int[Tensor, " S"]]
    alignment: Alignment


def causal_absorption(
    model: LanguageModel,
    hook: Hookpoint,
    sae: SAE,
    probed: ProbedTask,
    folds: Sequence[FoldCandidates],
    rules: CausalRules,
) -> dict[int, float]:
    """Return how many absorbed words each candidate represents: 0, or its sampling weight.

    The words of a class are sampled from those of all folds together.

    Returns:
        candidate → number; the sum over a class is its estimated number of absorbed words.
    """
    candidates = np.concatenate([each.words for each in folds])
    counts = dict.fromkeys(candidates.tolist(), 0.0)
    if not len(candidates):
        return counts
    # The main latents must be silent on new prompts too.
    random = np.random.default_rng([_FRESH, probed.prompt_seed])
    prompts = make_prompts(
        probed.words, probed.template, candidates, probed.part, rules.icl_words, random, ask=True
    )
    x = word_activations(model, [hook], prompts)[hook]
    codes = encode(sae, x)
    labels = probed.words.labels[candidates]
    fold = torch.repeat_interleave(torch.tensor([len(each.words) for each in folds]))
    silent = torch.zeros(len(labels), dtype=torch.bool)
    for number, each in enumerate(folds):
        rows = (fold == number).nonzero()[:, 0]
        silent[rows] = _silent(codes.rows(rows), labels[rows], each.main)
    kept, weight = _sampled(silent, labels, rules.sample, probed.prompt_seed)
    if not len(kept):
        return counts
    codes = codes.rows(kept)
    answers = _answers(probed, candidates[kept.numpy()])
    asked = prompts.rows(kept)
    gradient = integrated_gradient(
        model, hook, asked, answers, labels[kept],
        codes.matmul(sae.W_dec.detach().float()), model.batch_sequences,
    )  # fmt: skip
    for number, each in enumerate(folds):
        rows = (fold[kept] == number).nonzero()[:, 0]
        absorbed = is_absorbed(
            codes.rows(rows), gradient[rows.to(gradient.device)], sae.W_dec, labels[kept[rows]],
            each.alignment, rules.cosine,
        )  # fmt: skip
        for row, it_is in zip(rows, absorbed.tolist(), strict=True):
            counts[int(candidates[kept[row]])] = float(weight[row]) * it_is
    return counts


def integrated_gradient(
    model: LanguageModel,
    hook: Hookpoint,
    prompts: Prompts,
    answers: Int[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    decoded: Float[Tensor, "n D"],
    batch: int,
) -> Float[Tensor, "n D"]:
    """Average the gradient of the metric with respect to the activation at the word over the steps.

    Args:
        answers: answer token of each class, for each word.
        labels: class of each word.
        decoded: Σ_j f_j·d_j, removed step by step: x − (1 − α)·Σ_j f_j·d_j is the reconstruction
            from α times the latents, plus the SAE's error.
        batch: number of prompts in one pass.
    """
    found = []
    for rows in torch.arange(len(labels)).split(batch):
        part = prompts.rows(rows)
        z = decoded[rows.to(decoded.device)]
        total = torch.zeros_like(z)
        for step in range(STEPS):
            total += _gradient(model, hook, part, answers[rows], labels[rows], step / STEPS * z)
        found.append(total / STEPS)
    return torch.cat(found)


def _gradient(
    model: LanguageModel,
    hook: Hookpoint,
    prompts: Prompts,
    answers: Int[Tensor, "b C"],
    labels: Int[Tensor, " b"],
    removed: Float[Tensor, "b D"],
) -> Float[Tensor, "b D"]:
    """Return the gradient with ``removed`` subtracted from the activation at the word."""
    device = removed.device
    rows, at = torch.arange(len(labels), device=device), prompts.word_position.to(device)
    points: list[Tensor] = []

    def edit(there: Tensor) -> Tensor:
        point = (there[rows, at] - removed.to(there.dtype)).detach().requires_grad_()
        points.append(point)
        return there.detach().index_put((rows, at), point)

    ends, place = prompts.last_position.unique(return_inverse=True)
    with torch.enable_grad(), intervene(model, {hook: edit}):
        logits = model.model(
            input_ids=prompts.tokens.to(device),
            use_cache=False,
            logits_to_keep=ends.to(device),
        ).logits
        last = logits[rows, place.to(device)].float()
        metric = margin(last.gather(1, answers.to(device)), labels.to(device)).sum()
        return torch.autograd.grad(metric, points[0])[0].float()


def margin(scores: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the score of the right class minus the mean of the others."""
    right = scores.gather(1, labels[:, None])[:, 0]
    return right - (scores.sum(1) - right) / (scores.shape[1] - 1)


def is_absorbed(
    codes: SparseLatents,
    gradient: Float[Tensor, "n D"],
    W_dec: Float[Tensor, "F D"],
    labels: Int[Tensor, " n"],
    alignment: Alignment,
    cosine: float,
) -> Bool[Tensor, " n"]:
    """Return, per word, whether one latent alone carries the metric and points along the probe.

    attr_j = −f_j·(d_j·gradient); j₁ has the most negative attr and j₂ the next. The conditions are
    attr_j₁ ≤ 0, |attr_j₁| − |attr_j₂| ≥ `MARGIN`, and cos(d_j₁, p) ≥ ``cosine``.
    """
    word, latent = codes.token, codes.latent
    gradient, rows = gradient.to(codes.value.device), W_dec.detach().float()
    along = torch.cat(
        [
            (rows[j] * gradient[i]).sum(1)
            for i, j in zip(word.split(1 << 16), latent.split(1 << 16), strict=True)
        ]
    )
    loss = (codes.value * along).double()  # −attr: the metric's loss without the latent
    pairs = codes.top_pairs(loss, 2)
    first, second = gather_pairs(loss, pairs, 0.0).unbind(1)
    # A silent latent has effect 0, which ranks above those of opposite sign.
    some_silent = codes.starts.diff() < codes.num_latents
    second = torch.where(some_silent, second.clamp(min=0), second)
    found = gather_pairs(alignment.cosine[labels.to(word.device)[word], latent], pairs[:, 0], 0.0)
    return (first >= 0) & (first.abs() - second.abs() >= MARGIN) & (found >= cosine)


def _silent(
    codes: SparseLatents, labels: Int[Tensor, " n"], main: Sequence[Int[Tensor, " S"]]
) -> Bool[Tensor, " n"]:
    """Return whether the main latents of each word's class are silent on it."""
    silent = torch.zeros(len(codes), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        silent[rows] = codes.rows(rows).columns(main[label]).sum(1).cpu() < SILENT
    return silent


def _sampled(
    silent: Bool[Tensor, " n"], labels: Int[Tensor, " n"], most: int, seed: int
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Sample at most ``most`` silent words of each class; return their indices and weights."""
    kept, weight = [], []
    for label in labels.unique().tolist():
        rows = (silent & (labels == label)).nonzero()[:, 0]
        random = torch.Generator().manual_seed(_SAMPLE + 31 * seed + label)
        some = rows[torch.randperm(len(rows), generator=random)[:most]].sort().values
        kept.append(some)
        weight.append(torch.full((len(some),), len(rows) / max(1, len(some))))
    return torch.cat(kept), torch.cat(weight)


def _answers(probed: ProbedTask, chosen: Int[np.ndarray, " n"]) -> Int[Tensor, "n C"]:
    texts = (probed.words.texts[i] for i in chosen)
    return torch.tensor([probed.template.answers[text.endswith(" ")] for text in texts])
