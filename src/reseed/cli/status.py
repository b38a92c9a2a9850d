"""``reseed status``: runs and sweeps as their files say, without a model or a lock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from reseed.cli.app import CommandLine
from reseed.cli.errors import reported


def task(config: DictConfig) -> None:
    """Print the runs and sweeps under runtime.outputs and runtime.sweeps."""
    print_status(Path(config.runtime.outputs), Path(config.runtime.sweeps))


def main(arguments: Sequence[str]) -> int:
    return reported(lambda: _main(CommandLine("status", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    if line.only_shows:
        line.show(task, arguments)
    else:
        line.launch(task, line.overrides, line.multirun)
    return 0


def print_status(outputs: Path, sweeps: Path) -> None:
    """Two tables: runs with their state and held-out measures; sweeps with how far they are."""
    from rich.table import Table

    from reseed.console import console, say
    from reseed.runs import RunStore
    from reseed.sweeps import Sweep

    table = Table(title=f"runs in {outputs}/", title_justify="left", box=None, pad_edge=False)
    for name in ("run", "status", "tokens", "FVU", "L0", "dead"):
        table.add_column(name, justify="left" if name in ("run", "status") else "right",
                         no_wrap=not console().is_terminal, overflow="fold")  # fmt: skip
    runs = RunStore(outputs).runs()
    errors: list[str] = []
    for run in runs:
        status = run.status
        if status == "damaged":
            table.add_row(run.id, status)
            continue
        record = run.record
        cells = [""] * 3
        if status == "finished":
            m = run.metrics
            shown = ((m["fvu"], ".3f"), (m["l0"], ".1f"), (m["dead_fraction"], ".1%"))
            cells = ["-" if value is None else format(value, how) for value, how in shown]
        elif status == "failed":
            errors.append(f"{run.id}: {record['error']['message']}")
        table.add_row(run.id, status, f"{record['tokens']:,}", *cells)
    if runs:
        console().print(table)
    else:
        say(f"no runs in {outputs}/")
    for line in errors:
        say(f"  {line}")
    folders = sorted(p.parent for p in sweeps.glob("*/manifest.jsonl"))
    for folder in folders:
        found = {run.path: run for run in Sweep(folder).runs()}
        counts = Counter(run.status for run in found.values())
        listed = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        tables = "summary.md" if (folder / "summary.md").is_file() else "not compared"
        say(f"{folder}/: {listed}; {tables}")
