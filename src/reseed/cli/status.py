"""``reseed status``: list runs and sweeps from their files, without a model or a lock.

``reseed status SWEEP`` shows the runs of one sweep, also while it is running
(`reseed.cli.cluster.states`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from reseed.errors import ConfigError, ReseedError
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import counted, print_rows, say
from reseed.system.integrity import DamagedFileError, find_damaged, read_record

ALL = "--all"
"""A flag that is not Hydra's: also list the runs of calibrations."""
WATCH = "--watch"
"""A flag that is not Hydra's: show a sweep repeatedly until it ends."""
VERIFY = "--verify"
"""A flag that is not Hydra's: verify every file of the runs and sweeps."""
COLUMNS = ("run", "status", "tokens", "FVU", "L0", "dead")


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def cancel(arguments: Sequence[str]) -> int:
    """Cancel the SLURM jobs of a sweep; saved results are kept."""
    return run_and_report(lambda: _cancel(arguments))


def _main(arguments: Sequence[str]) -> int:
    rest = [word for word in arguments if word not in (ALL, WATCH, VERIFY)]
    words, rest = own_words(rest)
    line = CommandLine("status", rest)
    if len(words) > 1 or (WATCH in arguments and not words):
        got = ", ".join(words) or "none"
        raise ConfigError(f"reseed status {WATCH} takes one sweep; got {got}")
    if VERIFY in arguments and words:
        raise ConfigError(f"reseed status {VERIFY} verifies all runs and sweeps; got {words[0]}")
    if not words:
        runtime = runtime_of(line)
        folders = Path(runtime.outputs), Path(runtime.sweeps)
        thorough = VERIFY in arguments
        damaged = print_status(*folders, everything=ALL in arguments, thorough=thorough)
        if thorough:
            say(f"damaged: {counted(damaged, 'file')}" if damaged else "every file is as written")
        return int(thorough and damaged > 0)
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


def print_status(
    outputs: Path, sweeps: Path, everything: bool = False, thorough: bool = False
) -> int:
    """Print runs with their status and held-out metrics, and sweeps with their progress.

    Args:
        everything: list the runs of calibrations too, instead of only counting them.
        thorough: verify every file, not only those whose size or time of change is in doubt.

    Returns:
        the number of damaged files.
    """
    rows: list[tuple[str, ...]] = []
    errors: list[str] = []
    damages: list[str] = []
    calibrations: Counter[str] = Counter()
    known: dict[Path, str] = {}
    for run in RunStore(outputs).runs():
        status, record, damage = run.state(thorough=thorough)
        row = (run.id, status, "", "", "", "")
        try:
            if record is not None and status != "damaged":
                row = _row(run, status, record)
        except ReseedError as error:
            status, damage = "damaged", str(error)
            row = (run.id, status, "", "", "", "")
        known[run.path] = status
        calibration = record is not None and record["identity"].get("role")
        if calibration and status != "damaged" and not everything:
            calibrations[status] += 1
        else:
            rows.append(row)
        if record and status == "failed":
            errors.append(f"{run.id}: {record['error']['message']}")
        found = [damage] if damage else []
        if thorough:
            found += map(str, find_damaged(run.path))
        damages += dict.fromkeys(found)
        errors += dict.fromkeys(found)
    if rows:
        print_rows(rows, f"runs in {outputs}/", COLUMNS, ("run", "status"))
    elif not calibrations:
        say(f"no runs in {outputs}/")
    if calibrations:
        states = "" if set(calibrations) == {"finished"} else f": {_listed(calibrations)}"
        say(f"+ {counted(calibrations.total(), 'calibration run')}{states} ({ALL} lists them)")
    for line in errors:
        say(f"  {line}")
    return len(damages) + _print_sweeps(sweeps, known, thorough)


def _row(run: Run, status: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the entries of `COLUMNS`; empty if unknown.

    Raises:
        DamagedFileError: the metrics of a finished run are damaged.
    """
    cells = [""] * 3
    if status in ("finished", "unverified"):
        shown = ("fvu", ".3f"), ("l0", ".1f"), ("dead_fraction", ".1%")
        metrics = read_record(path := run.path / "metrics.json")
        try:
            values = [(metrics[name], how) for name, how in shown]
            cells = ["-" if value is None else format(value, how) for value, how in values]
        except (KeyError, TypeError, ValueError) as error:  # of version 0.1, without a checksum
            raise DamagedFileError(path, f"it lacks a metric ({error})") from None
    return run.id, status, f"{record['tokens']:,}", *cells


def _print_sweeps(sweeps: Path, known: Mapping[Path, str], thorough: bool) -> int:
    """Print a line per sweep; return the number of damaged files.

    Args:
        known: the status of each run in the folder of runs.
    """
    damaged = 0
    for folder in sorted(sweeps.iterdir()) if sweeps.is_dir() else ():
        try:
            if not Sweep(folder).exists:
                continue
            say(f"{folder}/: {_progress(Sweep(folder), known)}")
            found = find_damaged(folder) if thorough else []
        except ReseedError as error:
            say(f"{folder}/: damaged")
            found = [error]
        for one in found:
            say(f"  {one}")
        damaged += len(found)
    return damaged


def _progress(sweep: Sweep, known: Mapping[Path, str]) -> str:
    if Record(sweep.path).jobs:
        listed = counts(states(sweep, QueueSnapshot.now(sweep)))
    else:
        found = {run.path: run for run in sweep.runs()}
        listed = _listed(Counter(known.get(path) or run.status for path, run in found.items()))
    there = (sweep.path / "summary.md").is_file()
    return f"{listed}; {'summary.md' if there else 'not compared'}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
