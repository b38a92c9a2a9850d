"""Learning rates, rules between training options, and stable signatures."""

import dataclasses

import pytest

from reseed.config import digest
from reseed.errors import ConfigError
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.train.config import (
    VARIANTS,
    Adam,
    ArchetypalDecoder,
    FreeDecoder,
    Muon,
    RandomStart,
    SignSGD,
    TrainingConfig,
    TruthStart,
)
from reseed.train.optim import make_optimizer, peak_lr

TOPK, RELU = TopKConfig(num_latents=2**12), ReLUConfig(num_latents=2**12)


def rate(sae=TOPK, **options):
    return peak_lr(TrainingConfig(**options), sae, 2**12)


def test_learning_rates_equal_hand_computed_cases():
    """At F = 2¹², √(F / 2¹⁴) is ½."""
    assert rate() == pytest.approx(4e-4)
    assert rate(RELU) == pytest.approx(5e-5)
    assert rate(RELU, lr_law="width") == pytest.approx(4e-4)
    sign = {"optimizer": "sign_sgd", "decay_fraction": 0.0}
    assert rate(**sign) == rate(RELU, **sign) == pytest.approx(1e-2)
    assert rate(**sign, lr_scale=3.0) == pytest.approx(3e-2)
    assert rate(optimizer="muon") == rate(RELU, optimizer="muon") == pytest.approx(2e-3)
    assert rate(optimizer="muon", lr=0.5) == 0.5


def test_muons_biases_follow_adams_law_and_the_schedule_of_the_matrices():
    sae = TopKConfig(num_latents=2**6, k=2).empty(4)
    adam = 2e-4 / (2**6 / 2**14) ** 0.5
    for options in ({}, {"lr": 0.5}):
        training = TrainingConfig(optimizer="muon", **options)
        optimizer = make_optimizer(sae, training)
        peak = peak_lr(training, sae.config, 2**6)
        optimizer.set_lr(peak / 4)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["W_enc"] == rates["W_dec"] == peak / 4
        assert rates["b_enc"] == rates["b_dec"] == pytest.approx(adam / 4)


def test_a_schedule_free_optimiser_refuses_a_decay():
    with pytest.raises(ConfigError, match="`decay_fraction` must be 0 with `optimizer=sign_sgd`"):
        TrainingConfig(optimizer="sign_sgd")
    TrainingConfig(optimizer="sign_sgd", decay_fraction=0.0)


def test_runs_from_before_these_options_keep_their_signature():
    """At their neutral values these options do not enter the signature."""
    signed = TrainingConfig().signed()
    new = {
        "optimizer": "muon", "momentum": 0.9, "aligned": True, "decoder": "archetypal",
        "archetypes": 8, "archetype_seed": "own", "archetype_relaxation": 0.5,
    }  # fmt: skip
    assert not set(new) & set(signed)
    assert TrainingConfig(archetypes=None, momentum=0.95).signed() == signed
    digests = {digest(signed)}
    needed = {"momentum": {"optimizer": "muon"}} | {
        name: {"decoder": "archetypal"} for name in new if name.startswith("archetype")
    }
    for name, value in new.items():
        digests.add(digest(TrainingConfig(**needed.get(name, {}), **{name: value}).signed()))
    assert len(digests) == 1 + len(new)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"momentum": 0.5},
            "`momentum` needs training.optimizer=sign_sgd or muon; got 0.5",
        ),
        ({"start_noise": 0.2}, "`start_noise` needs training.start=truth; got 0.2"),
        ({"archetypes": 16}, "`archetypes` needs training.decoder=archetypal; got 16"),
        ({"archetype_seed": "own"}, "`archetype_seed` needs training.decoder=archetypal; got"),
        (
            {"archetype_relaxation": 0.0},
            "`archetype_relaxation` needs training.decoder=archetypal; got 0.0",
        ),
    ],
)
def test_options_without_a_use_are_refused(options, message):
    """They would change the initial weights, which are salted with the cell, and so seem to have an
    effect."""
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**options)
    assert message in str(caught.value)


def test_options_are_accepted_where_they_have_a_use():
    TrainingConfig(optimizer="muon", momentum=0.5)
    TrainingConfig(start="truth", start_noise=0.2)
    TrainingConfig(decoder="archetypal", archetypes=16, archetype_seed="own")


def test_the_chosen_variants_have_only_the_options_that_they_heed() -> None:
    plain = TrainingConfig(beta1=0.5)
    assert plain.optimizer_options == Adam(0.5, 0.999, 1e-8)
    assert (plain.decoder_options, plain.start_options) == (FreeDecoder(), RandomStart())
    muon = TrainingConfig(optimizer="muon", momentum=0.8)
    assert muon.optimizer_options == Muon(0.8, Adam(0.9, 0.999, 1e-8))
    signs = TrainingConfig(optimizer="sign_sgd", momentum=0.7, decay_fraction=0.0)
    assert signs.optimizer_options == SignSGD(0.7)
    mixed = TrainingConfig(decoder="archetypal", archetypes=16, archetype_seed="own")
    assert mixed.decoder_options == ArchetypalDecoder(16, own_seed=True, relaxation=1.0)
    assert mixed.decoder_options.count(64) == 16
    assert ArchetypalDecoder(None, False, 0.0).count(64) == 64
    true = TrainingConfig(start="truth", start_noise=0.3)
    assert true.start_options == TruthStart(0.3)
    assert not true.start_is_drawn


def test_every_key_of_a_variant_is_a_flat_option_that_is_neutral_by_default() -> None:
    """Otherwise a new variant would change the signatures of runs that do not choose it."""
    fields = {f.name: f for f in dataclasses.fields(TrainingConfig)}
    keys = [key for each in VARIANTS.values() for variant in each.values() for key in variant.keys]
    assert len(keys) == 6
    for key in keys:
        assert fields[key].metadata["neutral"] == fields[key].default
