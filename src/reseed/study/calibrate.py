"""Calibration: finds the penalty weight that gives a target L0, once for all seeds of a cell.

ReLU, Gated and JumpReLU SAEs have a penalty weight λ where a k-sparse one has k. To compare them at
the same L0, ``sae.target_l0`` asks for the λ whose held-out L0 at inference is the target:

1. One run is *steered*: λ changes while it trains (`reseed.sae.losses`), from the declared value.
2. Rounds with a constant λ follow, chosen by the secant method on log L0 against log λ, until the
   L0 of one is within `ACCEPTED` of the target.
3. That λ is used for every seed of the cell. A penalty that differed between seeds would be a
   confound.

All of these are runs of the store, with initial weights that no compared run has. They are found by
their signatures, so that a cell is calibrated only once and a killed calibration resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reseed.errors import ReseedError
from reseed.experiment.resolve import Resolved
from reseed.store.runs import Run, RunStore
from reseed.system.console import say

ACCEPTED = 0.02
"""Maximum relative deviation of a round's L0 from the target. Other seeds with the same λ differ by
a few per cent more and should stay within five."""
BOUND = 0.05
"""Maximum relative deviation of the best round after `MAX_ROUNDS`."""
MAX_ROUNDS = 8
_ELASTICITY = (0.3, 1.0, 3.0)
"""Minimum, first guess and maximum of −d log L0 / d log λ."""

Train = Callable[[Sequence[Resolved]], dict[str, BaseException]]


class CalibrationError(ReseedError):
    """Failure to find a penalty weight that gives the target L0."""


@dataclass
class PenaltySearch:
    """The search for one cell's λ.

    Attributes:
        base: the cell, without its seeds.
        rounds: (λ, held-out L0, run id) of each round with a constant λ.
    """

    base: Resolved
    rounds: list[tuple[float, float, str]] = field(default_factory=list)
    steered: bool = False
    next_log_weight: float = 0.0

    @property
    def target(self) -> float:
        target = self.base.experiment.architecture.target_l0
        assert target is not None
        return target

    @property
    def candidate(self) -> Resolved:
        """The next run."""
        if not self.steered:
            return replace(self.base, role="steered")
        return replace(self.base, role="calibration", penalty=self._weight)

    @property
    def best(self) -> tuple[float, float, str] | None:
        """The round nearest to the target."""
        return min(self.rounds, key=lambda r: abs(self._deviation(r[1])), default=None)

    @property
    def found(self) -> bool:
        """True if the best round is accepted."""
        best = self.best
        bound = ACCEPTED if len(self.rounds) < MAX_ROUNDS else BOUND
        return best is not None and abs(best[1] / self.target - 1) <= bound

    @property
    def ended(self) -> bool:
        return self.found or len(self.rounds) >= MAX_ROUNDS

    @property
    def _weight(self) -> float:
        # Four digits, so that a user can type the recorded value.
        return float(f"{math.exp(self.next_log_weight):.4g}")

    def observe(self, weight: float, l0: float, run: str, *, now: bool = True) -> None:
        """Record the result of the `candidate`, and choose the next λ.

        Args:
            now: whether the run was trained by this command; only then the result is printed.
        """
        if not self.steered:
            self.steered = True
            told = f"steered to weight {weight:.4g}, which gives L0 {l0:.2f}"
        else:
            self.rounds.append((weight, l0, run))
            told = f"weight {weight:.4g} gives L0 {l0:.2f}"
        if now:
            say(f"  {self._name}: {told}")
        self.next_log_weight = self._propose(weight, l0)

    def resume(self, store: RunStore) -> None:
        """Record the rounds that are already finished; print a line if they complete the search."""
        while not self.ended and (run := self.candidate.run(store)).finished:
            self.observe(*_response(run), now=False)
        if self.found:
            weight, l0, _ = self.best or (0.0, 0.0, "")
            say(f"already calibrated: {self._name}: weight {weight:.4g} (L0 {l0:.2f})")

    @property
    def _name(self) -> str:
        e = self.base.experiment
        return f"{e.architecture.name} at {self.base.tokens:,} tokens, target {self.target:g}"

    def _deviation(self, l0: float) -> float:
        return math.log(max(l0, 1e-6) / self.target)

    def _propose(self, weight: float, l0: float) -> float:
        """Return log λ of the next round: from a bracket if there is one, else by the secant."""
        least, guess, most = _ELASTICITY
        points = sorted((math.log(w), self._deviation(x)) for w, x, _ in self.rounds)
        below = [p for p in points if p[1] > 0]  # the weight is too small, so the L0 too large
        above = [p for p in points if p[1] <= 0]
        if below and above:
            (u0, y0), (u1, y1) = below[-1], above[0]
            if u0 < u1:
                # Large deviations are unreliable and are clipped. The deviation of an end that has
                # not moved for two rounds is halved (the Illinois method), because otherwise the
                # bracket can stop shrinking.
                y0, y1 = min(y0, 1.0), max(y1, -1.0)
                sides = [self._deviation(x) > 0 for _, x, _ in self.rounds[-2:]]
                if sides == [True, True]:
                    y1 /= 2
                elif sides == [False, False]:
                    y0 /= 2
                return u0 + y0 / (y0 - y1) * (u1 - u0)
        elasticity = guess
        if len(points) > 1:
            (u0, y0), (u1, y1) = points[0], points[-1]
            elasticity = (y0 - y1) / (u1 - u0) if u1 > u0 else guess
        elasticity = min(most, max(least, elasticity))
        # At most a factor of ten at once: far from the target the slope is unreliable.
        step = max(-2.3, min(2.3, self._deviation(l0) / elasticity))
        return math.log(weight) + step

    def outcome(self) -> dict[str, Any]:
        """Return the calibration entry of the compared runs' records.

        Raises:
            CalibrationError: no round was accepted.
        """
        best = self.best
        if best is None or not self.found:
            told = ", ".join(f"{w:.4g} gives {x:.3g}" for w, x, _ in self.rounds)
            raise CalibrationError(
                f"sae.target_l0 (={self.target:g}): no penalty weight gave a held-out L0 within "
                f"{BOUND:.0%} of the target in {len(self.rounds)} rounds: {told}. Set another "
                f"initial weight with sae.{self.base.experiment.architecture.penalty_field}, or "
                "raise training.tokens."
            )
        rounds = [{"weight": w, "l0": x, "run": run} for w, x, run in self.rounds]
        return {"weight": best[0], "l0": best[1], "run": best[2], "rounds": rounds}


def calibrate(
    experiments: Sequence[Resolved], store: RunStore, train: Train
) -> tuple[list[Resolved], dict[str, BaseException]]:
    """Find the penalty weight of every experiment that has a target L0.

    The searches of all cells advance together: each round trains one run per cell, so that cells on
    one stream share one pass of the language model.

    Args:
        experiments: the experiments to be trained.
        train: trains missing runs, and returns the errors by run id.

    Returns:
        the experiments with their weights, without those whose calibration failed; and the errors
        of the failed ones, by run id.
    """
    searches: dict[str, PenaltySearch] = {}
    for resolved in experiments:
        if resolved.needs_calibration:
            base = resolved.without_seeds()
            searches.setdefault(base.signature, PenaltySearch(base))
    for search in searches.values():
        search.resume(store)
    if left := sum(not search.ended for search in searches.values()):
        plural = "s" if left > 1 else ""
        say(f"finding the penalty weight{plural} of {left} SAE{plural} by calibration runs")
    errors: dict[str, BaseException] = {}
    while at_work := {k: s for k, s in searches.items() if not s.ended and k not in errors}:
        candidates = {key: search.candidate for key, search in at_work.items()}
        failures = train(list(candidates.values()))
        for key, candidate in candidates.items():
            run = candidate.run(store)
            if run.id in failures:
                errors[key] = failures[run.id]
            else:
                at_work[key].observe(*_response(run))
    return _with_weights(experiments, searches, errors, store)


def _response(run: Run) -> tuple[float, float, str]:
    """Return λ, held-out L0 and run id of a finished calibration run."""
    metrics = run.metrics
    return float(metrics["penalty_weight"]), metrics["l0"], run.id


def _with_weights(
    experiments: Sequence[Resolved],
    searches: dict[str, PenaltySearch],
    errors: dict[str, BaseException],
    store: RunStore,
) -> tuple[list[Resolved], dict[str, BaseException]]:
    found: list[Resolved] = []
    failed: dict[str, BaseException] = {}
    for resolved in experiments:
        if not resolved.needs_calibration:
            found.append(resolved)
            continue
        key = resolved.without_seeds().signature
        try:
            if key in errors:
                raise CalibrationError(f"the calibration failed: {errors[key]}") from errors[key]
            outcome = searches[key].outcome()
        except CalibrationError as error:
            failed[resolved.run(store).id] = error
        else:
            found.append(replace(resolved, penalty=outcome["weight"], calibration=outcome))
    return found, failed
