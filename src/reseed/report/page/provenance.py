"""Where the numbers of a sweep come from: configurations, commands, runs, versions, cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reseed.report.axes import MISSING
from reseed.report.page.blocks import Block, Code, Folded, Items, Paragraph, Table
from reseed.report.wording import Wording
from reseed.runs import Run
from reseed.sweeps import Sweep

_NOT_SHOWN = ("experiment.comparison", "experiment.runtime")
"""Said once for all runs, or without influence on results."""


def provenance(sweep: Sweep) -> list[Block]:
    """The blocks of the section."""
    runs = list({run.path: run for run in sweep.runs()}.values())
    records = {run.id: run.record for run in runs if run.status not in ("missing", "damaged")}
    settings = sweep.settings if (sweep.path / "comparison.json").is_file() else {}
    blocks: list[Block] = [Paragraph(_origin(sweep, records))]
    commands = dict.fromkeys(_command(record) for record in records.values())
    blocks.append(Folded("Commands", (Code("\n".join(filter(None, commands))),)))
    common, differing = parted({name: flat(r["experiment"]) for name, r in records.items()})
    if differing:
        blocks.append(Table(differing))
    if common:
        same = Code("\n".join(f"{key}: {_word(value)}" for key, value in common.items()))
        blocks.append(Folded(f"Configuration that all runs share ({len(common)} keys)", (same,)))
    if settings:
        lines = [f"{key}: {_word(value)}" for key, value in flat(settings).items()]
        blocks.append(Folded("Settings of the comparison", (Code("\n".join(lines)),)))
    if sweep.evaluations:
        asked = {name: of["settings"] for name, of in sweep.evaluations.items()}
        lines = [f"{key}: {_word(value)}" for key, value in flat(asked).items()]
        blocks.append(Folded("Settings of the evaluations", (Code("\n".join(lines)),)))
    blocks.append(Table(_runs(runs, records)))
    blocks.append(Items(tuple(_versions(records))))
    return blocks


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def parted(each: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], Wording | None]:
    """What all runs have in common, and a table of what they differ in; None where in nothing.

    Args:
        each: flat settings by the names of runs.
    """
    keys = dict.fromkeys(key for values in each.values() for key in values)
    common: dict[str, Any] = {}
    differing: list[str] = []
    for key in keys:
        words = {_word(values.get(key, MISSING)) for values in each.values()}
        if len(words) > 1:
            differing.append(key)
        else:
            common[key] = next(iter(each.values()))[key]
    if not differing:
        return common, None
    rows = tuple(
        (name, *(_word(values.get(key, MISSING)) for key in differing))
        for name, values in each.items()
    )
    caption = "What runs differ in"
    return common, Wording(("run", *differing), rows, 1, caption, ())


def _runs(runs: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> Wording:
    rows = []
    total_tokens, total_seconds = 0, 0.0
    for run in runs:
        record = records.get(run.id, {})
        tokens, seconds = record.get("tokens"), record.get("timings", {}).get("seconds")
        total_tokens += tokens or 0
        total_seconds += seconds or 0.0
        rows.append((run.id, run.status, *_cost(tokens, seconds), _day(record)))
    rows.append(("all", "", *_cost(total_tokens, total_seconds), ""))
    note = (
        "**seconds**: of training, without loading and measuring; runs that were trained together "
        "on one stream each have the seconds of all of them, so that their sum is more than passed."
    )
    header = ("run", "status", "tokens", "seconds", "tokens/s", "ended")
    return Wording(header, tuple(rows), 2, "Runs and what they cost", (note,))


def _cost(tokens: int | None, seconds: float | None) -> tuple[str, str, str]:
    rate = f"{tokens / seconds:,.0f}" if tokens and seconds else MISSING
    return (
        MISSING if tokens is None else f"{tokens:,}",
        MISSING if seconds is None else f"{seconds:,.0f}",
        rate,
    )


def _day(record: Mapping[str, Any]) -> str:
    return str(record.get("ended") or MISSING)[:16].replace("T", " ")


def _origin(sweep: Sweep, records: Mapping[str, Mapping[str, Any]]) -> str:
    days = sorted(str(r["ended"])[:10] for r in records.values() if r.get("ended"))
    when = (
        ""
        if not days
        else f", trained {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else "")
    )
    return (
        f"Made by reseed from the files of the sweep `{sweep.path.name}`: {len(records)} runs"
        f"{when}."
        " The same commands with the same versions give the same runs; a run's folder holds its "
        "whole record (`run.json`)."
    )


def _command(record: Mapping[str, Any]) -> str:
    command = str(record.get("environment", {}).get("command", ""))
    name, _, rest = command.partition(" ")
    return f"reseed {rest}" if name in ("__main__.py", "reseed") and rest else command


def _versions(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every environment that runs were made in, those that are alike once."""
    found: dict[str, int] = {}
    for record in records.values():
        own = record.get("environment", {})
        packages = ", ".join(f"{name} {v}" for name, v in own.get("packages", {}).items())
        commit = own.get("git_commit")
        told = [
            f"Python {own.get('python', MISSING)}",
            packages,
            f"commit `{commit}`" if commit else "",
            f"{own.get('platform', MISSING)}, {own.get('cpus', MISSING)} CPUs",
            f"device {record['device']}" if record.get("device") else "",
        ]
        line = "; ".join(part for part in told if part)
        found[line] = found.get(line, 0) + 1
    return [f"**{count} of {len(records)} runs**: {line}" for line, count in found.items()]


def _word(value: Any) -> str:
    """A value as YAML would have it in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
