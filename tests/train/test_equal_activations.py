"""Activations that are all equal up to rounding: no number is relative to their variance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.cli import train
from reseed.compare.activations.agreement import CKA, FiringSums, PairSums, agreement, centred_gram
from reseed.compare.activations.batch_codes import BatchCodes
from reseed.compare.dictionary import load_dictionaries
from reseed.errors import ReseedError
from reseed.evaluate.reconstruction import Reconstruction
from reseed.sae import kernels
from reseed.sae.base import SAEConfig, Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.losses import auxk_loss, total_variance, variance_or_nan
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.store.runs import RunStore
from reseed.system.rounding import above_rounding
from reseed.train.config import TrainingConfig
from reseed.train.curve import Curve
from reseed.train.run_state import NotFiniteError, RunState

D = 6
K_SPARSE = (
    TopKConfig(num_latents=24, k=3, multi_topk=True),
    BatchTopKConfig(num_latents=24, k=3),
    MatryoshkaConfig(num_latents=24, k=3, prefixes=(0.5, 1.0)),
)
OTHERS = (
    ReLUConfig(num_latents=24, aux_alpha=0.1),
    GatedConfig(num_latents=24, aux_alpha=0.1),
    JumpReLUConfig(num_latents=24, aux_alpha=0.1),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal_rows(count: int, size: float = 1.0) -> Tensor:
    return (size * random(1, D, seed=3)).expand(count, D).contiguous()


def loss_of(config: SAEConfig, x: Tensor):
    sae = config.build(D, torch.Generator().manual_seed(0))
    return sae.training_loss(x, Step(9, 10), torch.arange(24) < 5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [2, 100, 4096])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_variance_of_equal_rows_is_refused_though_seldom_computed_as_zero(
    compiled: bool, count: int, size: float
) -> None:
    x = equal_rows(count, size)
    with kernels.override_enabled(compiled):
        assert torch.isnan(variance_or_nan(x))
    shifted = x + 1e-4 * size * random(count, D)  # far below the mean, far above rounding
    exact = shifted.double()
    with kernels.override_enabled(compiled):
        found = float(variance_or_nan(shifted))
    assert found == pytest.approx(float((exact - exact.mean(0)).square().sum()), rel=1e-4)


def test_rounding_makes_a_variance_that_is_not_zero() -> None:
    """The reason for the bound: a mean of equal float32 numbers is not that number."""
    sizes = [float(total_variance(equal_rows(n))) for n in (3, 7, 100, 1000, 4096)]
    assert max(sizes) > 0


def test_the_bound_follows_the_precision() -> None:
    assert above_rounding(1e-8, 1.0)
    assert not above_rounding(1e-11, 1.0)
    assert above_rounding(1e-11, 1.0, torch.float64)
    assert not above_rounding(0.0, 0.0)
    assert not above_rounding(float("nan"), 1.0)
    assert above_rounding(np.array([1.0, 0.0]), np.ones(2)).tolist() == [True, False]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", K_SPARSE, ids=lambda c: c.name)
def test_a_loss_relative_to_the_variance_of_equal_rows_is_nan(
    config: SAEConfig, compiled: bool
) -> None:
    with kernels.override_enabled(compiled):
        loss = loss_of(config, equal_rows(100))
    assert torch.isnan(loss.total)
    assert loss.parts["aux"] == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", OTHERS, ids=lambda c: c.name)
def test_a_loss_without_a_variance_stays_finite(config: SAEConfig, compiled: bool) -> None:
    with kernels.override_enabled(compiled):
        loss = loss_of(config, equal_rows(100))
    assert torch.isfinite(loss.total)
    assert loss.parts["auxk"] == 0


def test_auxk_of_an_error_that_is_rounding_is_zero() -> None:
    """The error of an exact reconstruction varies by the rounding of x, which is no residual."""
    sae = TopKConfig(num_latents=24, k=3).build(D, torch.Generator().manual_seed(0))
    x = random(100, D)
    error, dead = 1e-7 * random(100, D, seed=1), torch.arange(24) < 5
    assert auxk_loss(sae, x, error, dead) == 0
    assert auxk_loss(sae, x, 1e4 * error, dead) > 0


def state(config: SAEConfig) -> RunState:
    training = TrainingConfig(tokens=400, batch_size=100)
    made = RunState(
        "m", Hookpoint("resid_post", 3), config, training, D, 0, torch.device("cpu")
    )  # fmt: skip
    made.start(random(400, D))
    return made


@pytest.mark.parametrize("config", K_SPARSE, ids=lambda c: c.name)
def test_a_run_ends_with_the_cause_the_hookpoint_and_the_step(config: SAEConfig) -> None:
    run = state(config)
    for x in (random(100, D, seed=4), equal_rows(100), random(100, D, seed=5)):
        run.train(x, run.optimizer)
    assert run.failed
    with pytest.raises(NotFiniteError) as found:
        run.close_curve_row(0.0)
    assert str(found.value) == (
        "the loss is not finite at step 1: all 100 activations of the batch at resid_post.3 are "
        "equal up to rounding, so the loss has no variance to be relative to"
    )


def test_another_cause_is_not_named_equal_activations() -> None:
    run = state(K_SPARSE[0])
    run.train(random(100, D) * float("inf"), run.optimizer)
    run.train(equal_rows(100), run.optimizer)
    with pytest.raises(NotFiniteError, match=r"the loss is not finite at step 0$"):
        run.close_curve_row(0.0)


def test_a_batch_of_equal_rows_adds_no_variance_to_the_curve() -> None:
    run = state(OTHERS[0])
    x = random(100, D, seed=4)
    for batch in (x, equal_rows(100)):
        run.train(batch, run.optimizer)
    variance = float(run.curve.sums["variance"]) / run.scale**2
    assert variance == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-5)
    assert np.isfinite(run.close_curve_row(0.0)["fvu"])


def test_the_curve_has_no_fvu_where_no_batch_has_a_variance() -> None:
    curve = Curve()
    curve.count(squared_error=torch.tensor(3.0), variance=torch.tensor(0.0))
    assert np.isnan(curve.close(1, 100)["fvu"])


@pytest.mark.parametrize(
    ("factor", "why"),
    [
        (0.0, "all zero, or so small that float32 rounds their squares to 0"),
        (1e-30, "all zero, or so small that float32 rounds their squares to 0"),
        (1e30, "not finite, or so large that float32 cannot hold their squares"),
        (float("nan"), "not finite, or so large that float32 cannot hold their squares"),
    ],
)
def test_activations_that_cannot_be_scaled_are_refused(factor: float, why: str) -> None:
    run = state(K_SPARSE[0])
    with pytest.raises(ReseedError) as found:
        run.start(random(400, D) * factor)
    assert str(found.value) == (f"m: activations at resid_post.3 are {why}; no SAE can be trained")


def test_held_out_activations_that_are_equal_have_no_fvu() -> None:
    sae = TopKConfig(num_latents=24, k=3).build(D, torch.Generator().manual_seed(0))
    for count in (1, 100, 5000):
        found = Reconstruction(sae)
        found.add(equal_rows(count))
        metrics = found.metrics()
        assert np.isnan(metrics["fvu"])
        assert metrics["explained_variance"] is None
        assert metrics["explained_variance_uncentred"] is not None


def test_a_latent_whose_activations_are_equal_has_no_correlation() -> None:
    """0.1 added 100 times in float64 is not 10, so the variance is not computed as 0."""
    varying, constant = random(100, 1, seed=1).abs() + 1, torch.full((100, 1), 0.1)
    dense = torch.cat([varying, constant], dim=1)
    token, latent = dense.nonzero(as_tuple=True)
    codes = BatchCodes(token, latent, dense[token, latent], *dense.shape)
    sums, pairs = FiringSums.empty(2, dense.device), PairSums.empty(torch.tensor([0, 1]))
    sums.add(codes)
    pairs.add(codes, codes)
    found = agreement(sums, sums, pairs)
    assert found.pearson[0] == pytest.approx(1)
    assert np.isnan(found.pearson[1])
    assert found.jaccard.tolist() == [1, 1]


def test_a_representation_of_equal_rows_has_no_cka() -> None:
    found = CKA(2)
    found.add([centred_gram(x) for x in (random(50, D), equal_rows(50))])
    values = found.values()
    assert values[0, 0] == pytest.approx(1)
    assert np.isnan([values[0, 1], values[1, 0], values[1, 1]]).all()


def test_a_world_without_variance_ends_topk_with_the_cause_and_not_relu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two features that always fire with magnitude 1."""
    monkeypatch.chdir(tmp_path)
    world = ["model=world", "model.num_features=2", "model.d_in=8",
             "model.firing=[1,1]", "model.magnitude_std=0", "training=world", "layer=0",
             "sae.num_latents=8", "training.tokens=4096", "training.batch_size=256"]  # fmt: skip
    assert train.main([*world, "sae=topk", "sae.k=2"]) == 1
    said = capsys.readouterr().out
    assert "at step 0: all 256 activations of the batch at resid_post.0 are equal" in said
    assert train.main([*world, "sae=relu"]) == 0
    found = {r.record["experiment"]["sae"]["type"]: r for r in RunStore("outputs").runs()}
    assert {name: run.status for name, run in found.items()} == {
        "topk": "failed", "relu": "finished",
    }  # fmt: skip
    assert found["relu"].metrics["fvu"] is None
    dictionary, _ = load_dictionaries(found["relu"], "0")
    assert np.isnan(dictionary.metrics["fvu"])
