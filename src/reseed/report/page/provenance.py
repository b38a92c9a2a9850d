"""Provenance of a sweep's numbers: configurations, commands, runs, versions, cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from reseed.report.cell_labels import Cell, label
from reseed.report.format import MISSING
from reseed.report.page.render import Block, BulletList, Code, Folded, Paragraph, TableBlock
from reseed.report.table import Table
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.system.environment import mask_command

_WITHOUT_EFFECT = ("runtime.", "hydra.", "hydra/")
_MANY = 8
"""Maximum number of cells for a table with a column per cell; with more, it has a row per cell."""


def provenance(sweep: Sweep, cells: Sequence[Cell]) -> list[Block]:
    """Return the blocks of the provenance section."""
    runs = list({run.path: run for run in sweep.runs()}.values())
    records = {run.id: run.record for run in runs if run.status not in ("missing", "damaged")}
    blocks: list[Block] = [Paragraph(_origin(sweep, records))]
    commands = dict.fromkeys(command(record) for record in records.values())
    blocks.append(Code("\n".join(filter(None, commands))))
    common, differing = split_common(
        {
            label(cells, knobs): [
                flatten_settings(records[run]["experiment"])
                for run in cell.runs["run"]
                if run in records
            ]
            for knobs, cell in cells
        }
    )
    if differing:
        blocks.append(TableBlock(differing))
    blocks.append(_settings(f"Configuration that all cells share ({len(common)} keys)", common))
    blocks.append(_settings("Settings of the comparison", flatten_settings(sweep.settings)))
    if sweep.evaluations:
        asked = {name: of["settings"] for name, of in sweep.evaluations.items()}
        blocks.append(_settings("Settings of the evaluations", flatten_settings(asked)))
    blocks.append(TableBlock(_runs(runs, records)))
    blocks.append(BulletList(tuple(_versions(records))))
    return blocks


def _settings(title: str, values: Mapping[str, Any]) -> Folded:
    return Folded(title, (Code("\n".join(f"{k}: {_word(v)}" for k, v in values.items())),))


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten_settings(value, f"{name}.")
        else:
            found[name] = value
    return found


def split_common(
    each: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, str], Table | None]:
    """Return the settings that all cells have in common, and a table of those that differ (None if
    none does).

    Args:
        each: cell name → flat settings of its runs. If a setting differs within a cell, the table
            lists all values: ``0, 1, 2``.
    """
    keys = dict.fromkeys(key for runs in each.values() for values in runs for key in values)
    texts = {
        key: [
            ", ".join(dict.fromkeys(_word(values.get(key, MISSING)) for values in runs))
            for runs in each.values()
        ]
        for key in keys
    }
    common = {key: words[0] for key, words in texts.items() if len(set(words)) == 1}
    differing = {key: words for key, words in texts.items() if key not in common}
    if not differing:
        return common, None
    header, rows = list(each), [(key, *words) for key, words in differing.items()]
    if len(each) > _MANY:
        header, columns = list(differing), list(differing.values())
        rows = [(name, *(c[i] for c in columns)) for i, name in enumerate(each)]
    return common, Table(("", *header), tuple(rows), 1, "Settings that differ between cells", ())


def _runs(runs: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> Table:
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
        "**seconds**: training time, without loading and measuring. Runs of one group (trained "
        "together on one stream) each show the group's seconds, so the sum exceeds the time taken."
    )
    header = ("run", "status", "tokens", "seconds", "tokens/s", "ended")
    return Table(header, tuple(rows), 2, "Runs and their cost", (note,))


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
        f"reseed made this report from the sweep `{sweep.path.name}`: {len(records)} runs"
        f"{when}."
        " The same commands with the same versions give the same runs. The full record of a run is "
        "`run.json` in its folder."
    )


def command(record: Mapping[str, Any]) -> str:
    """Return the typed command without options that cannot change results: folders, threads, …

    Runs of version 0.1 have secrets in their records; they are masked here.
    """
    text = mask_command(str(record.get("environment", {}).get("command", "")))
    try:
        typed = shlex.split(text)
    except ValueError:  # version 0.1 recorded words without quotes
        typed = text.split(" ")
    if not typed or typed[0] not in ("reseed", "__main__.py") or len(typed) < 2:
        return text
    multirun = ["-m"] if typed[1] == "train" and "-m" in typed else []
    kept = [w for w in typed[2:] if w != "-m" and not w.lstrip("+~").startswith(_WITHOUT_EFFECT)]
    return shlex.join(["reseed", typed[1], *multirun, *kept])


def _versions(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line per distinct environment, with the number of runs trained in it."""
    found: dict[str, int] = {}
    for record in records.values():
        own = record.get("environment", {})
        packages = ", ".join(f"{name} {v}" for name, v in own.get("packages", {}).items())
        commit = own.get("git_commit")
        parts = [
            f"Python {own.get('python', MISSING)}",
            packages,
            f"commit `{commit}`" if commit else "",
            f"{own.get('platform', MISSING)}, {own.get('cpus', MISSING)} CPUs",
            _rounding(own),
            f"device {record['device']}" if record.get("device") else "",
        ]
        line = "; ".join(part for part in parts if part)
        found[line] = found.get(line, 0) + 1
    return [f"**{count} of {len(records)} runs**: {line}" for line, count in found.items()]


def _rounding(own: Mapping[str, Any]) -> str:
    """Return what decides how sums are rounded; empty for a run of an earlier version."""
    if not own.get("cpu"):
        return ""
    threads, vectors = own.get("threads"), own.get("vector_instructions")
    used = f" with {vectors}, {threads} thread{'s' * (threads != 1)}" if threads else ""
    return f"{own['cpu']}{used}"


def _word(value: Any) -> str:
    """Return a value as YAML would write it on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
