"""The gated SAE against cases worked by hand and dense autograd."""

import copy
import math

import pytest
import torch
from sae_examples import batch_of, none_dead, perturbed

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.gated import GatedConfig
from reseed.train.optim.adam import SAEAdam

LAST = Step(9, 10)


def make(num_latents=24, d_in=6, seed=0, dtype=torch.float64, **options):
    config = GatedConfig(num_latents=num_latents, **options)
    return perturbed(config, d_in, seed, dtype, noise=0.2)


def by_hand(**options):
    """Return an SAE and x = (2, 1, 3).

    Gates: (2, −1, 3) − (0, 0, 2) = (2, −1, 1); magnitudes: 2·(2, −1, 3) + b_mag.
    """
    sae = GatedConfig(num_latents=3, **options).build(3, torch.Generator()).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.diag(torch.tensor([1.0, -1.0, 1.0])))
        sae.W_dec.copy_(torch.eye(3))
        sae.b_enc.copy_(torch.tensor([0.0, 0.0, -2.0]))
        sae.r_mag.fill_(math.log(2))
        sae.b_mag.copy_(torch.tensor([-1.0, 5.0, -7.0]))
    return sae, torch.tensor([[2.0, 1.0, 3.0]], dtype=torch.float64)


def test_loss_and_gradients_by_hand():
    sae, x = by_hand(l1_coefficient=10.0)
    loss = sae.training_loss(x, LAST, none_dead(sae))
    # f = (3, 0, 0): the second gate is closed (its magnitude is 3), the third magnitude is < 0.
    torch.testing.assert_close(sae.encode(x), torch.tensor([[3.0, 0, 0]]).double())
    assert loss.parts["mse"].item() == pytest.approx(1 + 1 + 9)  # e = (−1, 1, 3)
    assert loss.parts["l1"] == 3  # ReLU(π) = (2, 0, 1)
    assert loss.parts["aux"] == 0 + 1 + 4  # x − ReLU(π) = (0, 1, 2)
    assert loss.total.item() == pytest.approx(11 + 30 + 5)
    assert (loss.fired.tolist(), loss.l0) == ([1, 0, 0], 1)
    loss.total.backward()
    # The gate's bias: λ − 2·(x − ReLU(π)) if open; the reconstruction gives it no gradient.
    assert sae.b_enc.grad.tolist() == pytest.approx([10, 0, 10 - 4])
    # The magnitude's bias: −2e where f > 0. r: the same times exp(r)·(W x) = 4.
    assert sae.b_mag.grad.tolist() == pytest.approx([2, 0, 0])
    assert sae.r_mag.grad.tolist() == pytest.approx([8, 0, 0])
    # The decoder: −2 f e from the first term alone.
    torch.testing.assert_close(
        sae.W_dec.grad, torch.tensor([[6.0, -6, -18], [0, 0, 0], [0, 0, 0]]).double()
    )
    # b_dec: −2e = (2, −2, −6) from the first decoder (none from the detached one), and through
    # the encoder −Wᵀ(dL/dπ + exp(r)·dL/dmagnitude) = −(10 + 4, 0, 6).
    assert sae.b_dec.grad.tolist() == pytest.approx([2 - 14, -2, -6 - 6])


def dense_loss(sae, x, warmup=1.0):
    c = sae.config
    shared = (x - sae.b_dec) @ sae.W_enc.T
    gate = shared + sae.b_enc
    latents = (gate > 0) * torch.relu(sae.r_mag.exp() * shared + sae.b_mag)
    first = (x - latents @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    third = (x - torch.relu(gate) @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum(1).mean()
    return first + warmup * c.l1_coefficient * torch.relu(gate).sum(1).mean() + third


def test_gradients_are_those_of_the_dense_formulation():
    sae, x = make(l1_coefficient=0.7), batch_of(64)
    ours, theirs = sae.training_loss(x, LAST, none_dead(sae)).total, dense_loss(sae, x)
    torch.testing.assert_close(ours, theirs)
    for (name, p), b in zip(
        sae.named_parameters(), torch.autograd.grad(theirs, list(sae.parameters())), strict=True
    ):
        (a,) = torch.autograd.grad(ours, p, retain_graph=True)
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_loss_and_gradients_add_up_over_blocks_of_tokens(dtype, near):
    """The loss takes blocks of 256 tokens: here two full blocks and a rest."""
    sae, x = make(num_latents=64, l1_coefficient=0.7), batch_of(2 * 256 + 44)
    theirs = dense_loss(sae, x)
    expected = torch.autograd.grad(theirs, list(sae.parameters()))
    counted = (sae.encode(x) > 0).sum(0)
    sae, x = sae.to(dtype), x.to(dtype)
    ours = sae.training_loss(x, LAST, none_dead(sae))
    torch.testing.assert_close(ours.total.double(), theirs, rtol=near, atol=0)
    torch.testing.assert_close(ours.fired, counted, rtol=0, atol=0 if near < 1e-6 else 1)
    ours.total.backward()
    for p, b in zip(sae.parameters(), expected, strict=True):
        assert (p.grad - b).norm() <= near * b.norm()


def test_penalty_warms_up():
    sae, x = make(), batch_of()
    for index, factor in ((0, 0.0), (1, 0.2), (5, 1.0), (50, 1.0)):
        ours = sae.training_loss(x, Step(index, 100), none_dead(sae)).total
        torch.testing.assert_close(ours, dense_loss(sae, x, factor))


def test_the_loss_is_a_mean_over_the_batch():
    sae, x = make(), batch_of()
    once = sae.training_loss(x, LAST, none_dead(sae))
    twice = sae.training_loss(x.repeat(2, 1), LAST, none_dead(sae))
    torch.testing.assert_close(once.total, twice.total)
    torch.testing.assert_close(twice.squared_error, 2 * once.squared_error)


def test_a_new_gated_sae_equals_a_relu_sae():
    """With zero biases and r = 0, gate and magnitude are the same."""
    sae = GatedConfig(num_latents=24).build(6, torch.Generator().manual_seed(0)).double()
    x = batch_of()
    torch.testing.assert_close(sae.encode(x), torch.relu(x @ sae.W_enc.T))
    assert sae.config.unit_norm_decoder
    assert sae.config.published_lr(2**20) == 3e-4


def test_folding_rescales_both_biases():
    sae, x, scale = make(), batch_of(100) * 40, 0.037
    trained, raw = sae(x * scale), sae.folded(scale)(x)
    assert (trained.latents > 0).any()
    torch.testing.assert_close(raw.latents, trained.latents / scale)
    torch.testing.assert_close(raw.reconstruction, trained.reconstruction / scale)
    assert torch.equal(sae.folded(scale).r_mag, sae.r_mag)


def test_saving_and_loading_is_exact(tmp_path):
    sae, x = make(dtype=torch.float32), batch_of().float()
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    for (name, a), b in zip(sae.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(sae(x).latents, loaded(x).latents)


def test_a_resume_is_exact():
    def train(sae, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            sae.training_loss(batch_of(seed=seed), LAST, none_dead(sae)).total.backward()
            optimizer.step()

    whole, other = make(), make(seed=5)
    first, second = SAEAdam(whole, 1e-2), SAEAdam(other, 1e-2)
    train(whole, first, range(3))
    other.load_state_dict(whole.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(whole, first, range(3, 6))
    train(other, second, range(3, 6))
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1_coefficient": -1}, "`l1_coefficient` must be a number, at least 0; got -1"),
        ({"l1_warmup_fraction": 2}, "`l1_warmup_fraction` must be a number, .* at most 1; got 2"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GatedConfig(num_latents=8, **options)
