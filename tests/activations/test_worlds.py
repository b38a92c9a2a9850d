"""Worlds against theory: firing rates, correlations, magnitudes and directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from reseed.activations.stream import generator
from reseed.activations.synthetic.settings import declared_firing, parents_of
from reseed.activations.synthetic.world_source import WorldConfig
from reseed.activations.synthetic.worlds import Sample, World
from reseed.errors import ConfigError

TOKENS = 40_000
LIMIT = 4.5
"""Standard errors: a correct program fails a single comparison with probability 7e-6."""


def sampled(tokens: int = TOKENS, **fields: Any) -> tuple[World, Sample]:
    world = World(WorldConfig(**{"d_in": 16, "num_features": 4, **fields}))
    return world, world.sample(tokens, generator(7))


def fired(sample: Sample, features: int) -> np.ndarray:
    """Return a dense mask [tokens, features] of the features that fire."""
    dense = np.zeros((len(sample.x), features), dtype=bool)
    dense[sample.token.numpy(), sample.feature.numpy()] = True
    return dense


def assert_rates(found: np.ndarray, expected: np.ndarray | list[float], tokens: float) -> None:
    """Assert that rates agree within `LIMIT` binomial standard errors."""
    expected = np.asarray(expected)
    error = np.sqrt(expected * (1 - expected) / tokens)
    assert (np.abs(found - expected) <= LIMIT * error + 1e-12).all(), (found, expected)


def test_independent_features_fire_as_declared() -> None:
    p = [0.5, 0.1, 0.01, 0.0, 1.0]
    fire = fired(sampled(num_features=5, firing=p)[1], 5)
    assert_rates(fire.mean(0), p, TOKENS)
    assert not fire[:, 3].any()
    assert fire[:, 4].all()
    assert_rates((fire[:, 0] & fire[:, 1]).mean(), 0.05, TOKENS)


def test_firing_follows_the_zipf_law() -> None:
    config = WorldConfig(d_in=64, num_features=64, zipf_max=0.4, zipf_min=0.1, zipf_exponent=0.5)
    p = declared_firing(config)
    assert p[:4] == pytest.approx([0.4, 0.4 / 2**0.5, 0.4 / 3**0.5, 0.2])
    assert p[15] == pytest.approx(0.1)
    assert (p[16:] == 0.1).all()
    fire = fired(World(config).sample(TOKENS, generator(1)), 64)
    assert_rates(fire.mean(0), p, TOKENS)


def test_a_child_fires_only_with_its_parent() -> None:
    """Three levels; probabilities are conditional, or marginal over all tokens."""
    parents = (None, 0, 1, None)
    fire = fired(sampled(firing=(0.5, 0.4, 0.3, 0.2), parents=parents)[1], 4)
    assert not (fire[:, 1] & ~fire[:, 0]).any()
    assert not (fire[:, 2] & ~fire[:, 1]).any()
    assert_rates(fire.mean(0), [0.5, 0.2, 0.06, 0.2], TOKENS)
    marginal = sampled(firing=(0.5, 0.4, 0.3, 0.2), parents=parents, child_firing="marginal")[1]
    fire = fired(marginal, 4)
    assert not (fire[:, 2] & ~fire[:, 1]).any()
    assert_rates(fire.mean(0), [0.5, 0.4, 0.3, 0.2], TOKENS)


def test_exclusive_siblings_never_fire_together_and_survive_with_equal_odds() -> None:
    """If two siblings would fire with p each, each does with p(1 - p) + p²/2."""
    config = {"firing": (0.8, 0.5, 0.5, 0.9), "parents": (None, 0, 0, None)}
    fire = fired(sampled(**config, mutually_exclusive_children=True)[1], 4)
    assert not (fire[:, 1] & fire[:, 2]).any()
    stays = 0.8 * (0.25 + 0.125)
    assert_rates(fire.mean(0), [0.8, stays, stays, 0.9], TOKENS)
    # Roots are not siblings.
    assert_rates((fire[:, 0] & fire[:, 3]).mean(), 0.72, TOKENS)


def test_three_exclusive_siblings_survive_with_equal_odds() -> None:
    fire = fired(
        sampled(firing=(1.0, 1.0, 1.0, 1.0), parents=(None, 0, 0, 0),
                mutually_exclusive_children=True)[1], 4,
    )  # fmt: skip
    assert (fire.sum(1) == 2).all()
    assert_rates(fire[:, 1:].mean(0), [1 / 3] * 3, TOKENS)


def test_a_generated_forest_is_numbered_level_by_level() -> None:
    """2 roots × 3 children × 2 levels; the remaining features have no parent."""
    config = WorldConfig(
        d_in=32, num_features=30, roots=2, branching=3, depth=2, firing=(0.7,) * 30,
        mutually_exclusive_children=True,
    )  # fmt: skip
    parent = parents_of(config).tolist()
    assert parent[:2] == [-1, -1]
    assert parent[2:8] == [0, 0, 0, 1, 1, 1]
    assert parent[8:26] == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7]
    assert parent[26:] == [-1] * 4
    fire = fired(World(config).sample(5_000, generator(0)), 30)
    for child, above in enumerate(parent):
        assert above == -1 or not (fire[:, child] & ~fire[:, above]).any()
    for above in range(8):
        siblings = [i for i, p in enumerate(parent) if p == above]
        assert fire[:, siblings].sum(1).max() == 1


@pytest.mark.parametrize("rho", [0.6, -0.5])
def test_listed_pairs_fire_together_as_the_copula_predicts(rho: float) -> None:
    p = (0.3, 0.2, 0.25, 0.4)
    fire = fired(sampled(firing=p, correlations=((0, 2, rho), (3, 2, 0.3)))[1], 4)
    assert_rates(fire.mean(0), p, TOKENS)
    for (i, j), r in {(0, 2): rho, (2, 3): 0.3, (0, 1): 0.0, (0, 3): 0.0}.items():
        both = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf(norm.ppf([p[i], p[j]]))
        assert_rates((fire[:, i] & fire[:, j]).mean(), both, TOKENS)


def test_common_factors_correlate_firing_and_preserve_marginals() -> None:
    """Pairs fire together as the correlation of their factors predicts."""
    p = (0.3, 0.2, 0.25, 0.4)
    world, sample = sampled(firing=p, copula_rank=2, copula_scale=1.0)
    fire = fired(sample, 4)
    assert_rates(fire.mean(0), p, TOKENS)
    weights = world._factors.double().numpy()
    correlation = weights @ weights.T
    assert (np.diag(correlation) + world._own.double().numpy() ** 2) == pytest.approx(1, abs=1e-6)
    off = np.abs(correlation - np.diag(np.diag(correlation)))
    assert off.max() > 0.3  # else the test is vacuous
    for i in range(4):
        for j in range(i):
            r = correlation[i, j]
            both = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf(norm.ppf([p[i], p[j]]))
            assert_rates((fire[:, i] & fire[:, j]).mean(), both, TOKENS)


def test_magnitudes_are_normal_and_negative_draws_do_not_fire() -> None:
    value = sampled(firing=(0.5,) * 4, magnitude_mean=2.0, magnitude_std=0.25)[1].value.double()
    error = 0.25 / len(value) ** 0.5
    assert abs(float(value.mean()) - 2) < LIMIT * error
    assert abs(float(value.std()) - 0.25) < LIMIT * error / 2**0.5
    fixed = sampled(firing=(0.5,) * 4, magnitude_mean=2.0)[1].value
    assert (fixed == 2).all()
    sample = sampled(firing=(0.5,) * 4, magnitude_mean=0.5, magnitude_std=0.5)[1]
    assert bool((sample.value > 0).all())
    assert_rates(fired(sample, 4).mean(0), [0.5 * norm.cdf(1)] * 4, TOKENS)


@pytest.mark.parametrize("dictionary", ["orthogonal", "random"])
def test_x_is_the_weighted_sum_of_the_rows_that_fire(dictionary: str) -> None:
    world, sample = sampled(
        500, num_features=12, firing=(0.3,) * 12, magnitude_std=0.5, dictionary=dictionary
    )
    dense = torch.zeros(500, 12, dtype=torch.float64)
    dense[sample.token, sample.feature] = sample.value.double()
    assert int((dense != 0).sum()) == len(sample.token) > 0
    expected = dense @ world.dictionary.double()
    assert torch.allclose(sample.x.double(), expected, atol=1e-5)
    order = sample.token * 12 + sample.feature
    assert bool((order[1:] > order[:-1]).all())
    assert sample.x.dtype == sample.value.dtype == torch.float32
    assert sample.token.dtype == sample.feature.dtype == torch.int64
    assert sample.group_active.shape == (500, 0)
    assert world.groups.shape == (0, 1, 16)


def test_dictionaries_have_orthonormal_or_unit_rows_that_depend_on_the_seed() -> None:
    orthogonal = World(WorldConfig(d_in=16, num_features=12)).dictionary.double()
    assert torch.allclose(orthogonal @ orthogonal.T, torch.eye(12).double(), atol=1e-6)
    assert float(orthogonal.abs().max()) < 0.99  # not the coordinate axes
    random = World(WorldConfig(d_in=16, num_features=40, dictionary="random")).dictionary
    assert torch.allclose(random.norm(dim=1), torch.ones(40), atol=1e-6)
    other = World(WorldConfig(d_in=16, num_features=12, seed=1)).dictionary.double()
    assert float((other - orthogonal).abs().max()) > 0.1


def test_groups_are_isotropic_in_their_subspaces() -> None:
    world, sample = sampled(
        firing=(0.0,) * 4, groups=2, group_rank=3, group_probability=0.2, magnitude_mean=2.0
    )
    basis = world.groups.double()
    eye = torch.eye(3).double().expand(2, 3, 3)
    assert torch.allclose(basis @ basis.mT, eye, atol=1e-6)
    active = sample.group_active
    assert_rates(active.double().mean(0).numpy(), [0.2, 0.2], TOKENS)
    assert float(sample.x[~active.any(1)].abs().max()) == 0
    for g in (0, 1):
        x = sample.x[active[:, g] & ~active[:, 1 - g]].double()
        inside = x @ basis[g].T
        assert torch.allclose(inside @ basis[g], x, atol=1e-5)
        assert torch.allclose(x.norm(dim=1), torch.full((len(x),), 2.0).double(), atol=1e-4)
        # A uniform direction in 3 dimensions has E u uᵀ = I/3, Var u_i² = 4/45, Var u_i u_j = 1/15.
        unit = inside / 2
        found = unit.T @ unit / len(x)
        error = LIMIT * (4 / 45 / len(x)) ** 0.5
        assert torch.allclose(found, torch.eye(3).double() / 3, rtol=0, atol=error)
        assert float(unit.mean(0).abs().max()) < LIMIT * (1 / 3 / len(x)) ** 0.5


def test_a_sample_of_several_blocks_is_a_function_of_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from reseed.activations.synthetic import worlds

    monkeypatch.setattr(worlds, "_BLOCK", 400)  # 100 tokens at once
    config = WorldConfig(d_in=16, num_features=4, firing=(0.3,) * 4, groups=1, group_rank=2,
                         group_probability=0.3)  # fmt: skip
    world = World(config)
    a, b = (world.sample(350, generator(3)) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert len(a.x) == len(a.group_active) == 350
    dense = torch.zeros(350, 4)
    dense[a.token, a.feature] = a.value
    rest = (a.x - dense @ world.dictionary)[~a.group_active[:, 0]]
    assert torch.allclose(rest, torch.zeros_like(rest), atol=1e-6)
    short = a.first(123)
    assert torch.equal(short.x, a.x[:123])
    assert int(short.token.max()) < 123
    assert len(short.token) == int((a.token < 123).sum())
    assert len(world.sample(0, generator(3)).x) == 0


BAD = [
    ({"num_features": 20}, "`num_features` (=20) must not exceed d_in (=16) if the dictionary"),
    ({"firing": (0.1,)}, "`firing` must have one entry for each of num_features (=4); got 1"),
    ({"firing": (0.1, 0.2, 1.5, 0)}, "`firing` must be probabilities, 0 to 1; got 1.5"),
    ({"zipf_min": 0.5}, "`zipf_min` must not exceed zipf_max (=0.4); got 0.5"),
    ({"parents": (None, 2, None, None)},
     "`parents`: a parent must have a smaller index than its child; feature 1 has parent 2"),
    ({"parents": (None,)}, "`parents` must have one entry for each of num_features (=4); got 1"),
    ({"roots": 2, "parents": (None,) * 4}, "`roots` must be 0 if parents are listed; got 2"),
    ({"roots": 2, "branching": 2, "depth": 1},
     "`num_features` (=4) must hold the forest of 6 features (roots=2, branching=2, depth=1)"),
    ({"firing": (0.1, 0.2, 0, 0), "parents": (None, 0, None, None), "child_firing": "marginal"},
     "a child must not fire more often than its parent; feature 1 has 0.2, its parent 0.1"),
    ({"correlations": ((0, 1),)}, "`correlations` must be triples"),
    ({"correlations": ((0, 4, 0.1),)}, "`correlations` must be triples"),
    ({"correlations": ((0, 0, 0.1),)}, "got [0.0, 0.0, 0.1]"),
    ({"correlations": ((0, 1, 0.1), (1, 0, 0.2))}, "must list a pair once; got [0, 1] twice"),
    ({"correlations": ((0, 1, -0.9), (1, 2, -0.9), (0, 2, -0.9))},
     "`correlations` must form a positive definite matrix; its smallest eigenvalue is -0.8"),
    ({"correlations": ((0, 1, 0.1),), "copula_rank": 2},
     "`copula_rank` must be 0 if correlations are listed; got 2"),
    ({"groups": 1, "group_rank": 17}, "`group_rank` (=17) must not exceed d_in (=16)"),
    ({"magnitude_mean": 0.0}, "`magnitude_mean` must be a number, above 0; got 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda v: str(v)[:40])
def test_impossible_worlds_are_refused(fields: dict[str, Any], message: str) -> None:
    good = WorldConfig(d_in=16, num_features=4)
    with pytest.raises(ConfigError) as error:
        replace(good, **fields)
    assert message in str(error.value)


@pytest.mark.slow
def test_the_large_world_fits_in_memory() -> None:
    import resource

    from reseed.activations.synthetic.world_source import ResolvedWorld
    from reseed.cli.hydra_app import CommandLine
    from reseed.cli.plan import check_jobs

    (job,), _ = check_jobs(CommandLine("train", []), ["model=world_hierarchy"], multirun=False)
    assert isinstance(job.resolved.model, ResolvedWorld)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = job.resolved.open().stream([job.resolved.experiment.hook])
    (x,) = stream.chunk(0).values()
    assert x.shape == (8, 8_192, 768)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 2e9
