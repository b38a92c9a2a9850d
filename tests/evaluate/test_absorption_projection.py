"""Projection absorption: cases by hand, an analytic family, and a dense reference per word."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from evaluation_helpers import codes_of
from torch import Tensor

from reseed.evaluate.absorption.projection import (
    Absorption,
    Alignment,
    Thresholds,
    absorption,
    null_cosines,
    random_directions,
)
from reseed.evaluate.sparse_latents import encode
from reseed.sae.relu import ReLUConfig


def measured(
    x: Tensor, latents: Tensor, W_dec: Tensor, p: Tensor, main: Sequence[int] = (0,), **rules
) -> Absorption:
    """Measure the absorption of words of one class."""
    directions, n = p[None], len(x)
    return absorption(
        codes_of(latents), x, torch.zeros(n, dtype=torch.long), directions,
        Alignment.of(W_dec, directions), [torch.tensor(main)], Thresholds(**rules),
    )  # fmt: skip


CASES = {  # P, activations, cosines, fraction, full
    "full": (1.0, [0, 1.5], [1, 0.6], 1.0, True),
    "partial": (1.0, [0.3, 1.0], [1, 0.6], 2 / 3, False),
    "main suffices": (1.0, [1.1, 1.0], [1, 0.6], 0.0, False),
    "below .4": (1.0, [0, 0.65], [1, 0.6], 0.0, False),
    "overshoot": (1.0, [0.5, 2.0], [1, 0.6], 0.5, False),
    "4 absorbers": (1.0, [0, 1, 1, 1, 1], [1, 0.15, 0.15, 0.15, 0.15], 1.0, False),
    "top-3 cap": (1.0, [0, 1, 1, 1, 1], [1, 0.12, 0.12, 0.12, 0.12], 0.0, False),
    "low cosine": (1.0, [0, 10], [1, 0.05], 0.0, True),
    "negative P": (-1.0, [0, 1.5], [1, 0.6], 0.0, False),
    "P is zero": (0.0, [0, 1.5], [1, 0.6], 0.0, False),
    "nothing fires": (1.0, [0, 0], [1, 0.6], 0.0, False),
}


def rows_with(cosines: Sequence[float]) -> Tensor:
    """Make unit rows with these cosines to the first axis, each with its own second axis."""
    rows = torch.zeros(len(cosines), len(cosines) + 1)
    for i, cosine in enumerate(cosines):
        rows[i, 0], rows[i, i + 1] = cosine, (1 - cosine**2) ** 0.5
    return rows


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_absorption_by_hand(case: str, scale: float) -> None:
    """Also with decoder rows that are not of unit norm: contributions are the same."""
    projection, latents, cosines, fraction, full = CASES[case]
    W_dec = rows_with(cosines)
    p = torch.eye(W_dec.shape[1])[0]
    found = measured(
        projection * p[None], torch.tensor([latents]).float() / scale, W_dec * scale, 3 * p
    )
    assert found.fraction.tolist() == pytest.approx([fraction])
    assert found.full.tolist() == [full]
    assert found.projection.tolist() == pytest.approx([projection])


@pytest.mark.parametrize("delta", [0.0, 0.2, 0.39, 0.41, 0.6, 0.9, 1.0])
def test_the_fraction_is_the_share_that_the_child_absorbs(delta: float) -> None:
    """Parent u1 and child u2: the child's latent absorbs a share δ of the parent."""
    u1, u2 = torch.eye(6)[:2]
    rows = torch.stack([u1, u2 + delta * u1])
    norms = rows.norm(dim=1, keepdim=True)
    made = ReLUConfig(num_latents=2).build(6, torch.Generator())
    with torch.no_grad():
        made.W_enc.copy_(torch.stack([u1 - delta * u2, u2]) * norms)
        made.W_dec.copy_(rows / norms)
    x = (u1 + u2)[None]
    latents = encode(made, x)
    found = absorption(
        latents, x, torch.tensor([0]), u1[None], Alignment.of(made.W_dec, u1[None]),
        [torch.tensor([0])], Thresholds(),
    )  # fmt: skip
    assert found.fraction.item() == pytest.approx(delta if delta >= 0.4 else 0.0, abs=1e-6)
    assert found.full.item() is (delta == 1.0)
    assert torch.allclose(made(x).reconstruction, x, atol=1e-6)  # whatever δ


def one_word(a: Tensor, f: Tensor, W_dec: Tensor, p: Tensor, main: list[int]) -> tuple[float, bool]:
    """Apply the definition to one word, dense, in float64."""
    p, W_dec, f, a = (t.double() for t in (p / p.norm(), W_dec, f, a))
    along = W_dec @ p
    cosine, proj = along / W_dec.norm(dim=1), f * along
    P, M = float(a @ p), float(proj[main].sum())
    others = torch.ones(len(f), dtype=torch.bool)
    others[main] = False
    cand = proj[others & (cosine >= 0.1) & (proj > 0)]
    A = float(cand.sort(descending=True).values[:3].sum())
    if P <= 0 or M >= P or A / P < 0.4:
        fraction = 0.0
    elif M <= 0:
        fraction = 1.0
    else:
        u = min(A, P - M)
        fraction = u / (u + M)
    j = int(proj.argmax())
    full = P > 0 and bool((f[main] < 1e-8).all())
    return fraction, full and float(cosine[j]) >= 0.025 and float(proj[j]) / P >= 0.4


def test_absorption_equals_a_dense_reference() -> None:
    random = torch.Generator().manual_seed(3)
    n, latents, d, classes = 400, 40, 10, 3
    W_dec = torch.randn(latents, d, generator=random) * 2
    dense = torch.rand(n, latents, generator=random).sub(0.8).clamp(min=0) * 5
    dense[:5] = 0
    x = dense @ W_dec + 0.3 * torch.randn(n, d, generator=random)
    directions = torch.randn(classes, d, generator=random)
    labels = torch.randint(classes, (n,), generator=random)
    main = [torch.tensor([3]), torch.tensor([0, 7, 9]), torch.tensor([5, 1])]
    found = absorption(
        codes_of(dense), x, labels, directions, Alignment.of(W_dec, directions), main, Thresholds()
    )
    wanted = [
        one_word(x[i], dense[i], W_dec, directions[c], main[c].tolist())
        for i, c in enumerate(labels.tolist())
    ]
    assert found.fraction.tolist() == pytest.approx([w[0] for w in wanted], abs=1e-5)
    assert found.full.tolist() == [w[1] for w in wanted]
    assert 0.1 < found.fraction.mean() < 0.9  # the cases vary
    assert 0 < found.full.sum() < n
    # The listed absorbers are those that count, the largest first.
    assert torch.allclose(found.contributions.sum(1), found.absorbing)
    assert (found.contributions.diff(dim=1) <= 0).all()
    for i in range(n):
        for latent, part in zip(found.absorbers[i], found.contributions[i], strict=True):
            p = directions[labels[i]] / directions[labels[i]].norm()
            assert (latent >= 0) == (part > 0)
            if latent >= 0:
                assert latent not in main[int(labels[i])]
                assert float(part) == pytest.approx(float(dense[i, latent] * W_dec[latent] @ p))


def test_a_decoder_row_of_zeros_absorbs_nothing() -> None:
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    p = torch.tensor([1.0, 0.0])
    found = measured(p[None], torch.tensor([[0.0, 5.0]]), W_dec, p)
    assert found.fraction.tolist() == [0.0]
    assert found.full.tolist() == [False]


def test_higher_thresholds_exclude_an_absorber() -> None:
    W_dec = rows_with([1, 0.6])
    p, latents = torch.eye(3)[0], torch.tensor([[0.0, 1.5]])
    assert measured(p[None], latents, W_dec, p, cosine=0.7).fraction.item() == 0
    assert not measured(p[None], latents, W_dec, p, full_cosine=0.7).full.item()
    assert measured(p[None], latents, W_dec, p, share=0.95).fraction.item() == 0


def test_random_directions_have_the_covariance_of_the_activations() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=random) @ torch.diag(torch.tensor([3.0, 1.0, 0.2])) + 7
    drawn = random_directions(x, 20_000, random)
    assert torch.allclose(drawn.T.cov(), x.T.cov(correction=0), rtol=0.1, atol=0.05)
    assert drawn.mean(0).abs().max() < 0.1


def test_the_null_of_isotropic_activations_is_that_of_random_unit_vectors() -> None:
    """In D = 64 dimensions .21 exceeds 95.2% of random cosines."""
    random = torch.Generator().manual_seed(0)
    W_dec = torch.randn(300, 64, generator=random)
    x = torch.randn(4_000, 64, generator=random)
    null = null_cosines(
        W_dec, torch.arange(300), x, W_dec[:1],
        directions=200, quantile=0.952, random=random,
    )  # fmt: skip
    assert null.random == pytest.approx(0.21, abs=0.01)
    # The row itself is among the "probes": 1 of 300 cosines is 1.
    high = null_cosines(
        W_dec, torch.arange(300), x, W_dec[:1], directions=5, quantile=0.9999, random=random
    )
    assert high.permuted > 0.9
    assert high.threshold == high.permuted
