"""TopK and its losses against a dense formulation, and cases worked by hand."""

import pytest
import torch
from sae_examples import batch_of, none_dead, perturbed

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.topk import TopKConfig

STEP = Step(0, 10)


def make(num_latents=24, k=3, d_in=6, seed=0, dtype=torch.float64, **options):
    return perturbed(TopKConfig(num_latents=num_latents, k=k, **options), d_in, seed, dtype)


def dense_loss(sae, x, dead):
    """Return the loss of Gao et al. 2024, with masks over dense tensors."""
    config = sae.config

    def top(pre, k):
        return torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0) * pre.relu()

    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    variance = (x - x.mean(0)).square().sum()
    error = x - (top(pre, config.k) @ sae.W_dec + sae.b_dec)
    loss = error.square().sum() / variance
    if config.multi_topk:
        more = x - (top(pre, min(4 * config.k, sae.num_latents)) @ sae.W_dec + sae.b_dec)
        loss = loss + more.square().sum() / variance / 8
    if config.aux_alpha and dead.any():
        k_aux = config.k_aux or sae.d_in // 2
        pre_dead = (x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
        pre_dead = torch.where(dead, pre_dead, -torch.inf)
        e_hat = top(pre_dead, min(k_aux, int(dead.sum()))) @ sae.W_dec
        e = error.detach()
        aux = (e_hat - e).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + config.aux_alpha * min(int(dead.sum()) / k_aux, 1.0) * aux
    return loss


@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize("num_dead", [0, 1, 2, 9, 24])
@pytest.mark.parametrize(("k", "num_latents"), [(3, 24), (24, 24), (1, 24)])
def test_loss_and_gradients_are_those_of_the_dense_formulation(
    k, num_latents, num_dead, multi_topk
):
    sae = make(num_latents, k, multi_topk=multi_topk, aux_alpha=0.3)
    dead = none_dead(sae)
    dead[torch.randperm(num_latents, generator=torch.Generator().manual_seed(1))[:num_dead]] = True
    x = batch_of()
    ours, theirs = sae.training_loss(x, STEP, dead).total, dense_loss(sae, x, dead)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    parameters = dict(sae.named_parameters())
    for name, a, b in zip(
        parameters,
        torch.autograd.grad(ours, list(parameters.values())),
        torch.autograd.grad(theirs, list(parameters.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_single_latent_has_the_loss_of_the_dense_formulation():
    sae = make(num_latents=1, k=1)
    x = batch_of()
    loss = sae.training_loss(x, STEP, none_dead(sae)).total
    torch.testing.assert_close(loss, dense_loss(sae, x, none_dead(sae)))


def test_auxk_of_a_perfect_reconstruction_is_zero_with_zero_gradient():
    """The error has no variance: 0/0 must not become NaN, neither in the value nor the gradient."""
    sae = make(num_latents=12, k=12, d_in=6, aux_alpha=1.0)
    with torch.no_grad():
        sae.W_enc[:6], sae.W_enc[6:] = torch.eye(6), -torch.eye(6)
        sae.W_dec.copy_(sae.W_enc)
        sae.b_enc.zero_(), sae.b_dec.zero_()
    dead = ~none_dead(sae)
    loss = sae.training_loss(batch_of(), STEP, dead)
    loss.total.backward()
    assert loss.parts["fvu"] == 0
    assert loss.parts["aux"] == 0
    assert all(p.grad.abs().max() == 0 for p in sae.parameters())


def test_at_most_k_latents_are_active_and_the_sparse_decoder_equals_the_dense_one():
    sae = make(num_latents=64, k=5)
    x = batch_of(100)
    out = sae(x)
    assert (out.latents != 0).sum(1).max() <= 5
    assert (out.latents >= 0).all()
    torch.testing.assert_close(out.reconstruction, sae.decode(out.latents))
    assert torch.equal(out.latents, sae.encode(x))


def test_the_loss_reports_firing_error_and_l0_of_the_forward_pass():
    sae = make(num_latents=64, k=5)
    x = batch_of(100)
    loss = sae.training_loss(x, STEP, none_dead(sae))
    out = sae(x)
    assert loss.fired.dtype == torch.int64
    assert torch.equal(loss.fired, (out.latents > 0).sum(0))
    torch.testing.assert_close(loss.squared_error, (x - out.reconstruction).square().sum())
    assert loss.l0 == (out.latents > 0).sum() / 100
    assert not any(part.requires_grad for part in loss.parts.values())


def test_fvu_of_the_mean_is_one():
    sae = make()
    x = batch_of()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.initialise_b_dec(x.mean(0))
    loss = sae.training_loss(x, STEP, none_dead(sae))
    torch.testing.assert_close(loss.parts["fvu"], torch.ones((), dtype=torch.float64))


def test_activations_of_other_dtypes_and_shapes_are_accepted():
    sae = make(dtype=torch.float32)
    x = batch_of(12, dtype=torch.bfloat16)
    out = sae(x)
    assert out.latents.dtype == out.reconstruction.dtype == torch.float32
    assert torch.equal(out.latents, sae.encode(x.float()))
    loss = sae.training_loss(x, STEP, none_dead(sae)).total
    assert torch.equal(loss, sae.training_loss(x.float(), STEP, none_dead(sae)).total)
    folded = sae(x.reshape(3, 4, 6))
    assert folded.latents.shape == (3, 4, 24)
    assert torch.equal(folded.reconstruction.reshape(12, 6), out.reconstruction)
    assert sae.encode(x[0]).shape == (24,)
    assert sae(x[0]).reconstruction.shape == (6,)


def test_gradient_reaches_the_activations():
    sae = make()
    x = batch_of().requires_grad_()
    sae(x).reconstruction.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    latents = sae.encode(y)
    sae.decode(latents).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert x.grad.abs().max() > 0


def test_published_learning_rate():
    config = TopKConfig(num_latents=64)
    assert config.published_lr(2**14) == 2e-4
    assert config.published_lr(2**16) == 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_latents": 1024, "k": 4096},
            r"`k` \(=4096\) must not exceed `num_latents` \(=1024\)",
        ),
        ({}, "`num_latents` or `expansion_factor` must be given; both are null"),
        ({"num_latents": 64, "k": "abc"}, "`k` must be an integer,? at least 1; got 'abc'"),
        ({"num_latents": 0}, "`num_latents` must be .* at least 1; got 0"),
        ({"num_latents": 64, "decoder_init_norm": 0.1}, "`decoder_init_norm` must be 1 with"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TopKConfig(**options)


def test_k_is_checked_once_the_activations_give_the_width():
    config = TopKConfig(expansion_factor=2, k=33)
    config.check_d_in(17)
    with pytest.raises(ConfigError, match=r"`k` \(=33\) must not exceed `num_latents` \(=32\)"):
        config.check_d_in(16)
    with pytest.raises(ConfigError, match="must not exceed"):
        config.build(16, torch.Generator())
