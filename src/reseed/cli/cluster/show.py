"""``reseed status SWEEP``: show its runs from files and SLURM's queue, once or repeatedly."""

from __future__ import annotations

import time

from reseed.cli.cluster.states import (
    FAILED,
    RunState,
    Seen,
    counts,
    failed_jobs,
    other_jobs,
    states,
)
from reseed.sweeps import Sweep

COLUMNS = ("run", "state", "tokens", "of", "%", "tokens/s")
WATCH_S = 5.0
_ON = ("running", "starting", "queued", "submitted")


def print_sweep(sweep: Sweep) -> bool:
    """Print every run of a sweep, and the state of its other jobs.

    Returns:
        True if a job or run is queued or running.
    """
    from reseed.cli.status import print_rows
    from reseed.console import say

    seen = Seen.now(sweep)
    found = states(sweep, seen)
    title = f"{sweep.path}/: {counts(found)}"
    print_rows([_row(state) for state in found], title, COLUMNS, ("run", "state"))
    for state in found:
        if state.state == FAILED:
            say(f"  {state.id}: {state.note}")
    for traceback in dict.fromkeys(state.traceback for state in found if state.traceback):
        say("\n".join(f"    {line}" for line in traceback.splitlines()))
    for line in (*other_jobs(seen), *failed_jobs(seen)):
        say(f"  {line}")
    if seen.trouble:
        say(f"  SLURM was not asked: {seen.trouble}")
    return bool(seen.active) or any(state.state in _ON for state in found)


def watch(sweep: Sweep, every_s: float = WATCH_S) -> None:
    """Print a sweep repeatedly until nothing is queued or running; clear a terminal each time."""
    from reseed.console import console

    while True:
        if console().is_terminal:
            console().clear()
        if not print_sweep(sweep):
            return
        time.sleep(every_s)


def _row(state: RunState) -> tuple[str, ...]:
    """Return the entries of `COLUMNS`; empty if unknown."""
    waits = f" ({state.note})" if state.note and state.state in ("queued", "submitted") else ""
    share = f"{state.tokens / state.of:.0%}" if state.tokens is not None and state.of else ""
    tokens = "" if state.tokens is None else f"{state.tokens:,}"
    of = "" if state.of is None else f"{state.of:,}"
    rate = "" if state.rate is None else f"{state.rate:,.0f}"
    return state.id, state.state + waits, tokens, of, share, rate
