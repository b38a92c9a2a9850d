"""Gaussian surrogates: draws with only the moments of the real activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.source import ActivationSource
from reseed.activations.synthetic.surrogate import (
    Gaussian,
    GaussianSource,
    GaussianStream,
    flops_per_token,
)
from reseed.activations.synthetic.world_source import (
    GeneratedConfig,
    ResolvedWorldData,
    WorldConfig,
    WorldSource,
)
from reseed.activations.synthetic.worlds import World
from reseed.errors import ReseedError

HOOK, OTHER = Hookpoint("resid_post", 0), Hookpoint("mlp_out", 0)
WORLD = WorldConfig(
    d_in=6, num_features=4, firing=(0.3, 0.5, 0.2, 0.4), correlations=((0, 1, 0.5),)
)
DATA = GeneratedConfig(chunk_tokens=8_192)


def real(data: GeneratedConfig = DATA) -> ActivationSource:
    return WorldSource(World(WORLD), data, torch.device("cpu"))


def surrogate(data: GeneratedConfig = DATA) -> GaussianSource:
    return GaussianSource(real(data), data.order_seed)


def close(x: torch.Tensor, reference: torch.Tensor) -> None:
    """Assert that the moments of ``x`` equal those of ``reference`` within 5 standard errors."""
    x, reference = x.double(), reference.double()
    mean, covariance = reference.mean(0), torch.cov(reference.T, correction=0)
    variance = covariance.diagonal()
    assert bool(((x.mean(0) - mean).abs() <= 5 * (variance / len(x)).sqrt() + 1e-6).all())
    # Gaussian draws have Var S_ij = (Σ_ii Σ_jj + Σ_ij²) / n.
    error = ((torch.outer(variance, variance) + covariance**2) / len(x)).sqrt()
    assert bool(((torch.cov(x.T) - covariance).abs() <= 5 * error + 1e-6).all())


def test_the_moments_are_those_of_the_first_training_chunk() -> None:
    first = real().stream([HOOK]).chunk(0)[HOOK].flatten(0, 1)
    drawn = surrogate().stream([HOOK])
    for c in (0, 3):
        x = drawn.chunk(c)[HOOK].flatten(0, 1)
        close(x, first)
        assert len(torch.unique(x[:, 0])) > 8_000  # real activations take few values
    close(torch.cat([x[HOOK] for x in surrogate().held_out([HOOK], 10_000)]), first)


def test_a_gaussian_activation_costs_one_matrix_product_per_distinct_hookpoint() -> None:
    """The product is that with the root of the covariance."""
    data = ResolvedWorldData(WORLD, DATA)
    assert flops_per_token(data, "gaussian", [HOOK], [6]) == 2 * 6 * 6
    assert flops_per_token(data, "gaussian", [HOOK, OTHER, HOOK], [6, 6, 6]) == 2 * (2 * 6 * 6)
    assert flops_per_token(data, "none", [HOOK], [6]) == data.flops_per_token([HOOK])


def test_draws_have_the_dtype_of_the_source() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    drawn = Gaussian.like(x)
    assert drawn.draw(5, torch.Generator().manual_seed(0)).dtype == torch.bfloat16
    assert drawn.mean.dtype == drawn.root.dtype == torch.float32


def test_chunks_are_a_pure_function() -> None:
    forward, backward = surrogate().stream([HOOK]), surrogate().stream([HOOK, OTHER])
    a = [forward.chunk(c)[HOOK].clone() for c in (0, 1)]
    b = [backward.chunk(c)[HOOK].clone() for c in (1, 0)]
    assert torch.equal(a[0], b[1])
    assert torch.equal(a[1], b[0])
    assert not torch.equal(a[0], a[1])
    assert forward.num_batches(64) is None
    # Hookpoints are drawn separately; these two have the same moments.
    assert not torch.equal(backward.chunk(0)[OTHER], backward.chunk(0)[HOOK])


def test_fewer_held_out_draws_are_a_prefix_and_none_are_trained_on() -> None:
    few, many = (
        torch.cat([x[HOOK] for x in surrogate().held_out([HOOK], n)]) for n in (100, 5_000)
    )
    assert len(many) == 5_000
    assert torch.equal(few, many[:100])
    trained = surrogate().stream([HOOK]).chunk(0)[HOOK].flatten(0, 1)
    assert not rows(trained) & rows(many)


def test_the_order_seed_changes_the_draws() -> None:
    gaussians = surrogate().stream([HOOK]).gaussians
    a, b = (
        GaussianStream(replace(DATA, order_seed=seed), gaussians, torch.device("cpu"))
        for seed in (0, 1)
    )
    # Other draws, not only another order.
    assert not rows(a.chunk(0)[HOOK]) & rows(b.chunk(0)[HOOK])


def rows(x: torch.Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, x.reshape(-1, 6).tolist()))


def test_a_surrogate_has_no_features() -> None:
    assert surrogate().world is None
    with pytest.raises(ReseedError, match="only the activations of a world have known features"):
        surrogate().held_out_samples(10)


def test_the_language_model_runs_for_one_chunk_only(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reseed.activations import chunks
    from reseed.cli.hydra_app import CommandLine
    from reseed.cli.plan import check_jobs
    from reseed.study.train import train_missing

    asked: list[tuple[int, int]] = []
    original = chunks.TokenWindow.of
    monkeypatch.setattr(
        chunks.TokenWindow, "of", lambda packing, first, last: asked.append((first, last))
        or original(packing, first, last),
    )  # fmt: skip
    line = [*tiny_overrides, "surrogate=gaussian", f"runtime.outputs={tmp_path}"]
    (job,), runtime = check_jobs(CommandLine("train", []), line, multirun=False)
    assert train_missing([job.resolved], runtime) == {}
    assert asked == [(0, 2048)]
    assert job.resolved.label.startswith("tiny-llama+gaussian-resid_post.1-words")
    assert job.resolved.record()["labels"]["model"] == "tiny-llama+gaussian"
    plain = check_jobs(CommandLine("train", []), tiny_overrides, multirun=False)[0][0].resolved
    assert plain.signature != job.resolved.signature
    assert plain.stream != job.resolved.stream
    assert "surrogate" not in plain.identity
    assert plain.label.startswith("tiny-llama-resid_post.1-words")
