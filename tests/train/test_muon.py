"""Muon agrees with the singular value decomposition, in float64."""

import copy

import pytest
import torch

from reseed.sae.topk import TopKConfig
from reseed.train.optim.adam import SAEAdam
from reseed.train.optim.muon import SAEMuon, orthogonalised


def make(dtype=torch.float64):
    config = TopKConfig(num_latents=12, k=2)
    return config.build(5, torch.Generator().manual_seed(0)).to(dtype)


def give(sae, index):
    generator = torch.Generator().manual_seed(index)
    for p in sae.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9), (1, 7)])
def test_the_update_keeps_the_singular_vectors_and_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    assert s.min() > 1 / 500
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    found = orthogonalised(matrix)
    torch.testing.assert_close(found, U @ torch.diag(s) @ Vt, rtol=0, atol=1e-10)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.68
    assert values.max() < 1.21
    # It is near the orthogonal factor of the polar decomposition, U Vᵀ.
    assert torch.linalg.matrix_norm(found - U @ Vt, ord=2) < 0.32 + 1e-9


def test_orthogonalisation_ignores_scale_commutes_with_transposition_and_keeps_zero():
    matrix = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalised(matrix)
    torch.testing.assert_close(orthogonalised(1e-6 * matrix), found)
    torch.testing.assert_close(orthogonalised(matrix.t()), found.t())
    assert orthogonalised(torch.zeros(4, 3)).count_nonzero() == 0


def test_matrices_move_by_nesterov_momentum_and_the_rest_by_adam():
    sae, adam = make(), make()
    optimizer = SAEMuon(
        sae, 0.02, adam_lr=0.005, momentum=0.9, encoder_weight_decay=0.5, max_grad_norm=None
    )
    oracle = SAEAdam(adam, 0.005, max_grad_norm=None)
    W, D, mean, mean_D = sae.W_enc.detach().clone(), sae.W_dec.detach().clone(), 0, 0
    for index, rate in enumerate([0.02, 0.02, 0.01]):
        give(sae, index), give(adam, index)
        grad, grad_D = sae.W_enc.grad.clone(), sae.W_dec.grad.clone()
        optimizer.set_lr(rate), oracle.set_lr(rate / 4)
        optimizer.step(), oracle.step()
        mean = 0.9 * mean + 0.1 * grad
        step = orthogonalised(0.1 * grad + 0.9 * mean)
        W = W * (1 - rate * 0.5) - rate * 0.2 * 12**0.5 * step
        torch.testing.assert_close(sae.W_enc.detach(), W)
        grad_D = grad_D - (grad_D * D).sum(1, keepdim=True) * D
        mean_D = 0.9 * mean_D + 0.1 * grad_D
        D = D - rate * 0.2 * 12**0.5 * orthogonalised(0.1 * grad_D + 0.9 * mean_D)
        D = D / D.norm(dim=1, keepdim=True)
        torch.testing.assert_close(sae.W_dec.detach(), D)
    assert torch.equal(sae.b_enc, adam.b_enc)
    assert torch.equal(sae.b_dec, adam.b_dec)


def test_resume_is_exact():
    def run(sae, optimizer, first, last):
        for index in range(first, last):
            optimizer.set_lr(0.1 / (1 + index))
            give(sae, index)
            optimizer.step()

    straight = make(torch.float32)
    run(straight, SAEMuon(straight, 0.1, adam_lr=0.01), 0, 6)
    broken = make(torch.float32)
    before = SAEMuon(broken, 0.1, adam_lr=0.01)
    run(broken, before, 0, 3)
    again = copy.deepcopy(broken)
    after = SAEMuon(again, 0.1, adam_lr=0.01)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(again, after, 3, 6)
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0, "adam_lr": 0.1}, "`lr` must be above 0, got 0.0"),
        ({"lr": 0.1, "adam_lr": -1.0}, "`adam_lr` must be at least 0, got -1.0"),
        ({"lr": 0.1, "adam_lr": 0.1, "momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAEMuon(make(), **options)
