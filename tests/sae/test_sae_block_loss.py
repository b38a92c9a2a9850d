"""JumpReLU and the gated SAE by pairs, against float64 dense autograd and blocks."""

import pytest
import torch
from sae_examples import batch_of, first_dead, near, none_dead, perturbed

from reseed.sae import gated, jumprelu, kernels
from reseed.sae.base import Step
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.kernels import select
from reseed.system import compiling
from reseed.train.archetypes import make_archetypal
from reseed.train.optim.adam import SAEAdam

D, F, B = 24, 90, 300
LAST = Step(9, 10)
CONFIGS = {
    "jumprelu": JumpReLUConfig(num_latents=F, threshold_init=0.2, bandwidth=0.1),
    "jumprelu, L0*": JumpReLUConfig(
        num_latents=F,
        threshold_init=0.2,
        bandwidth=0.6,  # wider than θ, so that pre-activations near θ may be negative
        penalty="quadratic",
        target_l0=3.0,
        subtract_b_dec=True,
    ),
    "gated": GatedConfig(num_latents=F, l1_coefficient=0.7),
    "gated, free decoder": GatedConfig(
        num_latents=F, l1_coefficient=0.0, unit_norm_decoder=False, encoder_init="untied"
    ),
}
MODULES = {"jumprelu": jumprelu, "gated": gated}


@pytest.fixture(autouse=True)
def pairs_only(monkeypatch):
    """Use pairs at any density, and small blocks."""
    monkeypatch.setattr(select, "BLOCK_ROWS", 64)
    monkeypatch.setattr(select, "DENSEST", 1.0)
    monkeypatch.setattr(compiling, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    with kernels.override_enabled(True):
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=CONFIGS)
def sae(request):
    return make(CONFIGS[request.param])


def make(config, bias=-0.5):
    sae = perturbed(config, D, dtype=torch.float32, noise=0.2)
    sae.b_enc.data.add_(bias)
    return sae


def tokens(count=B):
    return batch_of(count, D, seed=2, dtype=torch.float32)


def dense_jumprelu(sae, x):
    """Return the loss with the values of the jump and the slopes of ramps of width ε."""
    c, width = sae.config, sae.config.bandwidth * D**0.5
    pre = (x - sae.b_dec * c.subtract_b_dec) @ sae.W_enc.T + sae.b_enc
    theta = sae.log_threshold.exp()
    hard = (pre > theta).double()
    ramp = ((pre.detach() - theta) / width).clamp(-0.5, 0.5)
    step = ramp - ramp.detach()
    latents = pre * hard + theta.detach() * step
    error = x - (latents @ sae.W_dec + sae.b_dec)
    l0 = (hard + step).sum(1).mean()
    penalty = l0 if c.penalty == "step" else (l0 / c.target_l0 - 1) ** 2
    return error.square().sum(1).mean() / D + sae.penalty_weight * penalty, latents


def dense_gated(sae, x):
    """Return the loss; its auxiliary reconstruction holds the decoder and the decoder's b_dec
    constant."""
    rows = x - sae.b_dec
    shared = rows @ sae.W_enc.T
    opened = (shared + sae.b_enc).clamp_min(0)
    latents = (opened > 0) * (sae.r_mag.exp() * shared + sae.b_mag).clamp_min(0)
    error = x - (latents @ sae.W_dec + sae.b_dec)
    by_gate = x - (opened @ sae.W_dec.detach() + sae.b_dec.detach())
    squares = error.square().sum(1).mean() + by_gate.square().sum(1).mean()
    return squares + sae.penalty_weight * opened.sum(1).mean(), latents


@pytest.mark.parametrize("count", [B, 1, 64])
def test_loss_and_every_gradient_are_those_of_float64_dense_autograd(sae, count):
    x = tokens(count)
    dense = dense_jumprelu if isinstance(sae.config, JumpReLUConfig) else dense_gated
    for weight in (sae.penalty_weight, 0.3):
        sae.penalty_weight = weight
        loss = sae.training_loss(x, LAST, none_dead(sae))
        gradients = torch.autograd.grad(loss.total, [*sae.parameters()])
        ours = dict(zip(names(sae), gradients, strict=True))
        exact = make(sae.config).double()
        exact.penalty_weight = weight
        total, latents = dense(exact, x.double())
        theirs = torch.autograd.grad(total, [*exact.parameters()])
        assert 0 < loss.l0 < F
        near(loss.total.detach(), total.detach())
        assert torch.equal(loss.fired, (latents > 0).sum(0))
        for name, b in zip(names(exact), theirs, strict=True):
            assert b.norm() > 0
            near(ours[name], b, 2e-6)


def names(sae):
    return [name for name, _ in sae.named_parameters()]


def test_few_pairs_are_summed_and_many_go_by_blocks_with_equal_results(sae, monkeypatch):
    module = MODULES[sae.config.name]
    taken = []
    for other, densest in (("_ByBlocks", 0.5), ("_ByPairs", 0.001)):
        monkeypatch.setattr(select, "DENSEST", densest)
        with monkeypatch.context() as patched:
            patched.setattr(module, other, None)
            loss = sae.training_loss(tokens(), LAST, none_dead(sae))
        taken.append((loss, torch.autograd.grad(loss.total, [*sae.parameters()])))
    (by_pairs, ours), (by_blocks, theirs) = taken
    assert by_pairs.parts.keys() == by_blocks.parts.keys()
    for name, part in by_blocks.parts.items():
        near(by_pairs.parts[name], part.double())
    for a, b in zip(ours, theirs, strict=True):
        near(a, b.double(), 5e-6)


def test_auxk_and_an_archetypal_decoder_match_the_plain_path(sae):
    object.__setattr__(sae.config, "aux_alpha", 0.5)
    try:
        make_archetypal(sae, 40, 0.5)
        found = []
        for on in (False, True):
            with kernels.override_enabled(on):
                loss = sae.training_loss(tokens(), Step(3, 100), first_dead(sae, 30))
                found.append((loss, torch.autograd.grad(loss.total, [*sae.parameters()])))
    finally:
        object.__setattr__(sae.config, "aux_alpha", 0.0)
    (plain, expected), (fast, ours) = found
    assert fast.parts["auxk"] > 0
    near(fast.total.detach(), plain.total.detach().double(), 2e-6)
    for a, b in zip(ours, expected, strict=True):
        near(a, b.double(), 1e-5)


def test_a_batch_without_active_pairs_trains_b_dec_alone(sae):
    sae, x = make(sae.config, bias=-1e3), tokens()
    loss = sae.training_loss(x, LAST, first_dead(sae, F))
    loss.total.backward()
    assert loss.l0 == 0
    assert loss.fired.sum() == 0
    near(loss.squared_error, (x - sae.b_dec).double().square().sum().detach())
    for name, p in sae.named_parameters():
        assert (p.grad != 0).any() == (name == "b_dec")


@pytest.mark.parametrize("where", ["x", "W_enc", "W_dec"])
def test_a_nan_makes_the_loss_nonfinite(sae, where):
    x = tokens()
    with torch.no_grad():
        if where == "x":
            x[70, 3] = float("nan")
        else:
            getattr(sae, where)[5, 2] = float("nan")
    assert not torch.isfinite(sae.training_loss(x, LAST, none_dead(sae)).total)


def test_steps_are_bit_equal_on_any_number_of_threads(sae):
    found = []
    for count in (1, 3, 2, 3):
        torch.set_num_threads(count)
        trained = make(sae.config)
        optimizer = SAEAdam(trained, 1e-2)
        losses = []
        for index in range(3):
            loss = trained.training_loss(tokens() + index, LAST, none_dead(trained))
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.total.detach(), loss.l0, *loss.parts.values()]
        found.append([*losses, *(p.detach().clone() for p in trained.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
