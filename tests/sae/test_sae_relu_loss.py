"""The fast paths of a ReLU SAE's loss, against float64 dense autograd and the plain path."""

import pytest
import torch
from sae_examples import batch_of, first_dead, near, none_dead, perturbed

from reseed.sae import kernels
from reseed.sae.base import Step
from reseed.sae.kernels import relu_blocks, select
from reseed.sae.relu import ReLUConfig
from reseed.system import compiling
from reseed.train.archetypes import make_archetypal
from reseed.train.optim.adam import SAEAdam

D, F, B = 24, 90, 300
LAST = Step(9, 10)


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    """Use small blocks, so that there are several of each kind."""
    monkeypatch.setattr(select, "BLOCK_ROWS", 64)
    monkeypatch.setattr(relu_blocks, "BLOCK_ROWS", 64)
    monkeypatch.setattr(relu_blocks, "STORED_ROWS", 128)
    monkeypatch.setattr(relu_blocks, "TILE_LATENTS", 40)
    monkeypatch.setattr(compiling, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    with kernels.override_enabled(True):
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=["pairs", "blocks"])
def way(request, monkeypatch):
    """Force one of the two paths at any density."""
    monkeypatch.setattr(select, "DENSEST", 1.0 if request.param == "pairs" else 0.0)
    return request.param


def make(bias=-0.5, **options):
    """Return an SAE with random parameters; most of its latents are silent on most tokens."""
    config = ReLUConfig(num_latents=F, **{"l1_coefficient": 0.7, **options})
    sae = perturbed(config, D, dtype=torch.float32, noise=0.2)
    sae.b_enc.data.add_(bias)
    return sae


def tokens(count=B):
    return batch_of(count, D, seed=2, dtype=torch.float32)


def dense(sae, x):
    """Return the loss, latents, error and gradients in float64."""
    W_enc, b_enc, W_dec, b_dec = exact = [
        p.detach().double().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    ]
    x, config = x.double(), sae.config
    f = ((x - config.subtract_b_dec * b_dec) @ W_enc.T + b_enc).clamp_min(0)
    error = x - (f @ W_dec + b_dec)
    norms = W_dec.norm(dim=1) if config.l1_weighted_by_decoder_norm else 1.0
    total = error.square().sum(1).mean() + sae.penalty_weight * (f * norms).sum(1).mean()
    return total, f, error, torch.autograd.grad(total, exact)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subtract_b_dec": True},
        {"l1_weighted_by_decoder_norm": False, "unit_norm_decoder": True, "decoder_init_norm": 1.0},
        {"encoder_init": "untied", "decoder_init_norm": 0.5, "subtract_b_dec": True},
        {"l1_coefficient": 0.0},
        {"target_l0": 5.0},
    ],
)
@pytest.mark.parametrize("count", [B, 1, 64])
def test_loss_and_every_gradient_are_those_of_float64_dense_autograd(options, count, way):
    sae, x = make(**options), tokens(count)
    for weight in (sae.penalty_weight, 0.3):
        sae.penalty_weight = weight  # as a controller does between steps
        loss = sae.training_loss(x, LAST, none_dead(sae))
        total, f, error, gradients = dense(sae, x)
        assert 0 < loss.l0 < F
        near(loss.total.detach(), total.detach())
        near(loss.squared_error, error.square().sum().detach())
        assert torch.equal(loss.fired, (f > 0).sum(0))
        ours = torch.autograd.grad(loss.total, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
        for a, b in zip(ours, gradients, strict=True):
            assert b.norm() > 0
            near(a, b)


def test_the_gradient_of_a_multiple_of_the_loss_is_that_multiple(way):
    sae, x = make(), tokens()
    loss = sae.training_loss(x, LAST, none_dead(sae)).total
    once = torch.autograd.grad(loss, list(sae.parameters()), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, list(sae.parameters()))
    for a, b in zip(thrice, once, strict=True):
        near(a, 3 * b.double())


def plain_and_fast(sae, x, dead):
    for on in (False, True):
        with kernels.override_enabled(on):
            loss = sae.training_loss(x, Step(3, 100), dead)
            yield loss, torch.autograd.grad(loss.total, list(sae.parameters()))


@pytest.mark.parametrize("centred", [False, True])
def test_auxk_and_warm_up_match_the_plain_path(way, centred):
    sae = make(aux_alpha=0.5, subtract_b_dec=centred)
    (plain, expected), (fast, found) = plain_and_fast(sae, tokens(), first_dead(sae, 30))
    assert fast.parts["auxk"] > 0
    assert fast.parts.keys() == plain.parts.keys()
    for name, part in plain.parts.items():
        near(fast.parts[name], part.double(), 2e-6)
    for a, b in zip(found, expected, strict=True):
        near(a, b.double(), 3e-6)


def test_a_batch_without_active_pairs_trains_b_dec_alone(way):
    sae, x = make(bias=-1e3), tokens()
    loss = sae.training_loss(x, LAST, first_dead(sae, F))
    loss.total.backward()
    assert loss.l0 == 0
    assert loss.parts["l1"] == 0
    assert loss.fired.sum() == 0
    near(loss.squared_error, (x - sae.b_dec).double().square().sum().detach())
    for p in (sae.W_enc, sae.b_enc, sae.W_dec):
        assert (p.grad == 0).all()
    near(sae.b_dec.grad, -2 * (x - sae.b_dec).detach().double().mean(0))


def test_a_decoder_row_of_zeros_has_the_gradient_of_dense_autograd(way):
    sae, x = make(), tokens()
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.training_loss(x, LAST, none_dead(sae)).total.backward()
    near(sae.W_dec.grad, dense(sae, x)[3][2])


@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc", "W_dec"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_input_or_weight_makes_the_loss_nonfinite(way, where, bad):
    sae, x = make(), tokens()
    with torch.no_grad():
        x[70, 3] = bad if where == "x" else x[70, 3]
        for name in ("W_enc", "W_dec"):
            getattr(sae, name)[5, 2] += bad if where == name else 0.0
        sae.b_enc[5] += bad if where == "b_enc" else 0.0
    assert not torch.isfinite(sae.training_loss(x, LAST, none_dead(sae)).total)


def steps(way_dense, threads_in_all, monkeypatch):
    torch.set_num_threads(threads_in_all)
    monkeypatch.setattr(select, "DENSEST", way_dense)
    sae = make(subtract_b_dec=True)
    optimizer, told = SAEAdam(sae, 1e-2), []
    for index in range(3):
        loss = sae.training_loss(tokens() + index, LAST, none_dead(sae))
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        told += [loss.total.detach(), loss.squared_error, loss.l0, *loss.parts.values()]
    return [*told, *(p.detach().clone() for p in sae.parameters())]


def test_steps_are_bit_equal_on_any_number_of_threads(way, monkeypatch):
    found = [steps(select.DENSEST, count, monkeypatch) for count in (1, 3, 2, 3)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_active_pairs_are_returned_only_if_they_are_few(monkeypatch):
    monkeypatch.setattr(select, "DENSEST", 0.1)
    x, W, zeros = tokens(), torch.randn(F, D), torch.zeros(F)

    def pairs(bias, rows=x):
        return select.active_pairs(rows, W, torch.full((F,), bias), zeros)

    found = pairs(-8.0)
    assert found is not None
    values, owners, latents = found
    exact = x.double() @ W.double().T - 8
    assert (owners * F + latents).tolist() == (exact.flatten() > 0).nonzero().flatten().tolist()
    near(values, exact[exact > 0])
    assert pairs(0.0) is None  # half of them
    some = x.clone()
    some[:256] *= 1e-3  # gives few pairs in the first blocks, half in the last
    assert pairs(-0.1, some) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("floor", [0.0, 0.7])
def test_a_rough_product_finds_every_pair(monkeypatch, share, floor):
    """One row is far larger than the others, and floors have either sign."""
    monkeypatch.setattr(select, "screen_pays", lambda *_: True)
    monkeypatch.setattr(select, "SCREENED", 0.5)
    x, generator = tokens(), torch.Generator().manual_seed(5)
    x[7] *= 30
    W, floors = torch.randn(F, D, generator=generator), floor * torch.randn(F, generator=generator)
    exact = x.double() @ W.double().T - floors
    bias = float(exact.flatten().quantile(1 - share)) + 1e-3
    found = select.screened(x, W, torch.full((F,), -bias), floors)
    assert found is not None
    values, owners, latents = found
    expected = exact > bias
    assert expected.any() == (share > 0)
    assert (owners * F + latents).tolist() == expected.flatten().nonzero().flatten().tolist()
    near(values, (x.double() @ W.double().T - bias)[expected])
    x[9, 1] = float("nan")
    assert select.screened(x, W, torch.full((F,), -bias), floors) is None


def test_the_gradient_of_an_archetypal_decoder_matches_the_plain_path(way):
    sae = make(decoder_init_norm=1.0)
    make_archetypal(sae, 40, 0.5)
    (_, expected), (_, found) = plain_and_fast(sae, tokens(), none_dead(sae))
    for a, b in zip(found, expected, strict=True):
        near(a, b.double(), 5e-6)


def test_unsupported_inputs_take_the_plain_path(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("took the fast path")

    monkeypatch.setattr("reseed.sae.relu.relu_loss", refuse)
    sae, x = make(), tokens(8)
    with pytest.raises(AssertionError, match="took the fast path"):
        sae.training_loss(x, LAST, none_dead(sae))
    sae.training_loss(x.requires_grad_(), LAST, none_dead(sae)).total.backward()
    assert x.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        sae.training_loss(x.detach(), LAST, none_dead(sae))
    with kernels.override_enabled(False):
        sae.training_loss(x.detach(), LAST, none_dead(sae))
    sae.double().training_loss(x.detach(), LAST, none_dead(sae))
