"""ReLU + L1 against cases worked by hand, and behaviour that all architectures share."""

import pytest
import torch
from sae_examples import none_dead

from reseed.config import Config
from reseed.errors import ConfigError
from reseed.sae import load_all
from reseed.sae.base import SAE, Step
from reseed.sae.losses import ratio_or_zero, warmup_factor
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

CONFIGS = {
    "topk": TopKConfig(num_latents=48, k=4),
    "relu": ReLUConfig(num_latents=48),
    "relu, centred": ReLUConfig(num_latents=48, subtract_b_dec=True),
}


def by_hand(**options):
    """Return a 2-latent SAE and a token x = (2, 1): f = (3, 0), x̂ = (1.5, 0), e = (.5, 1)."""
    sae = ReLUConfig(num_latents=2, **options).build(2, torch.Generator())
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0.0], [3.0, 4.0]]))
    return sae, torch.tensor([[2.0, 1.0]])


def test_loss_by_hand():
    sae, x = by_hand(l1_coefficient=10.0)
    loss = sae.training_loss(x, Step(50, 100), none_dead(sae))
    assert loss.parts["mse"] == 1.25
    assert loss.parts["l1"] == 1.5  # 3 · ‖(.5, 0)‖ + 0 · 5
    assert loss.total == 1.25 + 15
    assert loss.fired.tolist() == [1, 0]
    assert loss.l0 == 1
    assert loss.squared_error == 1.25


def test_gradients_by_hand():
    sae, x = by_hand(l1_coefficient=10.0)
    sae.training_loss(x, Step(50, 100), none_dead(sae)).total.backward()
    # dL/df = −2 e·d + λ‖d‖ where f > 0: −2 · .5 · .5 + 10 · .5 for latent 0.
    assert sae.b_enc.grad.tolist() == [4.5, 0]
    assert sae.W_enc.grad.tolist() == [[9.0, 4.5], [0, 0]]
    # −2 f e + λ f d/‖d‖: (−3 + 30, −6).
    assert sae.W_dec.grad.tolist() == [[27.0, -6.0], [0, 0]]
    assert sae.b_dec.grad.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_are_those_of_the_dense_formulation(centred, weighed):
    options = {"subtract_b_dec": centred, "l1_weighted_by_decoder_norm": weighed}
    sae = ReLUConfig(num_latents=24, l1_coefficient=0.7, **options).build(
        6, torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    sae = sae.double()
    x = torch.randn(32, 6, generator=generator).double()
    pre = torch.einsum("bd,fd->bf", x - centred * sae.b_dec, sae.W_enc) + sae.b_enc
    f = pre * (pre > 0)
    norms = (sae.W_dec**2).sum(1).sqrt() if weighed else 1.0
    error = x - torch.einsum("bf,fd->bd", f, sae.W_dec) - sae.b_dec
    theirs = (error**2).sum(1).mean() + 0.7 * (f * norms).sum(1).mean()
    ours = sae.training_loss(x, Step(9, 10), none_dead(sae)).total
    torch.testing.assert_close(ours, theirs)
    parameters = list(sae.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_plain_l1_by_hand():
    sae, x = by_hand(l1_coefficient=10.0, l1_weighted_by_decoder_norm=False)
    assert sae.training_loss(x, Step(50, 100), none_dead(sae)).total == 1.25 + 30


def test_l1_warms_up_over_the_first_twentieth():
    sae, x = by_hand(l1_coefficient=10.0)
    penalty = [
        sae.training_loss(x, Step(i, 100), none_dead(sae)).total.item() - 1.25 for i in range(8)
    ]
    assert penalty == pytest.approx([0, 3, 6, 9, 12, 15, 15, 15])
    assert warmup_factor(0, 100, 0.0) == 1


def test_the_loss_is_a_mean_over_the_batch():
    """The same token twice has the same loss as once."""
    sae, x = by_hand()
    once = sae.training_loss(x, Step(9, 10), none_dead(sae))
    twice = sae.training_loss(x.repeat(2, 1), Step(9, 10), none_dead(sae))
    assert once.total == twice.total
    assert twice.squared_error == 2 * once.squared_error


def test_weighted_l1_cannot_be_evaded_by_scaling():
    """Scaling d by c and (E, b) by 1/c has no effect, because the norm weighs f."""
    sae = ReLUConfig(num_latents=16).build(5, torch.Generator().manual_seed(0))
    x = torch.randn(20, 5)
    before = sae.training_loss(x, Step(9, 10), none_dead(sae)).total
    with torch.no_grad():
        factor = torch.rand(16) + 0.5
        sae.W_dec *= factor[:, None]
        sae.W_enc /= factor[:, None]
        sae.b_enc /= factor
    torch.testing.assert_close(sae.training_loss(x, Step(9, 10), none_dead(sae)).total, before)


def test_published_recipe():
    config = ReLUConfig(num_latents=48)
    assert config.published_lr(2**20) == 5e-5
    assert (config.l1_coefficient, config.l1_warmup_fraction) == (5.0, 0.05)
    sae = config.build(7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((48,), 0.1))
    assert not config.unit_norm_decoder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folded_sae_on_raw_activations_matches_the_trained_one_on_scaled_ones(name):
    sae = CONFIGS[name].build(9, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    x, scale = torch.randn(30, 9, dtype=torch.float64) * 40, 0.037
    trained, raw = sae(x * scale), sae.folded(scale)(x)
    torch.testing.assert_close(raw.latents, trained.latents / scale)
    torch.testing.assert_close(raw.reconstruction, trained.reconstruction / scale)
    assert torch.equal(sae.folded(scale).W_dec, sae.W_dec)
    with pytest.raises(ValueError, match="`scale` must be above 0, got 0"):
        sae.folded(0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_generator_alone_decides_the_initial_weights(name):
    """In a public library seeds do not reach the initialisation."""

    def build(seed):
        return CONFIGS[name].build(9, torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    a = build(0)
    torch.manual_seed(2)
    assert torch.equal(a.W_dec, build(0).W_dec)
    assert torch.equal(a.W_enc, build(0).W_enc)
    assert (a.W_dec - build(1).W_dec).norm(dim=1).min() > 0
    norm = CONFIGS[name].decoder_init_norm
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.full((48,), norm))
    assert torch.equal(a.W_enc, a.W_dec)
    assert a.b_enc.abs().max() == a.b_dec.abs().max() == 0


def test_encoder_init_scale_scales_the_tied_encoder():
    sae = ReLUConfig(num_latents=8, encoder_init_scale=0.5).build(4, torch.Generator())
    assert torch.equal(sae.W_enc, 0.5 * sae.W_dec)


def test_initial_weights_do_not_depend_on_the_default_dtype():
    expected = CONFIGS["topk"].build(9, torch.Generator().manual_seed(0)).W_dec
    torch.set_default_dtype(torch.float64)
    try:
        found = CONFIGS["topk"].build(9, torch.Generator().manual_seed(0)).W_dec
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.float(), expected)


def test_directions_are_uniform_on_the_sphere():
    sae = TopKConfig(num_latents=20_000, k=1).build(3, torch.Generator().manual_seed(0))
    rows = sae.W_dec.detach()
    assert rows.mean(0).abs().max() < 4 / (3 * 20_000) ** 0.5
    torch.testing.assert_close(rows.T @ rows / 20_000, torch.eye(3) / 3, rtol=0, atol=0.01)


def test_architectures_are_known_by_name():
    load_all()
    assert Config.registered("sae", "topk") is TopKConfig
    assert Config.registered("sae", "relu") is ReLUConfig
    with pytest.raises(ConfigError, match=r"no sae is called `tokp`. Did you mean `topk`\?"):
        Config.registered("sae", "tokp")


def test_num_latents_takes_precedence_over_the_expansion_factor():
    assert ReLUConfig(expansion_factor=4).width(16) == 64
    assert ReLUConfig(num_latents=5).width(16) == 5
    both = ReLUConfig(num_latents=5, expansion_factor=4)
    assert both.width(16) == 5
    assert both.expansion_factor is None  # so that the same SAE has the same record


def test_a_new_architecture_needs_one_config_and_one_class(tmp_path):
    """A user's package does this; no list of architectures must be edited."""
    from dataclasses import dataclass

    from reseed.sae.checkpoint import load_sae, save_sae

    @dataclass(frozen=True)
    class IdentityConfig(ReLUConfig, name="test_identity"):
        def empty(self, d_in):
            return Identity(self, d_in)

    class Identity(SAE):
        def encode(self, x):
            return x @ self.W_enc.T

        def training_loss(self, x, step, dead):
            raise AssertionError("this test does not train it")

    try:
        sae = IdentityConfig(num_latents=4).build(3, torch.Generator())
        save_sae(sae, tmp_path)
        assert type(load_sae(tmp_path)) is Identity
    finally:
        del Config._registered["sae", "test_identity"]


def test_ratio_or_zero_has_finite_values_and_gradients():
    for top, bottom, expected in ((1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)):
        a = torch.tensor(top, requires_grad=True)
        ratio = ratio_or_zero(a, torch.tensor(bottom))
        ratio.backward()
        assert ratio == expected
        assert a.grad == (1 / bottom if bottom else 0)


def test_a_step_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"`index` \(=10\) must be in \[0, total\) \(total=10\)"):
        Step(10, 10)
