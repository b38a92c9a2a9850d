"""Matching of encoder rows in the metric of the data: correlations of pre-activations."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import linalg, optimize

from reseed.compare.cell import compare_cell
from reseed.compare.dictionary import root
from reseed.compare.pair import compare_pair

FRACTIONS = ("shared_fraction_correlation", "shared_fraction_correlation_live")


def covariance_of(rng, d, low=1e-3):
    """Make a dense covariance with eigenvalues from ``low`` to 10."""
    axes, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return (axes * np.geomspace(low, 10, d)) @ axes.T


def pair_of(dictionary, covariance_a, covariance_b=None, n=40, m=35, d=12):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2, n, d))
    noise = rng.uniform(0, 1.5, (1, m, 1)) * rng.standard_normal((2, m, d))
    covariance_b = covariance_a if covariance_b is None else covariance_b
    a = dictionary(*rows, seed="a", firing=rng.integers(0, 30, n), covariance=covariance_a)
    others = (rows[:, :m] + noise)[:, rng.permutation(m)]
    firing = rng.integers(0, 30, m)
    return a, dictionary(*others, seed="b", firing=firing, covariance=covariance_b)


def oracle(a, b, covariance, threshold=0.7):
    """Apply the strict rule with dense matrices, the symmetric root and scipy's solver."""
    half = linalg.sqrtm(covariance).real

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    tables = (
        unit(a.encoder.astype(float) @ half) @ unit(b.encoder.astype(float) @ half).T,
        unit(a.decoder.astype(float)) @ unit(b.decoder.astype(float)).T,
    )
    partners = [dict(zip(*optimize.linear_sum_assignment(-s), strict=True)) for s in tables]
    shared = [
        (i, j)
        for i, j in partners[0].items()
        if partners[1].get(i) == j and tables[0][i, j] >= threshold and tables[1][i, j] >= threshold
    ]
    cosine = np.mean([tables[0][i, j] for i, j in partners[0].items()])
    return shared, cosine


def test_correlation_measures_agree_with_a_dense_oracle(dictionary):
    covariance = covariance_of(np.random.default_rng(0), 12)
    a, b = pair_of(dictionary, covariance)
    shared, cosine = oracle(a, b, covariance)
    live_a, live_b = a.live(10), b.live(10)
    both = sum(live_a[i] and live_b[j] for i, j in shared)
    measures = compare_pair(a, b).measures
    assert 3 < both < len(shared) != measures["shared_latents"], "the measures must differ here"
    assert measures["shared_fraction_correlation"] == pytest.approx(2 * len(shared) / 75)
    wanted = 2 * both / (live_a.sum() + live_b.sum())
    assert measures["shared_fraction_correlation_live"] == pytest.approx(wanted)
    assert measures["cosine_correlation"] == pytest.approx(cosine, abs=1e-6)


def test_two_covariances_are_averaged(dictionary):
    rng = np.random.default_rng(5)
    one, two = (covariance_of(rng, 12) for _ in range(2))
    a, b = pair_of(dictionary, one, two)
    shared, cosine = oracle(a, b, (one + two) / 2)
    for x, y in ((a, b), (b, a)):
        measures = compare_pair(x, y).measures
        assert measures["shared_fraction_correlation"] == pytest.approx(2 * len(shared) / 75)
        assert measures["cosine_correlation"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-12])
def test_with_an_isotropic_covariance_the_result_is_the_strict_rule(dictionary, scale):
    measures = compare_pair(*pair_of(dictionary, scale * np.eye(12))).measures
    assert measures["shared_latents"] > 3
    assert measures["shared_fraction_correlation"] == measures["shared_fraction"]
    assert measures["shared_fraction_correlation_live"] == measures["shared_fraction_live"]
    assert measures["cosine_correlation"] == pytest.approx(measures["cosine_encoder"])


def test_directions_without_variance_hardly_count(dictionary):
    """Along a direction of almost no variance the encoders keep their initial components."""
    rng = np.random.default_rng(0)
    covariance = np.diag([1.0] * 15 + [1e-8])
    rows = rng.standard_normal((2, 30, 16))
    rows[:, :, -1] = 0
    drifted = rows.copy()
    drifted[0, :, -1] = 20 * rng.standard_normal(30)
    a, b = (dictionary(*x, seed=s, covariance=covariance) for s, x in (("a", rows), ("b", drifted)))
    measures = compare_pair(a, b).measures
    assert measures["shared_fraction"] < 0.3
    assert measures["shared_fraction_correlation"] == 1
    assert measures["cosine_correlation"] == pytest.approx(1, abs=1e-5)


def test_a_permuted_copy_shares_everything_by_correlation(dictionary):
    rng = np.random.default_rng(2)
    covariance = covariance_of(rng, 12)
    a, _ = pair_of(dictionary, covariance)
    order = rng.permutation(40)
    copy = dictionary(a.encoder[order], a.decoder[order], seed="b", firing=a.firing[order],
                      covariance=covariance)  # fmt: skip
    measures = compare_pair(a, copy).measures
    assert [measures[name] for name in (*FRACTIONS, "cosine_correlation")] == pytest.approx([1] * 3)


@pytest.mark.parametrize("broken", [0.0, np.nan])
def test_latents_without_direction_are_not_matched(dictionary, broken):
    a, b = pair_of(dictionary, covariance_of(np.random.default_rng(0), 12))
    decoder = a.decoder.copy()
    decoder[:] = broken
    measures = compare_pair(replace(a, decoder=decoder), b).measures
    assert measures["shared_fraction_correlation"] == 0
    assert np.isnan(measures["cosine_correlation"])


def test_correlation_measures_are_nan_without_a_covariance(dictionary, partly_shared, settings):
    a, b = pair_of(dictionary, np.eye(12))
    for x, y in ((replace(a, covariance=None), b), (a, replace(b, covariance=None))):
        measures = compare_pair(x, y).measures
        assert np.isnan([measures[name] for name in (*FRACTIONS, "cosine_correlation")]).all()
        assert measures["shared_fraction"] > 0
    runs = [replace(x, covariance=None) for x in partly_shared(3, 12)]
    cell = compare_cell(runs, [], settings)
    estimate = cell.estimates["shared_fraction_correlation"]
    assert np.isnan(estimate.mean)
    assert estimate.reason == "undefined in at least one pair"


def test_the_correlation_fraction_has_an_interval_over_seeds(partly_shared, settings):
    rng = np.random.default_rng(0)
    runs = [replace(x, encoder=x.encoder + 0.65 * rng.standard_normal(x.encoder.shape),
                    covariance=np.eye(64)) for x in partly_shared(3, 12)]  # fmt: skip
    cell = compare_cell(runs, [], settings)
    found = cell.estimates["shared_fraction_correlation"]
    assert found == cell.estimates["shared_fraction"]
    assert found.low is not None


def test_root_of_a_singular_covariance():
    rows = np.random.default_rng(0).standard_normal((5, 9))
    covariance = rows.T @ rows
    found = root(covariance.astype(np.float32))
    assert np.isfinite(found).all()
    assert np.allclose(found @ found.T, covariance, atol=1e-5)


def test_a_covariance_of_another_size_is_refused(dictionary):
    message = "run-0: `covariance` must have shape [d_in, d_in] [3, 3]; got [4, 4]"
    with pytest.raises(ValueError, match=re.escape(message)):
        dictionary(np.ones((5, 3)), covariance=np.eye(4))
