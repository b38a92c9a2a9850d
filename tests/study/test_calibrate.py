"""Tests of the search for a penalty weight on known responses, and of steering."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from reseed.sae.losses import BEGIN, GAIN, HOLD, PenaltySteering
from reseed.study.calibrate import ACCEPTED, BOUND, MAX_ROUNDS, CalibrationError, PenaltySearch

Response = Callable[[float], float]


def searched(response: Response, target: float = 32.0, start: float = 1.0) -> PenaltySearch:
    """Run a search to its end on L0 = response(λ), after a steered run that ended at ``start``."""
    sae = SimpleNamespace(target_l0=target, name="relu", penalty_field="l1_coefficient")
    base: Any = SimpleNamespace(experiment=SimpleNamespace(architecture=sae), tokens=1_000)
    search = PenaltySearch(base)
    search.observe(start, response(start), "steered")
    while not search.ended:
        weight = search._weight
        search.observe(weight, response(weight), f"round{len(search.rounds)}")
    return search


@pytest.mark.parametrize("elasticity", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("start", [1e-3, 1.0, 300.0])
def test_a_power_law_is_solved_from_any_start(elasticity: float, start: float) -> None:
    search = searched(lambda w: 50.0 * w**-elasticity, start=start)
    weight, l0, _ = search.best or (0, 0, "")
    assert abs(l0 / 32 - 1) <= ACCEPTED
    # 50 λ^−e = 32
    assert weight == pytest.approx((50 / 32) ** (1 / elasticity), rel=ACCEPTED / elasticity)


def test_a_power_law_of_exponent_one_takes_a_single_round() -> None:
    """The first guess of the elasticity is 1, so the first secant step is exact."""
    assert len(searched(lambda w: 10.0 / w, start=0.05).rounds) == 1


def test_a_curve_that_falls_off_a_cliff_is_bracketed() -> None:
    """L0 of a JumpReLU SAE can fall from hundreds to nothing within a factor of two of λ."""
    search = searched(lambda w: 300 / (1 + (w / 0.8) ** 6), start=0.1)
    assert abs((search.best or (0, 0, ""))[1] / 32 - 1) <= ACCEPTED


def test_the_search_recovers_from_a_silent_sae() -> None:
    search = searched(lambda w: 0.0 if w > 1 else 20 / w, start=50.0)
    assert search.best is not None
    assert abs(search.best[1] / 32 - 1) <= ACCEPTED


def test_an_unreachable_target_is_reported_with_the_weights_tried() -> None:
    search = searched(lambda w: 100.0 if w < 1 else 2.0)
    assert len(search.rounds) == MAX_ROUNDS
    with pytest.raises(
        CalibrationError, match=r"sae.target_l0 \(=32\): no penalty weight .* gives"
    ):
        search.outcome()


def test_a_coarse_response_is_accepted_within_five_per_cent() -> None:
    """L0 jumps from 33.2 to 31.0: neither is within 2% of 32, both are within 5%."""
    search = searched(lambda w: 33.2 if w < 2 else 31.0, start=1.5)
    assert search.outcome()["l0"] in (33.2, 31.0)
    assert ACCEPTED < abs(search.outcome()["l0"] / 32 - 1) <= BOUND


def test_weights_are_rounded_to_four_digits() -> None:
    search = searched(lambda w: 10.0 / w**0.9, start=0.05)
    assert all(weight == float(f"{weight:.4g}") for weight, _, _ in search.rounds)


def test_steering_changes_the_weight_only_between_warm_up_and_decay() -> None:
    steering = PenaltySteering(target=10.0, steps=1_000, log_weight=0.0)
    for index in range(round(BEGIN * 1_000)):
        steering.observe(index, 500.0)
    assert steering.log_weight == 0
    steering.observe(100, 500.0)  # far above the target: the deviation is clipped to 1
    assert steering.log_weight == pytest.approx(GAIN / 1_000)
    steering.observe(101, 10 * math.exp(-0.5))
    assert steering.log_weight == pytest.approx(0.5 * GAIN / 1_000)
    held = steering.log_weight
    steering.observe(round(HOLD * 1_000), 500.0)
    assert steering.log_weight == held


def test_steering_holds_a_first_order_lag_at_its_target() -> None:
    """The plant L0 = 40/λ follows with a lag of 30 steps; λ = 4 gives the target of 10."""
    steering, log_l0 = PenaltySteering(10.0, 1_000, 0.0), math.log(400)
    for index in range(1_000):
        log_l0 += (math.log(40 / steering.weight) - log_l0) / 30
        steering.observe(index, math.exp(log_l0))
    assert steering.weight == pytest.approx(4.0, rel=0.02)


def test_steering_resumes_from_a_checkpoint() -> None:
    whole = PenaltySteering(10.0, 100, 0.0)
    for index in range(100):
        whole.observe(index, 20.0 - index / 10)
    part = PenaltySteering(10.0, 100, 0.0)
    for index in range(60):
        part.observe(index, 20.0 - index / 10)
    part = PenaltySteering(**asdict(part))
    for index in range(60, 100):
        part.observe(index, 20.0 - index / 10)
    assert part == whole
