"""Measures of a pair besides the strict rule, checked with dense matrices and scipy's solver."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from reseed.compare.cell import compare_cell
from reseed.compare.dictionary import _variance, load_dictionaries
from reseed.compare.matching import match
from reseed.compare.measures import THRESHOLDS
from reseed.compare.pair import compare_pair
from reseed.sae.topk import TopKConfig


@pytest.fixture
def pair(dictionary):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2, 50, 12))
    # Encoder and decoder get separate noise, so that the two matchings differ.
    noise = rng.uniform(0, 1.4, (2, 44, 1)) * rng.standard_normal((2, 44, 12))
    others = (rows[:, :44] + noise)[:, rng.permutation(44)]
    others[1, ::3] *= -1
    a = dictionary(*rows, seed="a", firing=rng.integers(0, 30, 50))
    return a, dictionary(*others, seed="b", firing=rng.integers(0, 30, 44))


def test_threshold_measures_are_the_strict_rule_at_each_threshold(pair):
    measures = compare_pair(*pair).measures
    for tau in THRESHOLDS:
        alone = compare_pair(*pair, threshold=tau).measures
        assert measures[f"shared_fraction_at_{tau}"] == alone["shared_fraction"]
        assert measures[f"shared_fraction_live_at_{tau}"] == alone["shared_fraction_live"]
    found = [measures[f"shared_fraction_at_{tau}"] for tau in THRESHOLDS]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_pw_mcc_agrees_with_scipy(pair, unit):
    a, b = pair
    table = unit(a.decoder) @ unit(b.decoder).T
    measures = compare_pair(a, b).measures
    for name, gain in (("pw_mcc_signed", table), ("pw_mcc_absolute", np.abs(table))):
        i, j = linear_sum_assignment(-gain)
        assert measures[name] == pytest.approx(gain[i, j].sum() / 44)
    assert measures["pw_mcc_absolute"] > measures["pw_mcc_signed"] + 0.05
    back = compare_pair(b, a).measures
    assert back["pw_mcc_absolute"] == pytest.approx(measures["pw_mcc_absolute"])


def test_pw_mcc_divides_by_the_smaller_side_including_latents_without_direction(dictionary):
    rows = np.random.default_rng(0).standard_normal((10, 8))
    broken = -rows[:8]
    broken[3] = 0
    found = compare_pair(dictionary(rows, rows), dictionary(rows[:8], broken, seed="1")).measures
    assert found["pw_mcc_absolute"] == pytest.approx(7 / 8)
    assert found["pw_mcc_signed"] < 0.9 * 7 / 8
    assert found["cosine_decoder"] == pytest.approx(found["pw_mcc_signed"] * 8 / 7)


def test_joint_fractions_agree_with_scipy(pair, unit):
    a, b = pair
    encoder = unit(a.encoder) @ unit(b.encoder).T
    decoder = unit(a.decoder) @ unit(b.decoder).T
    i, j = linear_sum_assignment(-(encoder + decoder))
    near = np.minimum(encoder, decoder)[i, j] >= 0.6
    live_a, live_b = a.live(10), b.live(10)
    measures = compare_pair(a, b, threshold=0.6).measures
    assert measures["shared_fraction_joint"] == 2 * near.sum() / 94
    live = (near & live_a[i] & live_b[j]).sum()
    assert measures["shared_fraction_joint_live"] == 2 * live / (live_a.sum() + live_b.sum())


def test_joint_matching_shares_latents_whose_two_matchings_disagree(dictionary):
    # The nearest by encoder and by decoder differ, but both are near enough.
    c, s = np.cos(0.3), np.sin(0.3)
    a = dictionary([[1, 0], [c, s]], [[1, 0], [c, s]])
    b = dictionary([[1, 0], [c, s]], [[c, s], [1, 0]], seed="1")
    measures = compare_pair(a, b).measures
    assert measures["shared_fraction"] == 0
    assert measures["shared_fraction_joint"] == 1


def test_weighted_fractions_agree_with_hand_computed_values(dictionary):
    rows = np.eye(4, 8)
    other = rows.copy()
    other[2:] = np.eye(8)[6:]  # latents 0 and 1 are shared
    a = dictionary(rows, firing=[300, 100, 40, 0], variance=np.array([4.0, 2, 1, 1]))
    b = dictionary(other, firing=[200, 90, 110, 10], variance=np.array([3.0, 1, 5, 0]), seed="1")
    measures = compare_pair(a, b).measures
    assert measures["shared_fraction_by_firing"] == (400 + 290) / (440 + 410)
    assert measures["shared_fraction_by_variance"] == (6 + 4) / (8 + 9)
    # Dense, with more than a tenth of 1,000 tokens: latent 0 of A, latents 0 and 2 of B.
    assert (measures["dense_a"], measures["dense_b"]) == (1, 2)
    assert measures["shared_fraction_dense"] == 2 / 3
    assert measures["shared_fraction_sparse"] == 2 / 4
    without = compare_pair(replace(a, variance=None), b).measures
    assert np.isnan(without["shared_fraction_by_variance"])


def test_the_variance_of_a_contribution_agrees_with_its_definition():
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.standard_normal((500, 6)), 0) * np.arange(6)
    decoder = rng.standard_normal((6, 9))
    sums = {
        "activation_sum": activations.sum(0),
        "activation_square_sum": np.square(activations).sum(0),
    }
    wanted = [np.cov((activations[:, [i]] * decoder[i]).T, bias=True).trace() for i in range(6)]
    assert _variance(sums, decoder, 500) == pytest.approx(wanted)
    assert _variance({}, decoder, 500) is None


@pytest.mark.parametrize("stored", [True, False])
def test_a_run_is_loaded_with_the_variance_if_its_sums_are_stored(stored, load_as):
    sae = TopKConfig(num_latents=6, k=2).build(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.mul_(torch.arange(1.0, 7)[:, None])
    latents = {"firing": np.full(6, 5), "tokens_since_fired": np.zeros(6, int)}
    if stored:
        latents |= {"activation_sum": np.full(6, 20.0), "activation_square_sum": np.full(6, 90.0)}
    run = SimpleNamespace(
        id="run",
        record={"dead_after_tokens": 100, "steps": 1},
        metrics={"fvu": 0.1, "l0": 2, "cosine": 0.9, "dead_fraction": 0, "tokens": 10},
        latents=lambda: latents,
        activations=lambda: None,
        path=None,
    )
    load_as(sae)
    trained, untrained = load_dictionaries(run, "0")
    assert untrained.variance is None
    if not stored:
        assert trained.variance is None
        return
    squares = sae.W_dec.detach().double().square().sum(1)
    assert trained.variance == pytest.approx((9 - 2**2) * squares.numpy(), rel=1e-6)


class Counting:
    """Matcher that records its calls."""

    def __init__(self):
        self.asked = []

    def __call__(self, a, b, *, absolute=False):
        self.asked.append((a.shape[1], absolute))
        return match(a, b, absolute=absolute)


def test_every_assignment_goes_through_the_matcher(pair, monkeypatch):
    matcher = Counting()
    a, b = (replace(x, covariance=np.diag(np.arange(1.0, 13))) for x in pair)
    wanted = compare_pair(a, b)

    def refused(*args, **options):
        raise AssertionError("an assignment was made elsewhere")

    monkeypatch.setattr("reseed.compare.pair.match", refused)
    found = compare_pair(a, b, matcher=matcher)
    assert found.measures == pytest.approx(wanted.measures, nan_ok=True)
    # Encoder, decoder, pre-activations, |decoder|, joint.
    assert sorted(matcher.asked) == [(12, False)] * 3 + [(12, True), (24, False)]


def test_an_assignment_is_made_once_and_only_if_a_measure_needs_it(pair, partly_shared, settings):
    matcher = Counting()
    assert compare_pair(*pair, matcher=matcher).value("coverage") > 0
    assert len(matcher.asked) == 2
    cell_matcher = Counting()
    cell = compare_cell(partly_shared(3, 9), partly_shared(3, 0), settings, matcher=cell_matcher)
    # The untrained columns need the matchings by encoder and by decoder alone.
    assert len(cell_matcher.asked) == 3 * (5 + 2)
    assert cell.pairs["untrained_coverage"].notna().all()


def test_a_weighted_fraction_never_exceeds_1(dictionary):
    """Sums in another order differ in the last digit; intervals refuse a fraction above 1."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        silent = rng.random(60) < 0.2
        sides = []
        for name in "ab":
            rows = np.random.default_rng(99).standard_normal((2, 60, 128))
            rows[:, silent] = rng.standard_normal((2, silent.sum(), 128))
            weight = np.where(silent, 0.0, rng.random(60) ** 3)
            sides.append(dictionary(*rows, seed=name, firing=60 * ~silent, variance=weight))
        found = compare_pair(*sides, threshold=0.99).measures
        assert 1 - 1e-12 < found["shared_fraction_by_variance"] <= 1
