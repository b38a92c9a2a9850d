import numpy as np
import pytest

from reseed.compare import nulls
from reseed.compare.nulls import above, best_cosine, covered_by_chance, isotropic_null, kappa
from reseed.compare.stability import compare_pair


def test_the_matched_null_is_below_the_best_match_and_the_bound():
    # Values of the methods page, from another program: best .394, matched .379, bound .465.
    null = isotropic_null(1024, 1024, 64)
    assert null.cosine == pytest.approx(0.379, abs=0.002)
    assert best_cosine(1024, 64) == pytest.approx(0.394, abs=0.001)
    assert null.simulated_latents == 1024
    assert null.shared_fraction == 0


def test_two_random_dictionaries_measure_the_null(dictionary):
    rng = np.random.default_rng(5)
    a, b = (dictionary(*rng.standard_normal((2, 400, 32)), seed=s) for s in "ab")
    measures, null = compare_pair(a, b).measures, isotropic_null(400, 400, 32)
    for name in ("cosine_encoder", "cosine_decoder"):
        assert measures[name] == pytest.approx(null.cosine, abs=0.01)


def test_in_few_dimensions_random_dictionaries_do_share(dictionary):
    def measured(seed, name):
        rng = np.random.default_rng(seed)
        a, b = (dictionary(*rng.standard_normal((2, 30, 2)), seed=s) for s in "ab")
        return compare_pair(a, b).measures[name]

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


def test_above_the_limit_the_cosine_is_extended_and_the_row_says_so(monkeypatch):
    whole = isotropic_null(1024, 1024, 64)
    monkeypatch.setattr(nulls, "MAX_SIMULATED_LATENTS", 256)
    nulls.isotropic_null.cache_clear()
    extended = isotropic_null(1024, 1024, 64)
    nulls.isotropic_null.cache_clear()
    assert extended.simulated_latents == 256
    assert extended.cosine == pytest.approx(whole.cosine, abs=0.002)
    assert extended.coverage == whole.coverage


@pytest.mark.parametrize("d_in", [1, 2, 3, 20])
def test_probability_of_a_cosine_by_drawing(d_in):
    rows = np.random.default_rng(0).standard_normal((200_000, d_in))
    cosines = rows[:, 0] / np.linalg.norm(rows, axis=1)
    for c in (-0.3, 0.0, 0.2, 0.7):
        assert above(c, d_in) == pytest.approx((cosines > c).mean(), abs=0.005)


def test_on_the_circle_and_the_sphere_the_probabilities_are_known():
    assert above(np.cos(np.pi / 6), 2) == pytest.approx(1 / 6)  # an arc of 2·30° of 360°
    assert above(0.5, 3) == pytest.approx(0.25)  # Archimedes: uniform in height
    assert covered_by_chance(3, 3, 0.5) == pytest.approx(1 - (1 - 0.25**2) ** 3)
    # The best of one row has mean cosine 0; of two on the sphere: E max of two uniforms = 1/3.
    assert best_cosine(1, 3) == pytest.approx(0, abs=1e-6)
    assert best_cosine(2, 3) == pytest.approx(1 / 3, abs=1e-6)


def test_kappa_is_zero_at_the_null_and_one_at_the_top():
    assert kappa(0.2, 0.2) == 0
    assert kappa(1.0, 0.2) == 1
    assert kappa(0.6, 0.2) == pytest.approx(0.5)
    assert np.isnan(kappa(1.0, 1.0))
