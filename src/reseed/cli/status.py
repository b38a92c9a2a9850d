"""``reseed status``: list runs and sweeps from their files, without a model or a lock.

``reseed status SWEEP`` shows the runs of one sweep, also while it is running
(`reseed.cli.cluster.states`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from reseed.cli.arguments import own_words, runtime_of, sweep_called
from reseed.cli.cluster.queue import Record
from reseed.cli.cluster.states import (
    QueueSnapshot,
    cancel_sweep,
    counts,
    print_sweep,
    states,
    watch,
)
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import counted, print_rows, say

ALL = "--all"
"""A flag that is not Hydra's: also list the runs of calibrations."""
WATCH = "--watch"
"""A flag that is not Hydra's: show a sweep repeatedly until it ends."""
COLUMNS = ("run", "status", "tokens", "FVU", "L0", "dead")


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def cancel(arguments: Sequence[str]) -> int:
    """Cancel the SLURM jobs of a sweep; saved results are kept."""
    return run_and_report(lambda: _cancel(arguments))


def _main(arguments: Sequence[str]) -> int:
    rest = [word for word in arguments if word not in (ALL, WATCH)]
    words, rest = own_words(rest)
    line = CommandLine("status", rest)
    if len(words) > 1 or (WATCH in arguments and not words):
        got = ", ".join(words) or "none"
        raise ConfigError(f"reseed status {WATCH} takes one sweep; got {got}")
    if not words:
        runtime = runtime_of(line)
        print_status(Path(runtime.outputs), Path(runtime.sweeps), everything=ALL in arguments)
        return 0
    (watch if WATCH in arguments else print_sweep)(sweep_called(words[0], line))
    return 0


def _cancel(arguments: Sequence[str]) -> int:
    words, rest = own_words(arguments)
    line = CommandLine("cancel", rest)
    if len(words) != 1:
        got = ", ".join(words) or "nothing"
        raise ConfigError(f"reseed cancel takes one sweep (`reseed status` lists them); got {got}")
    sweep = sweep_called(words[0], line)
    ids = cancel_sweep(sweep)
    if ids:
        say(f"cancelled {counted(len(ids), 'job')} of {sweep.path}: {', '.join(ids)}")
    else:
        say(f"{sweep.path}: no job is queued or running")
    return 0


def print_status(outputs: Path, sweeps: Path, everything: bool = False) -> None:
    """Print runs with their status and held-out metrics, and sweeps with their progress.

    Args:
        everything: list the runs of calibrations too, instead of only counting them.
    """
    rows: list[tuple[str, ...]] = []
    errors: list[str] = []
    calibrations: Counter[str] = Counter()
    for run in RunStore(outputs).runs():
        status = run.status
        record = {} if status in ("damaged", "missing") else run.record
        if record and record["identity"].get("role") and not everything:
            calibrations[status] += 1
            continue
        rows.append(_row(run, status))
        if status == "failed":
            errors.append(f"{run.id}: {record['error']['message']}")
    if rows:
        print_rows(rows, f"runs in {outputs}/", COLUMNS, ("run", "status"))
    elif not calibrations:
        say(f"no runs in {outputs}/")
    if calibrations:
        states = "" if set(calibrations) == {"finished"} else f": {_listed(calibrations)}"
        say(f"+ {counted(calibrations.total(), 'calibration run')}{states} ({ALL} lists them)")
    for line in errors:
        say(f"  {line}")
    _print_sweeps(sweeps)


def _row(run: Run, status: str) -> tuple[str, ...]:
    """Return the entries of `COLUMNS`; empty if unknown."""
    if status in ("damaged", "missing"):
        return run.id, status, "", "", "", ""
    cells = [""] * 3
    if status == "finished":
        m = run.metrics
        shown = ((m["fvu"], ".3f"), (m["l0"], ".1f"), (m["dead_fraction"], ".1%"))
        cells = ["-" if value is None else format(value, how) for value, how in shown]
    return run.id, status, f"{run.record['tokens']:,}", *cells


def _print_sweeps(sweeps: Path) -> None:
    for folder in sorted(p.parent for p in sweeps.glob("*/manifest.jsonl")):
        sweep = Sweep(folder)
        if Record(folder).jobs:
            listed = counts(states(sweep, QueueSnapshot.now(sweep)))
        else:
            found = {run.path: run for run in sweep.runs()}
            listed = _listed(Counter(run.status for run in found.values()))
        tables = "summary.md" if (folder / "summary.md").is_file() else "not compared"
        say(f"{folder}/: {listed}; {tables}")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
