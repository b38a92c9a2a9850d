"""A controller that steers a penalty weight towards a wanted L0 during training.

A steered run gives the first guess of a calibration (`reseed.calibration`), from any initial
weight. It is never compared with other runs, because its penalty weight changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BEGIN, HOLD = 0.1, 0.8
"""Fractions of the run between which the weight changes: after the warm-ups, before the decay."""
AVERAGED = 0.3
"""The final weight is the geometric mean over this fraction of the run before `HOLD`."""
GAIN = 8.0
"""Integral gain: a deviation of 1 in log L0 changes log λ by this much over a whole run."""


@dataclass
class Steering:
    """An integral controller on log L0, with a deviation of at most 1.

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
        """Update the weight by the L0 of step ``index`` (0-based), taken at the current weight."""
        begin, hold = round(BEGIN * self.steps), round(HOLD * self.steps)
        if not begin <= index < hold:
            return
        # An L0 of 0 has no logarithm; any small value does, because the deviation is bounded.
        deviation = math.log(max(l0, 1e-6) / self.target)
        self.log_weight += GAIN / self.steps * max(-1.0, min(1.0, deviation))
        if index >= hold - round(AVERAGED * self.steps):
            self.sum += self.log_weight
            self.count += 1
        if index == hold - 1 and self.count:
            self.log_weight = self.sum / self.count
