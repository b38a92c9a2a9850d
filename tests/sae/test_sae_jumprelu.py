"""JumpReLU and its thresholds, against cases worked by hand and dense autograd."""

import copy
import math

import pytest
import torch
from sae_examples import batch_of, none_dead, perturbed

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.train.optim.adam import SAEAdam

LAST = Step(9, 10)


def make(num_latents=24, d_in=6, seed=0, dtype=torch.float64, **options):
    options = {"threshold_init": 0.2, "bandwidth": 0.3, **options}
    return perturbed(JumpReLUConfig(num_latents=num_latents, **options), d_in, seed, dtype)


def by_hand(**options):
    """Return an SAE with D = 4 (√D = 2), θ = ε = 1, and a token with π = (0.75, 1.25, 3, 0.25)."""
    config = JumpReLUConfig(num_latents=4, threshold_init=0.5, bandwidth=0.5, **options)
    sae = config.build(4, torch.Generator()).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
        sae.log_threshold.zero_()
    return sae, torch.tensor([[0.75, 1.25, 3.0, 0.25]], dtype=torch.float64)


def test_loss_and_gradients_by_hand():
    sae, x = by_hand(l0_coefficient=2.0)
    loss = sae.training_loss(x, LAST, none_dead(sae))
    # f = (0, 1.25, 3, 0), e = (.75, 0, 0, .25): ‖e‖²/D = .625/4; L0 = 2.
    assert loss.parts["mse"] == 0.15625
    assert loss.parts["penalty"] == loss.l0 == 2
    assert loss.total == 0.15625 + 2 * 2
    assert loss.squared_error == 0.625
    assert loss.fired.tolist() == [0, 1, 1, 0]
    loss.total.backward()
    # The kernel covers latents 0 (below θ) and 1 (above), both |π − θ| = ¼ < ½, but not 2 and 3.
    # dL/df = −2e/D = (−.375, 0, 0, −.125); ∂f/∂θ = −θ/ε = −1; ∂L0/∂θ = −1/ε = −1; ∂θ/∂log θ = 1.
    assert sae.log_threshold.grad.tolist() == pytest.approx([0.375 - 2, -2, 0, 0])
    # Gradients flow through f where it is active, and there the error is 0.
    assert sae.b_enc.grad.tolist() == [0, 0, 0, 0]
    assert sae.b_dec.grad.tolist() == pytest.approx([-0.375, 0, 0, -0.125])


def test_the_kernel_covers_both_sides_of_the_threshold():
    """A public library applies it after the jump and loses the side below θ."""
    sae, x = by_hand(l0_coefficient=0.0)
    with torch.no_grad():
        sae.b_dec.fill_(7.0)
    sae.training_loss(x, LAST, none_dead(sae)).total.backward()
    assert (sae.log_threshold.grad != 0).tolist() == [True, True, False, False]


def test_quadratic_penalty_by_hand():
    sae, x = by_hand(l0_coefficient=3.0, penalty="quadratic", target_l0=4.0)
    loss = sae.training_loss(x, LAST, none_dead(sae))
    assert loss.parts["penalty"] == (2 / 4 - 1) ** 2
    assert loss.total == 0.15625 + 3 * 0.25
    loss.total.backward()
    # d penalty / dL0 = 2 (L0/L0* − 1) / L0* = −.25: too few are active, so θ must fall.
    assert sae.log_threshold.grad[1].item() == pytest.approx(3 * 0.25)


def test_tanh_penalty_by_hand():
    sae, x = by_hand(l0_coefficient=3.0, penalty="tanh", tanh_scale=0.8)
    with torch.no_grad():
        sae.W_dec[1] *= 2  # ‖d‖ = 2
        sae.b_dec[1] = -1.25  # keeps the reconstruction
    loss = sae.training_loss(x, LAST, none_dead(sae))
    # f = (0, 1.25, 3, 0): tanh(.8 · 1.25 · 2) + tanh(.8 · 3).
    assert loss.parts["penalty"].item() == pytest.approx(math.tanh(2) + math.tanh(2.4))
    assert loss.total.item() == pytest.approx(0.15625 + 3 * (math.tanh(2) + math.tanh(2.4)))
    assert loss.l0 == 2
    loss.total.backward()
    # dP/df_j = c‖d_j‖ (1 − tanh²(c f_j‖d_j‖)): .8 where f = 0.
    slopes = [0.8, 1.6 * (1 - math.tanh(2) ** 2), 0.8 * (1 - math.tanh(2.4) ** 2), 0.8]
    # Gradients flow where f is active, and there the error is 0.
    assert sae.b_enc.grad.tolist() == pytest.approx([0, 3 * slopes[1], 3 * slopes[2], 0])
    # ∂f/∂θ = −θ/ε = −1 for latents 0 and 1; latent 0 has dL/df = −.375 from the reconstruction.
    assert sae.log_threshold.grad.tolist() == pytest.approx(
        [0.375 - 3 * slopes[0], -3 * slopes[1], 0, 0]
    )
    # dP/d‖d_1‖ = c f_1 (1 − tanh²), along the row.
    assert sae.W_dec.grad[1, 1].item() == pytest.approx(3 * 0.8 * 1.25 * (1 - math.tanh(2) ** 2))


def dense_loss(sae, x):
    """Return a surrogate loss with the values of the jump and the slopes of ramps of width ε."""
    c = sae.config
    width = c.bandwidth * sae.d_in**0.5
    pre = (x - sae.b_dec * c.subtract_b_dec) @ sae.W_enc.T + sae.b_enc
    theta = sae.log_threshold.exp()
    hard = (pre > theta).double()
    # As a function of θ alone, a ramp has slope −1/ε within ε/2 of the jump, and 0 beyond.
    ramp = ((pre.detach() - theta) / width).clamp(-0.5, 0.5)
    step = hard + ramp - ramp.detach()
    latents = pre * hard + theta.detach() * (ramp - ramp.detach())
    error = x - (latents @ sae.W_dec + sae.b_dec)
    l0 = step.sum(1).mean()
    penalty = {
        "step": lambda: l0,
        "quadratic": lambda: (l0 / c.target_l0 - 1) ** 2,
        "tanh": lambda: (c.tanh_scale * latents * sae.W_dec.norm(dim=1)).tanh().sum(1).mean(),
    }[c.penalty]()
    return error.square().sum(1).mean() / sae.d_in + c.l0_coefficient * penalty


@pytest.mark.parametrize(
    ("penalty", "target"), [("step", None), ("quadratic", 3.0), ("tanh", None), ("step", 3.0)]
)
@pytest.mark.parametrize("centred", [False, True])
def test_gradients_are_those_of_the_dense_formulation(penalty, target, centred):
    sae = make(l0_coefficient=0.7, penalty=penalty, target_l0=target, subtract_b_dec=centred)
    x = batch_of(64)
    ours, theirs = sae.training_loss(x, LAST, none_dead(sae)).total, dense_loss(sae, x)
    torch.testing.assert_close(ours, theirs)
    for (name, p), b in zip(
        sae.named_parameters(), torch.autograd.grad(theirs, list(sae.parameters())), strict=True
    ):
        (a,) = torch.autograd.grad(ours, p, retain_graph=True)
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_loss_and_gradients_add_up_over_blocks_of_tokens(dtype, near, centred):
    """The loss takes blocks of 256 tokens: here two full blocks and a rest."""
    sae = make(num_latents=64, l0_coefficient=0.7, target_l0=3.0, subtract_b_dec=centred)
    x = batch_of(2 * 256 + 44)
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


def test_published_recipe():
    config = JumpReLUConfig(num_latents=48)
    assert config.published_lr(2**20) == 7e-5
    assert (config.threshold_init, config.bandwidth) == (0.001, 0.001)
    assert config.unit_norm_decoder
    sae = config.build(49, torch.Generator().manual_seed(0))
    # The published value is for E‖x‖² = 1; here E‖x‖ = √49.
    torch.testing.assert_close(sae.threshold, torch.full((48,), 0.007))


def test_penalty_warms_up():
    sae, x = by_hand(l0_coefficient=10.0)
    totals = [
        sae.training_loss(x, Step(i, 100), none_dead(sae)).total.item() for i in (0, 1, 5, 50)
    ]
    assert totals == pytest.approx([0.15625, 4.15625, 20.15625, 20.15625])


def test_the_loss_is_a_mean_over_the_batch():
    sae, x = by_hand()
    once = sae.training_loss(x, LAST, none_dead(sae))
    twice = sae.training_loss(x.repeat(2, 1), LAST, none_dead(sae))
    assert once.total == twice.total
    assert twice.squared_error == 2 * once.squared_error


@pytest.mark.parametrize("centred", [False, True])
def test_folding_rescales_the_thresholds(centred):
    sae, x, scale = make(subtract_b_dec=centred), batch_of(100) * 40, 0.037
    trained, raw = sae(x * scale), sae.folded(scale)(x)
    assert (trained.latents > 0).any()
    assert torch.equal(trained.latents == 0, raw.latents == 0)
    torch.testing.assert_close(raw.latents, trained.latents / scale)
    torch.testing.assert_close(raw.reconstruction, trained.reconstruction / scale)
    torch.testing.assert_close(sae.folded(scale).threshold, sae.threshold / scale)


def test_saving_and_loading_is_exact(tmp_path):
    sae, x = make(dtype=torch.float32), batch_of().float()
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert torch.equal(loaded.log_threshold, sae.log_threshold)
    assert torch.equal(sae(x).latents, loaded(x).latents)


def test_a_resume_is_exact():
    def train(sae, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            sae.training_loss(batch_of(seed=seed), LAST, none_dead(sae)).total.backward()
            optimizer.step()

    whole, other = make(), make(seed=5)
    first, second = SAEAdam(whole, 1e-2, betas=(0.0, 0.999)), SAEAdam(other, 1e-2)
    train(whole, first, range(3))
    other.load_state_dict(whole.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before = whole.log_threshold.detach().clone()
    train(whole, first, range(3, 6))
    train(other, second, range(3, 6))
    assert not torch.equal(before, whole.log_threshold)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True)
    )


def test_the_sparsity_label_names_coefficient_or_target():
    assert JumpReLUConfig(num_latents=8).sparsity == "λ=0.001"
    assert JumpReLUConfig(num_latents=8, penalty="quadratic", target_l0=32).sparsity == "L0*=32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_l0": 0}, "`target_l0` must be a number or null, above 0; got 0"),
        ({"penalty": "quadratic"}, "`target_l0` must be given with `penalty=quadratic`"),
        ({"penalty": "tanj"}, "`penalty` must be one of step, quadratic, tanh; .*`tanh`"),
        ({"tanh_scale": 0}, "`tanh_scale` must be a number, above 0; got 0"),
        ({"bandwidth": 0}, "`bandwidth` must be a number, above 0; got 0"),
        ({"threshold_init": -1}, "`threshold_init` must be a number, above 0; got -1"),
        ({"l0_coefficient": math.nan}, "`l0_coefficient` must be a number, at least 0; got nan"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        JumpReLUConfig(num_latents=8, **options)
