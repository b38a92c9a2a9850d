"""Measurements of the embedded model: held-out cross-entropy, n-grams, residual norms."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from transformers import PreTrainedModel

HELDOUT_PERCENT = 2


def is_heldout(document: str) -> bool:
    """Decide by a document's SHA-256 whether it is among the 2 percent that are held out."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT


def pack(documents: Iterable[np.ndarray], separator: int, length: int) -> np.ndarray:
    """Return rows [rows, length] of the concatenated documents, with a separator before each.

    A row's first token is the last of the previous row, so that every token is predicted once.
    Tokens that do not fill a row are left out.
    """
    parts = [part for ids in documents for part in ([separator], ids)]
    return rows_of(np.concatenate(parts), length)


def rows_of(stream: np.ndarray, length: int) -> np.ndarray:
    """Return windows [rows, length] of a stream [tokens]; neighbours share one token."""
    return np.lib.stride_tricks.sliding_window_view(stream, length)[:: length - 1]


@torch.inference_mode()
def cross_entropy(model: PreTrainedModel, rows: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats per token, of rows [rows, length] of token ids."""
    total = 0.0
    for start in range(0, len(rows), 32):
        ids = torch.from_numpy(rows[start : start + 32].astype(np.int64))
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        total += loss.item()
    return total / rows[:, 1:].size


def unigram_cross_entropy(train: np.ndarray, rows: np.ndarray, vocabulary_size: int) -> float:
    """Return nats per token under add-one counts of the stream `train` [tokens]."""
    counts = np.bincount(train, minlength=vocabulary_size) + 1.0
    return float(-np.log(counts / counts.sum())[rows[:, 1:]].mean())


def bigram_cross_entropy(train: np.ndarray, rows: np.ndarray, vocabulary_size: int) -> float:
    """Return nats per token under bigrams interpolated with add-one unigrams (Witten-Bell).

    p(w|h) = (c(h,w) + t(h) p(w)) / (c(h) + t(h)), t(h) the number of distinct followers of h.
    """
    unigram = np.bincount(train, minlength=vocabulary_size) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((vocabulary_size, vocabulary_size), dtype=np.int32)
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    context_counts = pairs.sum(1)
    followers = (pairs > 0).sum(1)
    history, word = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    numerator = pairs[history, word] + followers[history] * unigram[word]
    denominator = context_counts[history] + followers[history]
    unseen = denominator == 0
    p = np.where(unseen, unigram[word], numerator / np.maximum(denominator, 1))
    return float(-np.log(p).mean())


@torch.inference_mode()
def residual_statistics(model: PreTrainedModel, rows: np.ndarray) -> list[dict[str, float]]:
    """Return norms and concentration of the residual stream, for the embedding and each block.

    Over all positions of rows [rows, length] but the first: mean and largest norm, the largest
    share of the mean square in one dimension, and the share of the variance along the first
    principal component; and the mean norm at the first position.
    """
    ids = torch.from_numpy(rows.astype(np.int64))
    states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    statistics = []
    for state in states[:-1]:  # the last one is after the final norm
        x = state[:, 1:].flatten(0, 1).double()
        norms = x.norm(dim=1)
        power = x.square().mean(0)
        variances = torch.linalg.eigvalsh(x.T.cov())
        statistics.append(
            {
                "mean_norm": norms.mean().item(),
                "max_norm": norms.max().item(),
                "first_position_norm": state[:, 0].norm(dim=1).mean().item(),
                "top_dimension_share": (power.max() / power.sum()).item(),
                "top_component_share": (variances[-1] / variances.sum()).item(),
            }
        )
    return statistics
