"""Options of all architectures: initial encoder and target L0; their signatures."""

from dataclasses import replace

import pytest
import torch
from sae_examples import batch_of, perturbed

from reseed.errors import ConfigError
from reseed.sae import base
from reseed.sae.base import SAEConfig, Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

PENALISED = [ReLUConfig, GatedConfig, JumpReLUConfig]
K_SPARSE = [TopKConfig, BatchTopKConfig, MatryoshkaConfig]
EVERY = [*PENALISED, *K_SPARSE]
BASE = {"type", "num_latents", "expansion_factor", "decoder_init_norm", "encoder_init_scale"}
BASE |= {"unit_norm_decoder"}
FIRST = {
    TopKConfig: {"k", "aux_alpha", "k_aux", "multi_topk"},
    BatchTopKConfig: {"k", "aux_alpha", "k_aux", "threshold_rate"},
    MatryoshkaConfig: {
        *("k", "aux_alpha", "k_aux", "threshold_rate", "prefixes", "multipliers"),
    },
    ReLUConfig: {
        *("l1_coefficient", "l1_warmup_fraction", "l1_weighted_by_decoder_norm"),
        "subtract_b_dec",
    },
    GatedConfig: {"l1_coefficient", "l1_warmup_fraction"},
    JumpReLUConfig: {
        *("l0_coefficient", "l0_warmup_fraction", "target_l0", "threshold_init", "bandwidth"),
        "subtract_b_dec",
    },
}
"""Fields in the first version of the signature."""


@pytest.mark.parametrize("cls", EVERY)
def test_options_added_later_do_not_change_the_signature(cls):
    assert set(cls(num_latents=64).signed()) - {"version"} == BASE | FIRST[cls]


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize("options", [{"encoder_init": "untied"}, {"aux_alpha": 0.5}, {"k_aux": 7}])
def test_options_that_are_set_enter_the_signature(cls, options):
    assert cls(num_latents=64, **options).signed().items() >= options.items()


# Initial weights


@pytest.mark.parametrize("encoder_init", ["tied", "untied"])
@pytest.mark.parametrize("cls", EVERY)
def test_seeds_reach_the_initial_weights_of_every_architecture(cls, encoder_init):
    """In a public library they do not."""

    def build(seed):
        config = cls(num_latents=64, encoder_init=encoder_init)
        return config.build(9, torch.Generator().manual_seed(seed)).state_dict()

    torch.manual_seed(5)
    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    for name in ("W_enc", "W_dec"):
        assert (first[name] - other[name]).norm(dim=1).min() > 0


@pytest.mark.parametrize("cls", EVERY)
def test_an_untied_encoder_starts_in_directions_of_its_own(cls):
    def build(**options):
        config = cls(num_latents=64, encoder_init_scale=0.3, **options)
        return config.build(9, torch.Generator().manual_seed(0))

    tied, untied = build(), build(encoder_init="untied")
    assert torch.equal(untied.W_dec, tied.W_dec)
    assert torch.equal(tied.W_enc, tied.W_dec * 0.3)
    norm = 0.3 * untied.config.decoder_init_norm
    torch.testing.assert_close(untied.W_enc.norm(dim=1), torch.full((64,), norm))
    # The encoder is drawn after the decoder, from the same generator.
    generator = torch.Generator().manual_seed(0)
    torch.randn(64, 9, generator=generator)
    drawn = torch.randn(64, 9, generator=generator)
    torch.testing.assert_close(
        untied.W_enc.detach() / norm, torch.nn.functional.normalize(drawn, dim=1)
    )
    assert torch.equal(build(encoder_init="untied").W_enc, untied.W_enc)


def test_an_unknown_encoder_init_is_refused():
    with pytest.raises(ConfigError, match="`encoder_init` must be one of tied, untied; got 'tyed'"):
        TopKConfig(num_latents=64, encoder_init="tyed")


# Target L0


@pytest.mark.parametrize("cls", K_SPARSE)
def test_target_l0_sets_k(cls):
    config = cls(num_latents=64, k=5, target_l0=12)
    assert (config.k, config.target_l0, config.sparsity) == (12, None, "k=12")
    assert not config.needs_calibration
    assert config.penalty_field is None
    # Either name gives the same run and record.
    assert config == cls(num_latents=64, k=12)
    assert config.signed() == cls(num_latents=64, k=12).signed()
    assert "target_l0" not in config.signed()
    assert replace(config, k=7).k == 7
    assert repr(config.signed()["k"]) == "12"
    assert SAEConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"`target_l0` \(=65\) must not exceed `num_latents` \(="):
        cls(num_latents=64, target_l0=65)
    with pytest.raises(ConfigError, match=r"`k` \(=65\) must not exceed `num_latents` \(=64\)"):
        cls(expansion_factor=8, target_l0=65).check_d_in(d_in=8)
    with pytest.raises(ValueError, match=f"sae={cls.name} has no penalty to weigh"):
        config.calibrated(1.0)


def test_only_topk_refuses_a_fractional_target():
    assert BatchTopKConfig(num_latents=64, target_l0=1.8).k == 1.8
    with pytest.raises(
        ConfigError, match=r"`target_l0` sets `k` in sae=topk and must be a whole number; got 1\.8"
    ):
        TopKConfig(num_latents=64, target_l0=1.8)


@pytest.mark.parametrize(
    ("cls", "options", "field"),
    [
        (ReLUConfig, {}, "l1_coefficient"),
        (GatedConfig, {}, "l1_coefficient"),
        (JumpReLUConfig, {}, "l0_coefficient"),
        (JumpReLUConfig, {"penalty": "tanh"}, "l0_coefficient"),
    ],
)
def test_a_target_requires_calibration_of_the_penalty_weight(cls, options, field):
    plain = cls(num_latents=64, **{field: 0.25}, **options)
    assert (plain.needs_calibration, plain.sparsity) == (False, "λ=0.25")
    config = cls(num_latents=64, target_l0=32, **options)
    assert (config.needs_calibration, config.sparsity) == (True, "L0*=32")
    assert config.penalty_field == field
    found = config.calibrated(0.125)
    assert type(found) is cls
    assert (getattr(found, field), found.target_l0) == (0.125, 32)
    assert found.to_dict() == config.to_dict() | {field: 0.125}
    with pytest.raises(ConfigError, match=f"`{field}` must be a number, at least 0; got -1"):
        config.calibrated(-1)
    with pytest.raises(ConfigError, match="`target_l0` must be a number or null, above 0; got 0"):
        cls(num_latents=64, target_l0=0)


def test_the_quadratic_penalty_has_its_target_and_needs_no_calibration():
    config = JumpReLUConfig(num_latents=64, penalty="quadratic", target_l0=32)
    assert (config.needs_calibration, config.sparsity) == (False, "L0*=32")


def test_an_unused_target_is_refused():
    class Other(SAEConfig, name=""):
        sparsity = ""
        published_lr = empty = None

    with pytest.raises(ConfigError, match=r"`target_l0` must be null: sae=.* does not use it"):
        Other(num_latents=64, target_l0=3)


@pytest.mark.parametrize("cls", PENALISED)
def test_the_penalty_weight_can_change_between_steps(cls):
    """The total is linear in the weight, which is neither a parameter nor state."""
    config = cls(num_latents=24)
    sae = config.build(6, torch.Generator().manual_seed(0)).double()
    assert type(sae.penalty_weight) is float
    assert sae.penalty_weight == getattr(config, config.penalty_field)
    assert "penalty_weight" not in sae.state_dict()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).double()
    dead = torch.zeros(24, dtype=torch.bool)

    def total(weight, step):
        sae.penalty_weight = weight
        return sae.training_loss(x, step, dead).total

    for step, warm in ((Step(99, 100), 1.0), (Step(1, 100), 0.2), (Step(0, 100), 0.0)):
        free = total(0.0, step)
        name = "penalty" if cls is JumpReLUConfig else "l1"
        penalty = sae.training_loss(x, step, dead).parts[name]
        assert penalty > 0
        torch.testing.assert_close(total(3.0, step) - free, 3.0 * warm * penalty)
    assert sae.config == config


# Sparse latents


@pytest.mark.parametrize("cls", EVERY)
@torch.no_grad()
def test_sparse_latents_equal_the_dense_ones(cls, monkeypatch):
    sae = perturbed(cls(num_latents=24, **({"k": 3} if cls in K_SPARSE else {})), d_in=6)
    x = batch_of(40, d_in=6)
    x[3] = -100 * sae.W_enc[0]
    dense = sae.encode(x)
    assert 0 < (dense != 0).double().mean() < 1
    monkeypatch.setattr(base, "DENSE_BYTES", 4 * 24 * 7)  # several blocks
    found = sae.encode_sparse(x)
    assert torch.allclose(found.dense(), dense)
    values, tokens, latents = found.active()
    assert (values != 0).all()
    assert torch.equal(latents * len(x) + tokens, (dense.t() != 0).flatten().nonzero()[:, 0])
    assert torch.allclose(dense[tokens, latents], values)
