"""Sparse latents and an SAE with known values, for several tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reseed.evaluate.base import EvaluationConfig, Result
from reseed.evaluate.sparse_latents import SparseLatents
from reseed.evaluate.words import Words
from reseed.sae.base import SAE
from reseed.sae.topk import TopKConfig


def codes_of(dense: Tensor) -> SparseLatents:
    """Return the values of a dense matrix that are not 0."""
    token, latent = dense.nonzero(as_tuple=True)
    starts = F.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    return SparseLatents(starts, latent, dense[token, latent], dense.shape[1])


def words_of(labels: Sequence[int], texts: Sequence[str] = ()) -> Words:
    """Make words of the given classes; by default each has its own spelling."""
    texts = texts or [f"w{i}" for i in range(len(labels))]
    names = tuple(f"class {i}" for i in range(max(labels) + 1))
    return Words(torch.arange(len(labels)), tuple(texts), torch.tensor(labels), names, names)


def constant(value: Tensor) -> SAE:
    """Build an SAE that always reconstructs ``value``, with no latent active."""
    sae = TopKConfig(num_latents=4, k=1).build(len(value), torch.Generator())
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_dec.copy_(value)
    return sae


def assert_declared(config: EvaluationConfig, result: Result, *lacking: str) -> None:
    """Assert that a result has exactly what its evaluation declares, the optional part included.

    Args:
        lacking: optional metrics that this result does not have.
    """
    config.check_result(result)
    assert {*result.metrics, *lacking} == {metric.name for metric in config.metrics}
    assert {*result.latents} == {metric.name for metric in config.latents}
    assert all(metric.help for metric in (*config.metrics, *config.latents))
