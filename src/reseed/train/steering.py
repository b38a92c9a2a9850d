"""Steering a penalty weight towards a wanted L0 while an SAE trains.

A run that is steered is never compared: its weight moves, which no recipe does. It gives the first
guess of a calibration (`reseed.calibration`), from wherever the weight stood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BEGIN, HOLD = 0.1, 0.8
"""Fractions of the run between which the weight moves: after the warm-ups, before the decay."""
AVERAGED = 0.3
"""The weight that is held at last is the geometric mean over this last fraction before `HOLD`."""
GAIN = 8.0
"""Integral gain: a deviation of 1 in log L0 moves log λ by this much in a whole run."""


@dataclass
class Steering:
    """An integral controller on log L0, its deviation bounded by 1.

    Attributes:
        target: the wanted L0.
        steps: length of the run.
        log_weight: log λ now.
        sum, count: of log λ over the averaged part.
    """

    target: float
    steps: int
    log_weight: float
    sum: float = 0.0
    count: int = 0

    @property
    def weight(self) -> float:
        """λ of the next step."""
        return math.exp(self.log_weight)

    def observe(self, index: int, l0: float) -> None:
        """Take in the L0 of step ``index`` (0-based), made at the present weight."""
        begin, hold = round(BEGIN * self.steps), round(HOLD * self.steps)
        if not begin <= index < hold:
            return
        # An SAE that is silent has no logarithm, and none is needed: the deviation is bounded.
        deviation = math.log(max(l0, 1e-6) / self.target)
        self.log_weight += GAIN / self.steps * max(-1.0, min(1.0, deviation))
        if index >= hold - round(AVERAGED * self.steps):
            self.sum += self.log_weight
            self.count += 1
        if index == hold - 1 and self.count:
            self.log_weight = self.sum / self.count
