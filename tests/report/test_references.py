"""The paper's numbers: their consistency, and where they are drawn."""

import numpy as np
import pytest

from reseed.compare.sharing_profile import unshared_fractions
from reseed.report.captions import (
    BY_K,
    BY_LAYER,
    BY_THRESHOLD,
    BY_WIDTH,
    UNSHARED,
    reference_values,
)


def test_the_paper_s_u_k_follow_from_its_p_m():
    """Paulo & Belrose's p_m of 9 seeds, rounded, gives their u_k."""
    p = np.array([0.348, 0.078, 0.064, 0.060, 0.059, 0.063, 0.069, 0.087, 0.173])
    assert np.allclose(unshared_fractions(p), list(UNSHARED.values()), atol=1e-3)
    assert list(UNSHARED) == list(range(2, 10))


def test_the_paper_s_factors_agree_on_the_sae_that_they_share():
    """Layer 6, k=32, 32,768 latents, threshold 0.7, 8B tokens; u_2 = 1 − the shared fraction."""
    found = [BY_WIDTH[32_768], BY_K[32], BY_THRESHOLD[0.7], BY_LAYER[6], round(1 - UNSHARED[2], 2)]
    assert set(found) == {0.42}


@pytest.fixture
def at(make_cell):
    def at(axis, values):
        _, cell = make_cell()
        return [({"sae": "topk", axis: value}, cell) for value in values]

    return at


def found(cells, axis, numbers):
    return reference_values(cells, axis, numbers)


def test_widths_are_drawn_up_to_four_times_beyond_the_ends(at):
    for axis in ("sae.num_latents", "num_latents"):
        near = found(at(axis, [1024, 8192]), axis, [1024, 8192])
        assert near == {768: 0.79, 4084: 0.70, 27648: 0.43, 32768: 0.42}
    assert found(at("num_latents", [200, 400]), "num_latents", [200, 400]) == {}, "one is no course"


def test_layers_are_drawn_within_the_range_of_the_axis(at):
    assert found(at("layer", [1, 3]), "layer", [1, 3]) == {1: 0.14, 2: 0.16, 3: 0.24}


@pytest.mark.parametrize(
    ("words", "numbers", "expected"),
    [
        (["k=32", "k=64"], [32, 64], [32, 64, 128, 256]),
        (["L0≈8", "L0≈16"], [8, 16], [32, 64]),
        (["λ=32", "λ=64"], [32, 64], []),
        (["k=2", "k=4"], [2, 4], []),
    ],
)
def test_sparsities_have_references_if_they_count_active_latents(at, words, numbers, expected):
    assert list(found(at("sparsity", words), "sparsity", numbers)) == expected


def test_budgets_have_references_on_an_axis_in_tokens_only(at, make_cell):
    numbers = [10**9, 10**10]
    cells = at("tokens", numbers)
    assert found(cells, "tokens", numbers) == {0.8e9: 0.07, 8e9: 0.42}
    knobs, cell = make_cell("relu")
    cell.runs["steps"] = 5.0
    assert found([(knobs | {"tokens": n}, cell) for n in numbers], "tokens", numbers) == {}


def test_other_axes_have_no_references(at):
    assert found(at("sae.aux_alpha", [32, 64]), "sae.aux_alpha", [32, 64]) == {}
