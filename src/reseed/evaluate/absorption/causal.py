"""Absorption by its effect: the form of the paper, for layers where the word's information is still
at the word.

The metric is the logit of the right answer less the mean of the others, at the last token. Which
latent at the word carries it is found by integrated gradients over the latents; what the SAE leaves
out is added back, so that with all latents in place the model is itself. Chanin et al. 2024,
section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.splicing import spliced
from reseed.evaluate.absorption.projection import SILENT, Alignment
from reseed.evaluate.codes import Codes, at_pairs, encode
from reseed.evaluate.first_letter.prompts import Prompts, make_prompts
from reseed.evaluate.first_letter.task import Probed, word_activations
from reseed.sae.base import SAE

STEPS = 6
"""Of the integral: all latents at 1, 5/6, … 1/6 of what they are."""
MARGIN = 1.0
"""By how much the effect of the first latent exceeds that of the next."""
_FRESH, _SAMPLE = 0x66726573, 0x73616D70


@dataclass(frozen=True)
class CausalRules:
    """What counts.

    Attributes:
        sample: so many words of a class are looked at; what is found counts for all of them.
        cosine: at least that of the latent's decoder with the probe's direction.
        icl_words: lines with the answer before the word in question.
    """

    sample: int = 200
    cosine: float = 0.025
    icl_words: int = 10


def causal_absorption(
    model: LanguageModel,
    hook: Hookpoint,
    sae: SAE,
    probed: Probed,
    alignment: Alignment,
    candidates: Int[np.ndarray, " n"],
    main: Sequence[Int[Tensor, " S"]],
    rules: CausalRules,
) -> dict[int, float]:
    """How many words each candidate stands for as absorbed: 0, or 1 scaled up by the sample.

    Args:
        candidates: words that the probe gets right and the main latents' regression does not.
        main: S of each class.

    Returns:
        by word; its sum over the words of a class is how many are absorbed.
    """
    counts = dict.fromkeys(candidates.tolist(), 0.0)
    if not len(candidates):
        return counts
    # Not the prompts of the measurement: the latents' silence must show again.
    random = np.random.default_rng([_FRESH, probed.prompt_seed])
    prompts = make_prompts(
        probed.words, probed.template, candidates, probed.part, rules.icl_words, random, ask=True
    )
    x = word_activations(model, [hook], prompts)[hook]
    codes = encode(sae, x)
    labels = probed.words.labels[candidates]
    kept, weight = _sampled(_silent(codes, labels, main), labels, rules.sample, probed.prompt_seed)
    if not len(kept):
        return counts
    codes = codes.rows(kept)
    answers = _answers(probed, candidates[kept.numpy()])
    asked = Prompts(prompts.tokens[kept], prompts.at[kept], prompts.end[kept])
    gradient = integrated_gradient(
        model.model, hook, asked, answers, labels[kept],
        codes.times(sae.W_dec.detach().float()), model.batch_sequences,
    )  # fmt: skip
    absorbed = is_absorbed(codes, gradient, sae.W_dec, labels[kept], alignment, rules.cosine)
    for index, scale, it_is in zip(kept, weight, absorbed.cpu(), strict=True):
        counts[int(candidates[index])] = float(scale) * bool(it_is)
    return counts


def integrated_gradient(
    model: nn.Module,
    hook: Hookpoint,
    prompts: Prompts,
    answers: Int[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    decoded: Float[Tensor, "n D"],
    batch: int,
) -> Float[Tensor, "n D"]:
    """Mean gradient of the metric with respect to the activation at the word, along the path.

    Args:
        answers: token of the answer of each class, for each word.
        labels: the class of each.
        decoded: Σ_j f_j·d_j, which is taken away step by step: x − (1 − α)·Σ_j f_j·d_j is what α
            times the latents decode to, with the error added.
        batch: prompts in one pass.
    """
    found = []
    for rows in torch.arange(len(labels)).split(batch):
        part = Prompts(prompts.tokens[rows], prompts.at[rows], prompts.end[rows])
        z = decoded[rows.to(decoded.device)]
        total = torch.zeros_like(z)
        for step in range(STEPS):
            total += _gradient(model, hook, part, answers[rows], labels[rows], step / STEPS * z)
        found.append(total / STEPS)
    return torch.cat(found)


def _gradient(
    model: nn.Module,
    hook: Hookpoint,
    prompts: Prompts,
    answers: Int[Tensor, "b C"],
    labels: Int[Tensor, " b"],
    removed: Float[Tensor, "b D"],
) -> Float[Tensor, "b D"]:
    """Of the metric with ``removed`` taken from the activation at the word."""
    device = removed.device
    rows, at = torch.arange(len(labels), device=device), prompts.at.to(device)
    points: list[Tensor] = []

    def edit(there: Tensor) -> Tensor:
        point = (there[rows, at] - removed.to(there.dtype)).detach().requires_grad_()
        points.append(point)
        return there.detach().index_put((rows, at), point)

    ends, place = prompts.end.unique(return_inverse=True)
    with torch.enable_grad(), spliced(model, hook, edit):
        logits = model(
            input_ids=prompts.tokens.to(device),
            use_cache=False,
            logits_to_keep=ends.to(device),
        ).logits
        last = logits[rows, place.to(device)].float()
        metric = margin(last.gather(1, answers.to(device)), labels.to(device)).sum()
        return torch.autograd.grad(metric, points[0])[0].float()


def margin(scores: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Of the right class over the mean of the others."""
    right = scores.gather(1, labels[:, None])[:, 0]
    return right - (scores.sum(1) - right) / (scores.shape[1] - 1)


def is_absorbed(
    codes: Codes,
    gradient: Float[Tensor, "n D"],
    W_dec: Float[Tensor, "F D"],
    labels: Int[Tensor, " n"],
    alignment: Alignment,
    cosine: float,
) -> Bool[Tensor, " n"]:
    """Whether one latent alone carries the metric, and points the probe's way.

    attr_j = −f_j·(d_j·gradient). With the most negative j₁ and the next j₂: attr_j₁ ≤ 0,
    |attr_j₁| − |attr_j₂| ≥ `MARGIN`, and cos(d_j₁, p) ≥ ``cosine``.
    """
    word, latent = codes.token, codes.latent
    gradient, rows = gradient.to(codes.value.device), W_dec.detach().float()
    along = torch.cat(
        [
            (rows[j] * gradient[i]).sum(1)
            for i, j in zip(word.split(1 << 16), latent.split(1 << 16), strict=True)
        ]
    )
    loss = (codes.value * along).double()  # −attr: what the metric loses without the latent
    pairs = codes.largest(loss, 2)
    first, second = at_pairs(loss, pairs, 0.0).unbind(1)
    # A latent that is silent has no effect, and comes before those with the opposite one.
    some_silent = codes.starts.diff() < codes.num_latents
    second = torch.where(some_silent, second.clamp(min=0), second)
    found = at_pairs(alignment.cosine[labels.to(word.device)[word], latent], pairs[:, 0], 0.0)
    return (first >= 0) & (first.abs() - second.abs() >= MARGIN) & (found >= cosine)


def _silent(
    codes: Codes, labels: Int[Tensor, " n"], main: Sequence[Int[Tensor, " S"]]
) -> Bool[Tensor, " n"]:
    """On which words the main latents of their class do not fire."""
    silent = torch.zeros(len(codes), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        silent[rows] = codes.rows(rows).columns(main[label]).sum(1).cpu() < SILENT
    return silent


def _sampled(
    silent: Bool[Tensor, " n"], labels: Int[Tensor, " n"], most: int, seed: int
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """At most so many words of each class, and how many each stands for."""
    kept, weight = [], []
    for label in labels.unique().tolist():
        rows = (silent & (labels == label)).nonzero()[:, 0]
        random = torch.Generator().manual_seed(_SAMPLE + 31 * seed + label)
        some = rows[torch.randperm(len(rows), generator=random)[:most]].sort().values
        kept.append(some)
        weight.append(torch.full((len(some),), len(rows) / max(1, len(some))))
    return torch.cat(kept), torch.cat(weight)


def _answers(probed: Probed, chosen: Int[np.ndarray, " n"]) -> Int[Tensor, "n C"]:
    texts = (probed.words.texts[i] for i in chosen)
    return torch.tensor([probed.template.answers[text.endswith(" ")] for text in texts])
