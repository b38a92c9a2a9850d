"""``reseed check`` in words: a row per named latent, and what is to be expected of any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from reseed.atomic import atomic_write, atomic_write_text
from reseed.compare.cell import CellResult
from reseed.compare.statistics import Interval
from reseed.report.tables import markdown_table
from reseed.report.terminal import print_words
from reseed.report.wording import Wording, null_in_words, number, with_interval

FILES = ("check.csv", "check.md")


def write_check(frame: pd.DataFrame, words: Wording, folder: Path) -> list[Path]:
    """Write `FILES` into ``folder``, each whole or not at all."""
    table, text = (folder / name for name in FILES)
    atomic_write(table, lambda p: frame.to_csv(p, index=False))
    parts = ("# Do these latents replicate?", words.caption, markdown_table(words))
    atomic_write_text(text, "\n\n".join(parts) + "\n")
    return [table, text]


def print_check(words: Wording, console: Console | None = None) -> None:
    """Print the table."""
    print_words(words, console or Console(), "Do these latents replicate?")


def check_words(
    frame: pd.DataFrame, result: CellResult, knobs: Mapping[str, Any], lacking: Sequence[str] = ()
) -> Wording:
    """The table of `compare.named.replication`.

    Args:
        knobs: of the cell.
        lacking: lines on runs that are not there.
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
        "alike",
        *(f"{axis} {value}" for value in shown),
    )
    table = tuple(
        (
            str(row["latent"]),
            *(str(row[name]) for name in named),
            *([str(row["seed"])] if several else []),
            f"{row['firing']:,}",
            f"{row['shared_with']} of {row['others']}",
            with_interval(_reproducibility(row)),
            number(row["decile_shared"]),
            *(_partner(row, value) for value in shown),
        )
        for row in rows
    )
    constant = [f"{k}={v}" for k, v in knobs.items()]
    own = [] if several else [f"latents of {axis} {rows[0]['seed']}: {rows[0]['run']}"]
    count = 1 + len(named) + several
    caption = " · ".join([*constant, *own])
    return Wording(header, table, count, caption, (*_notes(frame, result), *lacking))


def _reproducibility(row: Mapping[str, Any]) -> Interval:
    ends = row["reproducibility_low"], row["reproducibility_high"]
    return Interval(row["reproducibility"], *ends, None, row["others"])


def _partner(row: Mapping[str, Any], value: str) -> str:
    """``812 (0.93, 0.91)``, both cosines of the matched partner, with a star if shared; and the
    latent that is nearest by both, where that is another."""
    if pd.isna(row[f"partner_{value}"]):  # its own run
        return ""
    matched, best = int(row[f"partner_{value}"]), int(row[f"best_{value}"])
    if matched < 0 and best < 0:
        return "none"
    words = _with_cosines(row, "cosine", matched, value) if matched >= 0 else "none"
    words += " *" if row[f"shared_{value}"] else ""
    return (
        words if best == matched else f"{words}; {_with_cosines(row, 'best_cosine', best, value)}"
    )


def _with_cosines(row: Mapping[str, Any], name: str, latent: int, value: str) -> str:
    both = (number(row[f"{name}_{kind}_{value}"]) for kind in ("encoder", "decoder"))
    return f"{latent} ({', '.join(both)})"


def _numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    return frame[name].to_numpy(dtype=np.float64)


def _notes(frame: pd.DataFrame, result: CellResult) -> list[str]:
    settings, n = result.settings, len(frame)
    shared, others = (_numbers(frame, name) for name in ("shared_with", "others"))
    every, none = int((shared == others).sum()), int((shared == 0).sum())

    def mean(name: str) -> float:
        return float(_numbers(frame, name).mean())

    found = float((shared / others).mean())
    null = null_in_words(mean("null_shared_fraction"), result.null_simulated_latents)
    notes = [
        f"**{every} of {n} are shared with all of the other {result.n_seeds - 1}, {none} with "
        f"none.** On average they are shared with {number(found)} of the others; latents of the "
        f"same dictionary that fire as often with {number(mean('decile_shared'))}, any of "
        f"its latents with {number(mean('dictionary_shared'))}, random rows with {null}. (Matched "
        f"random rows have a cosine of {number(mean('null_cosine'))}.)",
        "**shared with**: in so many of the others both matchings, by encoder and by decoder, give "
        f"the latent the same partner, with both cosines at least {settings.threshold:g}. "
        f"**reproducibility**: how likely one more {settings.pair_words} has it, with the "
        f"{settings.confidence:.0%} interval of a beta distribution. **alike**: how much the "
        "latents in its decile of firing are shared, on average.",
        f"Under each other {settings.pair_words}: the decoder's match (cosine by encoder, by "
        "decoder), * where it is shared; then, where that is another, the latent whose smaller "
        "cosine is largest, taken or not.",
    ]
    silent = _numbers(frame, "latent")[_numbers(frame, "live") == 0]
    if len(silent):
        listed = ", ".join(f"{latent:.0f}" for latent in silent)
        notes.append(
            f"**not live**: {listed}: fewer than {settings.live_at_least} firings in "
            f"{result.held_out_tokens:,} held-out tokens; what is **alike** is not live either."
        )
    return notes
