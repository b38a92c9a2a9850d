"""Laws of the learning rate, rules between options, signatures that stand."""

import pytest

from reseed.config import ConfigError, digest
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.train.config import TrainingConfig
from reseed.train.member import make_optimizer

TOPK, RELU = TopKConfig(num_latents=2**12), ReLUConfig(num_latents=2**12)


def rate(sae=TOPK, **options):
    return TrainingConfig(**options).peak_lr(sae, 2**12)


def test_learning_rate_laws_by_hand():
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
        peak = training.peak_lr(sae.config, 2**6)
        optimizer.set_lr(peak / 4)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["W_enc"] == rates["W_dec"] == peak / 4
        assert rates["b_enc"] == rates["b_dec"] == pytest.approx(adam / 4)


def test_a_schedule_free_run_does_not_decay():
    with pytest.raises(ConfigError, match="`decay_fraction` must be 0 with `optimizer=sign_sgd`"):
        TrainingConfig(optimizer="sign_sgd")
    TrainingConfig(optimizer="sign_sgd", decay_fraction=0.0)


def test_what_was_trained_before_these_options_keeps_its_signature():
    """At their neutral values they are no part of it."""
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
            "`momentum` is for training.optimizer=sign_sgd and muon alone; got 0.5",
        ),
        ({"start_noise": 0.2}, "`start_noise` is for training.start=truth alone; got 0.2"),
        ({"archetypes": 16}, "`archetypes` is for training.decoder=archetypal alone; got 16"),
        ({"archetype_seed": "own"}, "`archetype_seed` is for training.decoder=archetypal alone"),
        (
            {"archetype_relaxation": 0.0},
            "`archetype_relaxation` is for training.decoder=archetypal",
        ),
    ],
)
def test_options_that_nothing_heeds_are_refused(options, message):
    """They would move the start, which is salted with the cell, and so seem to do something."""
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**options)
    assert message in str(caught.value)


def test_options_are_taken_where_they_are_heeded():
    TrainingConfig(optimizer="muon", momentum=0.5)
    TrainingConfig(start="truth", start_noise=0.2)
    TrainingConfig(decoder="archetypal", archetypes=16, archetype_seed="own")
