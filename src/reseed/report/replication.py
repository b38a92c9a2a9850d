"""Output of ``reseed check``: a row per named latent, and the same measures of other latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from reseed.compare.cell import CellResult
from reseed.compare.registry import ALIKE, Interval
from reseed.report.cell_labels import activations_of
from reseed.report.format import MISSING, format_number, null_text, with_interval
from reseed.report.markup import markdown_inline, markdown_table
from reseed.report.table import Table
from reseed.report.terminal import print_table
from reseed.system.files import atomic_write, atomic_write_text

CHECK_FILES = ("check.csv", "check.md")


def write_check(frame: pd.DataFrame, table: Table, folder: Path) -> list[Path]:
    """Write `CHECK_FILES` into ``folder``, each atomically."""
    csv, md = (folder / name for name in CHECK_FILES)
    atomic_write(csv, lambda p: frame.to_csv(p, index=False))
    parts = (
        "# Do these latents replicate?",
        markdown_inline(table.caption),
        markdown_table(table),
    )
    atomic_write_text(md, "\n\n".join(parts) + "\n")
    return [csv, md]


def print_check(table: Table, console: Console | None = None) -> None:
    """Print the table of ``reseed check``."""
    print_table(table, console or Console(), "Do these latents replicate?")


def check_table(
    frame: pd.DataFrame, result: CellResult, knobs: Mapping[str, Any], lacking: Sequence[str] = ()
) -> Table:
    """Return the numbers of `compare.replication.replication_table` as text, with footnotes.

    Args:
        knobs: the cell's knobs.
        lacking: footnotes on missing runs.
    """
    seeds = list(result.runs["seed"].astype(str))
    rows: list[Any] = frame.to_dict("records")
    named = ["label"] if any(row["label"] for row in rows) else []
    several = len({row["run"] for row in rows}) > 1
    axis = str(result.settings.pair_words)
    shown = [value for value in seeds if f"partner_{value}" in list(frame)]
    percent = f"{result.settings.confidence:.0%}"
    header = (
        "latent",
        *named,
        *([axis] if several else []),
        "firing",
        "shared\nwith",
        f"reproducibility\n[{percent}]",
        "same\nfiring",
        *(f"{axis} {value}" for value in shown),
    )
    entries = tuple(
        (
            str(row["latent"]),
            *(str(row[name]) for name in named),
            *([str(row["seed"])] if several else []),
            f"{row['firing']:,}",
            f"{row['shared_with']} of {row['others']}",
            with_interval(_reproducibility(row)),
            format_number(row["decile_shared"]),
            *(_partner(row, value) for value in shown),
        )
        for row in rows
    )
    constant = [f"{k}={v}" for k, v in knobs.items()]
    own = [] if several else [f"latents of {axis} {rows[0]['seed']}: {rows[0]['run']}"]
    count = 1 + len(named) + several
    caption = " · ".join([*constant, *own])
    return Table(header, entries, count, caption, (*_notes(frame, result), *lacking))


def _reproducibility(row: Mapping[str, Any]) -> Interval:
    ends = row["reproducibility_low"], row["reproducibility_high"]
    return Interval(row["reproducibility"], *ends, None, row["others"])


def _partner(row: Mapping[str, Any], value: str) -> str:
    """Return ``812 (0.93, 0.91; r=0.88, J=0.70)``: the matched partner with both cosines and the
    agreement of the activations, and a star if shared; then the latent that is nearest by both
    cosines, if that is not the partner."""
    if pd.isna(row[f"partner_{value}"]):  # its own run
        return ""
    matched, best = int(row[f"partner_{value}"]), int(row[f"best_{value}"])
    if matched < 0 and best < 0:
        return "none"
    agreement = ", ".join(
        f"{letter}={format_number(row[f'{name}_{value}']).replace(' ', '')}"
        for letter, name in (("r", "pearson"), ("J", "jaccard"))
    )
    words = (
        _with_cosines(row, "cosine", matched, value, f"; {agreement}") if matched >= 0 else "none"
    )
    words += " *" if row[f"shared_{value}"] else ""
    return (
        words if best == matched else f"{words}; {_with_cosines(row, 'best_cosine', best, value)}"
    )


def _with_cosines(
    row: Mapping[str, Any], name: str, latent: int, value: str, more: str = ""
) -> str:
    both = (format_number(row[f"{name}_{kind}_{value}"]) for kind in ("encoder", "decoder"))
    return f"{latent} ({', '.join(both)}{more})"


def _alike(frame: pd.DataFrame, result: CellResult) -> tuple[str, str]:
    """Return a sentence with the number of shared matches that fire alike, empty if r of
    none is defined, and one that explains r and J, or why there are none."""
    tokens, reason = activations_of(result)
    if reason:
        return "", f"r and J of activations are {MISSING}: they were not compared: {reason}."
    seeds = [v for v in result.runs["seed"].astype(str) if f"pearson_{v}" in frame]
    # A latent of that run itself has no entry.
    shared = np.array([frame[f"shared_{v}"].eq(True).to_numpy() for v in seeds])
    r = np.array([_numbers(frame, f"pearson_{v}") for v in seeds])[shared]
    known, alike = int((~np.isnan(r)).sum()), int((r >= ALIKE).sum())
    unknown = f", {r.size - known} undefined" if known < r.size else ""
    return (
        f" **{alike} of {known} shared matches whose r is defined fire alike** (r at least "
        f"{ALIKE:g}{unknown}); similar rows alone do not prove it."
        if known
        else "",
        f"**r** is the correlation of both latents' activations and **J** the overlap (Jaccard) of "
        f"the tokens on which they fire, on {tokens:,} held-out tokens; {MISSING} if a latent is "
        "constant there, for example never fires.",
    )


def _numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    return frame[name].to_numpy(dtype=np.float64)


def _notes(frame: pd.DataFrame, result: CellResult) -> list[str]:
    settings, n = result.settings, len(frame)
    shared, others = (_numbers(frame, name) for name in ("shared_with", "others"))
    every, none = int((shared == others).sum()), int((shared == 0).sum())

    def mean(name: str) -> float:
        return float(_numbers(frame, name).mean())

    found = float((shared / others).mean())
    null = null_text(mean("null_shared_fraction"), result.null_simulated_latents)
    alike, of_activations = _alike(frame, result)
    notes = [
        f"**{every} of {n} latents are shared with all other runs ({result.n_seeds - 1}), {none} "
        f"with none.** On average a latent is shared with {format_number(found)} of the other "
        "runs; for comparison, latents of the same dictionary that fire as often are shared with "
        f"{format_number(mean('decile_shared'))}, all latents of the dictionary with "
        f"{format_number(mean('dictionary_shared'))}, random rows with {null}. (Matched "
        f"random rows have a cosine of {format_number(mean('null_cosine'))}.){alike}",
        "**shared with**: number of other runs in which the matchings by encoder and by decoder "
        "give the latent the same partner, with both cosines at least "
        f"{settings.threshold:g}. **reproducibility**: probability that one more "
        f"{settings.pair_words} shares the latent, with the {settings.confidence:.0%} interval of "
        "a beta distribution. **same firing**: mean shared fraction of the latents in the same "
        "decile of firing.",
        f"The column of each other {settings.pair_words} gives the match by decoder (cosine by "
        f"encoder, by decoder; r, J), with * if the latent is shared. {of_activations} If another "
        "latent has a larger minimum of both cosines, the one with the largest follows, even if it "
        "is matched to another latent.",
    ]
    silent = _numbers(frame, "latent")[_numbers(frame, "live") == 0]
    if len(silent):
        listed = ", ".join(f"{latent:.0f}" for latent in silent)
        notes.append(
            f"**not live**: {listed}: fewer than {settings.live_at_least} firings in "
            f"{result.held_out_tokens:,} held-out tokens; **same firing** is then the mean over "
            "latents that are not live."
        )
    return notes
