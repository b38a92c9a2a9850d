import dataclasses

import numpy as np
import pytest

from reseed.compare import nulls
from reseed.compare.cell import compare_cell
from reseed.compare.dictionary import unit32
from reseed.compare.matching import match
from reseed.compare.nulls import (
    best_cosine,
    cosine_tail,
    covariance_null,
    covered_by_chance,
    isotropic_null,
    kappa,
)
from reseed.compare.pair import compare_pair


def test_the_matched_null_is_below_the_best_match_and_the_bound():
    # Values from an independent program: best .394, matched .379, bound .465.
    null = isotropic_null(1024, 1024, 64)
    assert null.cosine == pytest.approx(0.379, abs=0.002)
    assert best_cosine(1024, 64) == pytest.approx(0.394, abs=0.001)
    assert null.simulated_latents == 1024
    assert null.shared_fraction == 0


def test_two_random_dictionaries_have_the_cosines_of_the_null(dictionary):
    rng = np.random.default_rng(5)
    a, b = (dictionary(*rng.standard_normal((2, 400, 32)), seed=s) for s in "ab")
    measures, null = compare_pair(a, b).measures, isotropic_null(400, 400, 32)
    for name in ("cosine_encoder", "cosine_decoder"):
        assert measures[name] == pytest.approx(null.cosine, abs=0.01)


@pytest.mark.slow
def test_in_two_dimensions_random_dictionaries_share_as_much_as_the_null(dictionary):
    def measured(seed, name):
        rng = np.random.default_rng(seed)
        a, b = (dictionary(*rng.standard_normal((2, 30, 2)), seed=s) for s in "ab")
        return compare_pair(a, b).value(name)

    null = isotropic_null(30, 30, 2, draws=200)
    shared = np.mean([measured(s, "shared_fraction") for s in range(200)])
    covered = np.mean([measured(s, "coverage") for s in range(200)])
    assert shared == pytest.approx(null.shared_fraction, abs=0.01)
    assert null.shared_fraction > 0.01
    assert covered == pytest.approx(null.coverage, abs=0.01)
    assert null.shared_fraction < null.coverage


def test_the_null_is_deterministic_and_symmetric():
    nulls.isotropic_null.cache_clear()
    first = isotropic_null(40, 30, 8, seed=1)
    nulls.isotropic_null.cache_clear()
    assert isotropic_null(30, 40, 8, seed=1) == first
    assert isotropic_null(30, 40, 8, seed=2) != first


def test_above_the_limit_the_cosine_is_extrapolated_and_the_simulated_size_is_given(monkeypatch):
    whole = isotropic_null(1024, 1024, 64)
    monkeypatch.setattr(nulls, "MAX_SIMULATED_LATENTS", 256)
    nulls.isotropic_null.cache_clear()
    extended = isotropic_null(1024, 1024, 64)
    nulls.isotropic_null.cache_clear()
    assert extended.simulated_latents == 256
    assert extended.cosine == pytest.approx(whole.cosine, abs=0.002)
    assert extended.coverage == whole.coverage


@pytest.mark.parametrize("d_in", [1, 2, 3, 20])
def test_the_probability_of_a_cosine_agrees_with_random_draws(d_in):
    rows = np.random.default_rng(0).standard_normal((200_000, d_in))
    cosines = rows[:, 0] / np.linalg.norm(rows, axis=1)
    for c in (-0.3, 0.0, 0.2, 0.7):
        assert cosine_tail(c, d_in) == pytest.approx((cosines > c).mean(), abs=0.005)


def test_probabilities_agree_with_closed_forms_on_the_circle_and_the_sphere():
    assert cosine_tail(np.cos(np.pi / 6), 2) == pytest.approx(1 / 6)  # an arc of 2·30° of 360°
    assert cosine_tail(0.5, 3) == pytest.approx(0.25)  # Archimedes: uniform in height
    assert covered_by_chance(3, 3, 0.5) == pytest.approx(1 - (1 - 0.25**2) ** 3)
    # The best of one row has mean cosine 0; of two on the sphere: E max of two uniforms = 1/3.
    assert best_cosine(1, 3) == pytest.approx(0, abs=1e-6)
    assert best_cosine(2, 3) == pytest.approx(1 / 3, abs=1e-6)


def test_kappa_is_0_at_the_null_and_1_if_everything_is_shared():
    assert kappa(0.2, 0.2) == 0
    assert kappa(1.0, 0.2) == 1
    assert kappa(0.6, 0.2) == pytest.approx(0.5)
    assert np.isnan(kappa(1.0, 1.0))


@pytest.mark.parametrize(("num_latents", "d_in"), [(512, 64), (512, 256)])
def test_best_and_matched_cosine_of_the_null_agree_with_a_simulation(num_latents, d_in):
    rng = np.random.default_rng(9)
    rows = [[rng.standard_normal((num_latents, d_in)) for _ in range(2)] for _ in range(5)]
    found = [match(*pair).cosines.mean() for pair in rows]
    best = [(unit32(a) @ unit32(b).T).max(axis=1).mean() for a, b in rows]
    null = isotropic_null(num_latents, num_latents, d_in)
    assert null.cosine == pytest.approx(np.mean(found), rel=0.01)
    assert null.best == pytest.approx(np.mean(best), rel=0.01)


def spectra(d_in):
    k = np.arange(1, d_in + 1)
    return {"1/k": np.diag(1.0 / k), "1/sqrt k": np.diag(k**-0.5)}


@pytest.mark.parametrize("name", ["1/k", "1/sqrt k"])
@pytest.mark.parametrize(("num_latents", "d_in"), [(512, 64), (400, 128)])
def test_the_covariance_null_agrees_with_a_simulation(name, num_latents, d_in):
    covariance = spectra(d_in)[name]
    rng = np.random.default_rng(9)
    half = np.sqrt(covariance)
    rows = [[rng.standard_normal((num_latents, d_in)) @ half for _ in range(2)] for _ in range(6)]
    found = np.mean([match(*pair).cosines.mean() for pair in rows])
    best = np.mean([(unit32(a) @ unit32(b).T).max(axis=1).mean() for a, b in rows])
    null = covariance_null(num_latents, num_latents, covariance)
    assert null.cosine == pytest.approx(found, rel=0.01)
    assert null.best == pytest.approx(best, rel=0.01)
    assert null.cosine > isotropic_null(num_latents, num_latents, d_in).cosine + 0.02
    # Rotating the axes changes nothing.
    axes, _ = np.linalg.qr(rng.standard_normal((d_in, d_in)))
    again = covariance_null(num_latents, num_latents, axes @ covariance @ axes.T, draws=1)
    assert again.cosine == pytest.approx(null.cosine, rel=0.015)


def test_the_covariance_null_of_the_identity_is_the_isotropic_null():
    null, other = isotropic_null(600, 400, 64), covariance_null(600, 400, 3 * np.eye(64))
    assert other.cosine == pytest.approx(null.cosine, rel=0.01)
    assert other.best == pytest.approx(null.best, rel=0.01)
    assert other.shared_fraction == null.shared_fraction == 0
    assert other.simulated_latents == null.simulated_latents == 600


@pytest.mark.parametrize("name", ["1/k", pytest.param("1/sqrt k", marks=pytest.mark.slow)])
def test_above_the_limit_the_covariance_null_is_extrapolated(monkeypatch, name):
    covariance = spectra(64)[name]
    whole = covariance_null(768, 768, covariance, draws=4)
    monkeypatch.setattr(nulls, "MAX_SIMULATED_LATENTS", 256)
    nulls._covariance_null.cache_clear()
    carried = [covariance_null(768, 768, covariance, seed=seed) for seed in range(3)]
    nulls._covariance_null.cache_clear()
    assert carried[0].simulated_latents == 256
    assert np.mean([null.cosine for null in carried]) == pytest.approx(whole.cosine, rel=0.01)
    assert np.mean([null.best for null in carried]) == pytest.approx(whole.best, rel=0.01)
    # The smaller problem alone has a different result.
    assert covariance_null(256, 256, covariance).cosine < 0.97 * whole.cosine


@pytest.mark.slow
def test_random_dictionaries_with_a_covariance_share_as_much_as_the_null(dictionary):
    half = np.diag([4.0, 1, 1])

    def measured(seed):
        rng = np.random.default_rng(seed)
        a, b = (dictionary(*(rng.standard_normal((2, 12, 3)) @ half), seed=s) for s in "ab")
        found = compare_pair(a, b, threshold=0.9)
        return found.value("shared_fraction"), found.value("coverage")

    shared, covered = np.mean([measured(seed) for seed in range(400)], axis=0)
    null = covariance_null(12, 12, half**2, threshold=0.9, draws=400)
    assert null.shared_fraction == pytest.approx(shared, abs=0.01)
    assert null.coverage == pytest.approx(covered, abs=0.02)
    assert null.shared_fraction > 2 * isotropic_null(12, 12, 3, 0.9, draws=400).shared_fraction


def test_the_covariance_null_is_deterministic_and_symmetric():
    covariance = spectra(8)["1/k"]
    first = covariance_null(40, 30, covariance, seed=1)
    nulls._covariance_null.cache_clear()
    assert covariance_null(30, 40, covariance, seed=1) == first
    assert covariance_null(30, 40, covariance, seed=2) != first


def test_a_pair_has_the_columns_of_all_three_nulls(partly_shared, settings):
    runs = partly_shared(2, 12)
    cell = compare_cell(runs, partly_shared(2, 4), settings)
    row = cell.pairs.iloc[0]
    covariance = np.asarray(runs[0].covariance)
    drawn = (settings.threshold, settings.null_seed, settings.null_draws)
    null = covariance_null(40, 40, covariance, *drawn)
    assert row["null_covariance_cosine"] == null.cosine
    assert row["null_covariance_mmcs"] == null.best
    assert row["null_covariance_coverage"] == null.coverage
    assert row["kappa_covariance"] == kappa(0.3, null.shared_fraction)
    assert row["kappa_untrained"] == pytest.approx((0.3 - 0.1) / 0.9)
    assert row["null_mmcs"] == pytest.approx(best_cosine(40, 64))
    without = [dataclasses.replace(x, covariance=None) for x in runs]
    row = compare_cell(without, [], settings).pairs.iloc[0]
    assert row.filter(like="covariance").isna().all()
    assert np.isnan(row["kappa_untrained"])
