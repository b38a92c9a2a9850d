"""Mean and covariance, computed at once and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from reseed.activations.moments import Moments, MomentSums


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Activations far from the origin, in several blocks, the last one partial."""
    monkeypatch.setattr("reseed.activations.moments._BLOCK", 64)
    noise = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0.1, 3, 6) + 100


def in_pieces(x: Tensor) -> Moments:
    sums = MomentSums()
    for piece in (x[:130], x[130:]):
        sums.add(piece)
    assert sums.tokens == len(x)
    return sums.so_far()


@pytest.mark.parametrize("of", [Moments.of, in_pieces])
def test_moments_equal_those_of_numpy(x: Tensor, of) -> None:
    found, exact = of(x), x.double().numpy()
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert found.mean.numpy() == pytest.approx(exact.mean(0), rel=1e-12)
    # Squares about the origin are 1e4 times the variance, which costs four digits.
    assert found.covariance.numpy() == pytest.approx(np.cov(exact.T, bias=True), rel=1e-9, abs=1e-9)


def test_the_root_is_exact_where_the_covariance_is_singular() -> None:
    x = torch.randn(5_000, 3, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x.sum(1, keepdim=True)], 1) + 2
    moments = Moments.of(x)
    assert torch.allclose(moments.mean, x.double().mean(0), atol=1e-9)
    expected = torch.cov(x.double().T, correction=0)
    root = moments.root()
    assert torch.allclose(root @ root.T, expected, atol=1e-9)
    assert torch.allclose(root, root.T, atol=1e-9)


def test_no_activations_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no activations were added, so they have no mean"):
        MomentSums().so_far()
