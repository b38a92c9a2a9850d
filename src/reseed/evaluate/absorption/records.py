"""Measurements of each word.

A record is one word that the probe gets right, in one repetition (a prompt seed).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from reseed.evaluate.absorption.projection import Absorption, Alignment, Thresholds, absorption
from reseed.evaluate.sparse_latents import SparseLatents
from reseed.evaluate.splitting import MainLatents
from reseed.evaluate.word_means import Ratios
from reseed.evaluate.word_task import ProbedTask
from reseed.sae.base import SAE


def word_records(
    sae: SAE,
    probed: ProbedTask,
    fold: int,
    codes: SparseLatents,
    splits: Sequence[MainLatents | None],
    thresholds: dict[str, Thresholds],
    *,
    permuted: bool = False,
) -> pd.DataFrame:
    """Measure the test words of one fold that the probe gets right.

    Columns: ``word`` (index), ``class``, ``prompt_seed``, ``fold``, ``score``, ``projection``,
    ``main``, and with the suffix of each of the thresholds: ``fraction``, ``full``, ``absorbing``,
    ``absorbers``, ``contributions``, ``top``.

    Args:
        codes: latents of all words.
        splits: main latents of every class in this fold.
        thresholds: suffix of the column names → thresholds.
        permuted: use permuted labels and their probes.
    """
    prefix = "permuted_" if permuted else ""
    labels = probed.probes["permuted"][fold] if permuted else probed.words.labels
    scores = probed.permuted_scores if permuted else probed.test_scores
    weight = probed.probes[f"{prefix}weight"][fold]
    test = torch.from_numpy(probed.folds[fold].test)
    own = scores[test, labels[test]]
    known = torch.tensor([split is not None for split in splits])
    words = test[(own > 0) & known[labels[test]]]
    alignment = Alignment.of(sae.W_dec, weight)
    main = main_latents(splits)
    some, x, classes = codes.rows(words), probed.x[words], labels[words]
    table: dict[str, object] = {
        "word": words.numpy(),
        "class": classes.numpy(),
        "prompt_seed": probed.prompt_seed,
        "fold": fold,
        "score": scores[words, classes].numpy(),
    }
    for name, rule in thresholds.items():
        found = absorption(some, x, classes, weight, alignment, main, rule)
        table |= _columns(found, name)
    return pd.DataFrame(table)


def _columns(found: Absorption, name: str) -> dict[str, object]:
    return {
        "projection": found.projection.cpu().numpy(),
        "main": found.main.cpu().numpy(),
        f"fraction{name}": found.fraction.cpu().numpy(),
        f"full{name}": found.full.double().cpu().numpy(),
        f"absorbing{name}": found.absorbing.cpu().numpy(),
        f"absorbers{name}": found.absorbers.cpu().tolist(),
        f"contributions{name}": found.contributions.cpu().tolist(),
        f"top{name}": found.top.cpu().numpy(),
    }


def record_ratios(
    records: pd.DataFrame, column: str, repetitions: Sequence[ProbedTask], permuted: bool = False
) -> Ratios:
    """Sum a column of the records over each word: its ratio is the mean over records.

    Args:
        permuted: whether the records are of permuted labels, drawn for each fold and repetition.
    """
    words, seeds = repetitions[0].words, [probed.prompt_seed for probed in repetitions]
    seed = np.array([seeds.index(one) for one in records["prompt_seed"]], dtype=np.int64)
    draw = seed * len(repetitions[0].folds) + records["fold"].to_numpy(dtype=np.int64)
    return Ratios.of(
        number=records["class"].to_numpy(dtype=np.int64),
        word=words.spelling_ids[records["word"].to_numpy(dtype=np.int64)],
        seed=seed,
        top=records[column].to_numpy(dtype=np.float64),
        bottom=np.ones(len(records)),
        shape=(len(repetitions), len(words.classes), words.num_spellings),
        draw=draw if permuted else None,
    )


def main_latents(splits: Sequence[MainLatents | None]) -> list[Tensor]:
    """Return the main latents S of each class; empty for a class without a split."""
    return [torch.zeros(0, dtype=torch.long) if s is None else s.main for s in splits]
