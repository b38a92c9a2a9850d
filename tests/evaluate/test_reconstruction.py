from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_helpers import assert_declared, constant
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.errors import ConfigError
from reseed.evaluate.base import EvaluationInput, LoadedRun, ModelCache
from reseed.evaluate.reconstruction import (
    Reconstruction,
    ReconstructionConfig,
    density_table,
    measure,
)
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig


def data(tokens: int = 1_000, d_in: int = 12) -> Tensor:
    noise = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0.1, 3, d_in) + 5


def identity(d_in: int):
    """Build an SAE that reconstructs positive activations: a latent for every dimension."""
    sae = ReLUConfig(num_latents=d_in).build(d_in, torch.Generator())
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d_in))
        sae.W_dec.copy_(torch.eye(d_in))
    return sae


def measured(sae, x: Tensor) -> Reconstruction:
    found = Reconstruction(sae)
    found.add(x)
    return found


def test_predicting_the_mean_has_fvu_1_and_the_identity_0() -> None:
    x = data()
    mean = measured(constant(x.double().mean(0).float()), x).metrics()
    assert mean["fvu"] == pytest.approx(1, abs=1e-6)
    assert mean["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert (mean["l0"], mean["silent_fraction"]) == (0, 1)
    x = x.abs()
    exact = measured(identity(12), x).metrics()
    assert exact["fvu"] == 0
    assert exact["l0"] == 12
    assert exact["cosine"] == pytest.approx(1)


def test_the_variance_is_about_the_mean_of_the_evaluation_set_not_of_the_batch() -> None:
    """Two batches with different means: the mean of per-batch fractions would be far above 1."""
    low, high = data() - 5, data() + 95
    x = torch.cat([low, high])
    sae = constant(x.double().mean(0).float())
    whole = measured(sae, x)
    pieces = Reconstruction(sae)
    for part in x.split(7):
        pieces.add(part)
    assert whole.metrics()["fvu"] == pytest.approx(1, abs=1e-6)
    assert pieces.metrics()["fvu"] == pytest.approx(whole.metrics()["fvu"], rel=1e-9)
    variance = ((x.double() - x.double().mean(0)) ** 2).sum()
    error = ((x.double() - 5) ** 2).sum()
    assert measured(constant(torch.full((12,), 5.0)), x).metrics()["fvu"] == pytest.approx(
        float(error / variance), rel=1e-6
    )


def test_firing_counts_equal_a_plain_loop() -> None:
    x = data(300)
    sae = ReLUConfig(num_latents=20).build(12, torch.Generator().manual_seed(1))
    found = measured(sae, x)
    expected = [0] * 20
    with torch.no_grad():
        for token in x:
            for j, value in enumerate(sae.encode(token[None])[0].tolist()):
                expected[j] += value > 0
    assert found.firing.tolist() == expected
    metrics = found.metrics()
    assert metrics["l0"] == pytest.approx(sum(expected) / 300)
    assert metrics["live"] == {str(n): sum(count >= n for count in expected) for n in (1, 10, 100)}


def test_many_saes_are_measured_at_once_each_at_its_hookpoint() -> None:
    a, b = Hookpoint("resid_post", 0), Hookpoint("mlp_out", 1)
    x, y = data(200), data(200, 8)
    saes = {"one": (a, identity(12)), "two": (b, identity(8)), "three": (a, constant(x.mean(0)))}
    pieces = [{a: x[:90], b: y[:90]}, {a: x[90:], b: y[90:]}]
    together = measure(saes, pieces)
    for name, (hook, sae) in saes.items():
        alone = measured(sae, x if hook == a else y)
        assert together[name].tokens == 200
        assert together[name].metrics()["fvu"] == pytest.approx(alone.metrics()["fvu"], rel=1e-9)
        assert together[name].firing.tolist() == alone.firing.tolist()


def test_mean_and_covariance_equal_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reseed.activations.moments._BLOCK", 64)  # several blocks
    a, b = Hookpoint("resid_post", 0), Hookpoint("mlp_out", 1)
    x, y = data(300) + 1000, data(300, 8)
    saes = {"one": (a, identity(12)), "two": (a, constant(x.mean(0))), "three": (b, identity(8))}
    found = measure(saes, [{a: x[:130], b: y[:130]}, {a: x[130:], b: y[130:]}])
    for name, values in (("one", x), ("three", y)):
        moments = found[name].moments
        assert moments is not None
        tensors = moments.so_far().tensors()
        exact = values.double().numpy()
        assert tensors["mean"].numpy() == pytest.approx(exact.mean(0), rel=1e-6)
        # The mean is far from 0; float64 sums stay exact to float32.
        covariance = np.cov(exact.T, bias=True)
        assert tensors["covariance"].numpy() == pytest.approx(covariance, rel=1e-5, abs=1e-6)
    assert found["one"].moments is found["two"].moments, "one object per hookpoint, not per SAE"


def test_metrics_without_activations_are_an_error() -> None:
    with pytest.raises(ValueError, match="no activations were added"):
        Reconstruction(identity(3)).metrics()


def test_activation_sums_equal_those_of_a_dense_pass() -> None:
    x = data(5_000)
    sae = ReLUConfig(num_latents=20).build(12, torch.Generator().manual_seed(0))
    found = Reconstruction(sae)
    for chunk in x.split(1_234):
        found.add(chunk)
    latents = sae(x).latents.double()
    torch.testing.assert_close(found.activation_sum, latents.sum(0), rtol=1e-5, atol=1e-5)
    squares = latents.square().sum(0)
    torch.testing.assert_close(found.activation_square_sum, squares, rtol=1e-5, atol=1e-5)
    assert (squares > 1).any()


def test_shrinkage_bias_and_l1_by_hand() -> None:
    """x = (3, 4) and (0, 2), x̂ = x/2: half as long, the best scale is 2, L1 the sum of latents."""
    sae = identity(2)
    with torch.no_grad():
        sae.W_dec.mul_(0.5)
    found = measured(sae, torch.tensor([[3.0, 4.0], [0.0, 2.0]])).metrics()
    assert found["shrinkage"] == pytest.approx(0.5)
    assert found["relative_bias"] == pytest.approx(0.5)  # ‖x/2‖² / (x/2 · x)
    assert found["l1"] == pytest.approx((3 + 4 + 2) / 2)
    assert found["explained_variance_uncentred"] == pytest.approx(1 - 0.25)
    assert found["dense_fraction"] == 1  # latent 0 on half of the tokens, latent 1 on all


def test_ratios_are_none_for_activations_of_zero() -> None:
    found = measured(constant(torch.zeros(3)), torch.zeros(5, 3)).metrics()
    assert found["shrinkage"] is None
    assert found["relative_bias"] is None
    assert found["explained_variance_uncentred"] is None


def test_the_density_histogram_counts_every_latent_once() -> None:
    density = np.array([0.0, 0.0, 1e-9, 0.1, 0.5, 1.0])
    table = density_table(density)
    assert table["latents"].sum() == len(density)
    assert table["latents"][0] == 2
    assert table["latents"][1] == 1, "below the first edge"
    by_low = dict(zip(table["low"], table["latents"], strict=True))
    assert by_low[-1.0] == 1
    assert by_low[-0.5] == 1
    assert by_low[-0.25] == 1, "density 1 is in the last bin"


def test_the_evaluation_measures_the_given_number_of_tokens() -> None:
    x, hook = data(64), Hookpoint("resid_post", 0)
    source = SimpleNamespace(
        held_out=lambda hooks, tokens: iter([{hook: x[:40]}, {hook: x[40:tokens]}]),
        held_out_available=64,
        device=torch.device("cpu"),
    )
    inputs = EvaluationInput(source, ModelCache(Path("/nowhere")))  # type: ignore[arg-type]
    sae = TopKConfig(num_latents=6, k=2).build(12, torch.Generator().manual_seed(0))
    ((name, result),) = ReconstructionConfig(tokens=50).evaluate(
        [LoadedRun("a", sae, hook)], inputs
    )
    alone = measured(sae, x[:50])
    assert name == "a"
    assert_declared(ReconstructionConfig(), result)
    assert result.metrics["fvu"] == pytest.approx(alone.metrics()["fvu"])
    assert result.metrics["tokens"] == 50
    fired = (sae.encode(x[:50]) != 0).float()
    assert result.latents["density"] == pytest.approx(fired.mean(0).numpy())
    mean = sae.encode(x[:50]).sum(0) / fired.sum(0)
    assert result.latents["mean_activation"] == pytest.approx(mean.detach().numpy(), nan_ok=True)
    with pytest.raises(
        ConfigError, match=r"`tokens` \(=65,536\) must not exceed .* activations: 64"
    ):
        next(ReconstructionConfig().evaluate([LoadedRun("a", sae, hook)], inputs))
