"""Tests of p_m, u_k and the power law, against the paper's numbers and by enumeration."""

from itertools import combinations

import numpy as np
import pytest

from reseed.compare.sharing_profile import fit_power_law, seed_profile, unshared_fractions

PAPER_P = np.array([0.348, 0.078, 0.064, 0.060, 0.059, 0.063, 0.069, 0.087, 0.173])
PAPER_U = [0.583, 0.484, 0.436, 0.406, 0.385, 0.370, 0.358, 0.348]


def test_the_papers_p_m_give_its_u_k():
    assert unshared_fractions(PAPER_P) == pytest.approx(PAPER_U, abs=1e-3)


def test_the_papers_u_k_have_their_limit_at_a_quarter():
    law = fit_power_law(np.array(PAPER_U))
    assert law.c == pytest.approx(0.27, abs=0.01)
    assert law(np.arange(2, 10)) == pytest.approx(PAPER_U, abs=2e-3)


def test_a_known_power_law_is_recovered():
    law = fit_power_law(0.6 * np.arange(2.0, 12) ** -1.3 + 0.15)
    assert (law.a, law.b, law.c) == pytest.approx((0.6, 1.3, 0.15), abs=1e-3)


def test_three_values_or_a_flat_line_have_no_power_law():
    assert fit_power_law(np.array([0.6, 0.5, 0.45])) is None
    assert fit_power_law(np.full(8, 0.4)) is None


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_seed_profile_equals_an_enumeration_of_subsets(n):
    rng = np.random.default_rng(n)
    sizes = [17, 17, 23, 5, 17][:n]  # base seeds have equal weight, whatever their size
    shared = [rng.random((size, n - 1)) < rng.random((size, 1)) for size in sizes]
    profile = seed_profile(shared)
    for k in range(2, n + 1):
        missed = [
            np.mean([
                not any(latent[t] for t in chosen)
                for chosen in combinations(range(n - 1), k - 1)
                for latent in flags
            ])
            for flags in shared
        ]  # fmt: skip
        assert profile.u[k - 2] == pytest.approx(np.mean(missed))
    for m in range(n):
        assert profile.p[m] == pytest.approx(np.mean([
            np.mean([sum(latent) == m for latent in flags]) for flags in shared
        ]))  # fmt: skip
    assert profile.u[-1] == pytest.approx(profile.p[0])
    assert 1 - profile.u[0] == pytest.approx(np.mean([flags.mean() for flags in shared]))


def test_flags_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="n ≥ 2 seeds needs flags"):
        seed_profile([np.zeros((4, 2), bool), np.zeros((4, 1), bool)])
