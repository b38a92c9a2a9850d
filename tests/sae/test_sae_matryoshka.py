"""Matryoshka BatchTopK against a dense formulation, and against plain BatchTopK."""

import pytest
import torch
from sae_examples import largest_of_batch, none_dead, perturbed
from sae_examples import uneven_batch_of as batch_of

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.matryoshka import MatryoshkaConfig

STEP = Step(0, 10)
THREE = {"prefixes": (0.25, 0.5, 1.0)}


def make(num_latents=24, k=3, d_in=6, seed=0, dtype=torch.float64, **options):
    config = MatryoshkaConfig(num_latents=num_latents, k=k, **{**THREE, **options})
    return perturbed(config, d_in, seed, dtype)


def dense_levels(sae, x, sizes):
    """Return the FVU of every prefix, by slicing."""
    latents, variance = largest_of_batch(sae, x), (x - x.mean(0)).square().sum()
    return [
        (x - latents[:, :m] @ sae.W_dec[:m] - sae.b_dec).square().sum() / variance for m in sizes
    ]


def agree(sae, ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for (name, p), b in zip(
        sae.named_parameters(), torch.autograd.grad(theirs, list(sae.parameters())), strict=True
    ):
        (a,) = torch.autograd.grad(ours, p, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("beta", [None, (0.5, 0.75, 1.0), (0.0, 2.0, 1.0)])
@pytest.mark.parametrize("k", [1, 3, 24])
def test_loss_and_gradients_are_those_of_the_dense_formulation(beta, k):
    sae, x = make(k=k, multipliers=beta), batch_of()
    loss = sae.training_loss(x, STEP, none_dead(sae))
    levels = dense_levels(sae, x, (6, 12, 24))
    agree(sae, loss.total, sum(b * f for b, f in zip(beta or (1, 1, 1), levels, strict=True)))
    parts = [loss.parts[name] for name in ("fvu_6", "fvu_12", "fvu")]
    torch.testing.assert_close(torch.stack(parts), torch.stack(levels).detach())


def test_levels_are_summed_and_not_averaged():
    """In a public library the loss is averaged twice over the levels."""
    sae, x = make(), batch_of()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.initialise_b_dec(x.mean(0))
    assert sae.training_loss(x, STEP, none_dead(sae)).total.item() == pytest.approx(3)


@pytest.mark.parametrize("num_dead", [0, 5])
def test_without_inner_multipliers_it_is_batch_topk(num_dead):
    sae, x = make(multipliers=(0.0, 0.0, 1.0)), batch_of()
    plain = BatchTopKConfig(num_latents=24, k=3).empty(6).double()
    plain.load_state_dict(sae.state_dict())
    dead = none_dead(sae)
    dead[:num_dead] = True
    ours, theirs = (s.training_loss(x, STEP, dead) for s in (sae, plain))
    torch.testing.assert_close(ours.total, theirs.total)
    torch.testing.assert_close(ours.squared_error, theirs.squared_error)
    assert torch.equal(ours.fired, theirs.fired)
    assert torch.equal(sae.threshold, plain.threshold)
    for a, b in zip(
        torch.autograd.grad(ours.total, list(sae.parameters())),
        torch.autograd.grad(theirs.total, list(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.equal(sae.encode(x), plain.encode(x))


def test_latents_are_chosen_once_over_all_prefixes():
    sae, x = make(num_latents=64, k=5), batch_of(100)
    loss = sae.training_loss(x, STEP, none_dead(sae))
    assert loss.fired.sum() <= 500
    assert torch.equal(loss.fired, (largest_of_batch(sae, x) > 0).sum(0))


def test_the_threshold_is_folded_saved_and_loaded(tmp_path):
    sae, x, scale = make(), batch_of() * 40, 0.037
    sae.training_loss(x * scale, STEP, none_dead(sae))
    trained, raw = sae(x * scale), sae.folded(scale)(x)
    torch.testing.assert_close(raw.latents, trained.latents / scale)
    torch.testing.assert_close(raw.reconstruction, trained.reconstruction / scale)
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.config == sae.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in sae.state_dict().items())
    assert torch.equal(loaded(x).latents, sae(x).latents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefixes": (0.5, 0.25, 1.0)}, r"`prefixes` must ascend .*; got \[0.5, 0.25, 1.0\]"),
        ({"prefixes": (0.25, 0.5)}, "`prefixes` must ascend from above 0 to 1"),
        ({"prefixes": ()}, r"`prefixes` must ascend from above 0 to 1; got \[\]"),
        ({"prefixes": (0.0, 1.0)}, "`prefixes` must ascend from above 0 to 1"),
        ({"prefixes": (0.01, 1.0)}, r"`prefixes` .* with 8 latents their sizes are \[0, 8\]"),
        ({**THREE, "multipliers": (1.0,)}, r"`multipliers` must have .* `prefixes` \(=3\); got 1"),
        ({**THREE, "multipliers": (1.0, -1.0, 1.0)}, "`multipliers` must be at least 0"),
        ({**THREE, "multipliers": (1.0, 1.0, 0.0)}, "and the last one above 0"),
        ({**THREE, "k": 9}, r"`k` \(=9\) must not exceed `num_latents` \(=8\)"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MatryoshkaConfig(num_latents=8, **{"k": 2, **options})


def test_prefixes_are_checked_once_the_activations_give_the_width():
    config = MatryoshkaConfig(expansion_factor=1, k=1, prefixes=(0.1, 1.0))
    config.check_d_in(10)
    with pytest.raises(ConfigError, match=r"with 4 latents their sizes are \[0, 4\]"):
        config.check_d_in(4)
