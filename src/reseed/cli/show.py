"""``reseed show RUN LATENT[,LATENT...]``: show the contexts in which latents fire, the tokens that
they promote, their neighbours, and their matches in other seeds.

The command reads files of ``evaluation=contexts`` and of comparisons; it loads no model.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from reseed.cli.arguments import check_used, own_words, runtime_of
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError, ReseedError
from reseed.report.latent_view import (
    FILE,
    PAIRS,
    LatentView,
    Partner,
    matches_of,
    print_latent,
    print_partner,
)
from reseed.store.contexts import Contexts
from reseed.store.find import find_by_name
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.system.console import console
from reseed.system.integrity import check_record, read_record
from reseed.train.config import RuntimeConfig

_DIGITS = 18
PARTNERS = "--partners"
"""A flag that is not Hydra's: also show the matched latents of the other runs."""


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    words, rest = own_words([word for word in arguments if word != PARTNERS])
    line = CommandLine("show", rest)
    if len(words) < 2:
        raise ConfigError(
            "reseed show takes a run and its latents, for example reseed show RUN 3,17; got "
            f"{' '.join(words) or 'nothing'}"
        )
    runtime = runtime_of(line)
    check_used(line)
    latents = [_index(part.strip()) for word in words[1:] for part in word.split(",")]
    run = _run(words[0], runtime)
    contexts = _contexts(run, line)
    for i, shown in enumerate(_shown(run, contexts, latents, runtime)):
        if i:
            console().print()
        print_latent(shown, console())
        if PARTNERS in arguments and shown.matches is not None:
            for partner in shown.matches.partners:
                console().print()
                print_partner(partner, _of_partner(partner, run), console())
    return 0


def _index(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < _DIGITS):
        raise ConfigError(f"reseed show: a latent is an integer, at least 0; got {word[:80]!r}")
    return int(word)


def _run(word: str, runtime: RuntimeConfig) -> Path:
    """Return the folder of the run or SAE that a word names."""
    meant = find_by_name(word, runtime.outputs, runtime.sweeps)
    if isinstance(meant, Run):
        check_record(meant.path / "run.json", quick=True)
    if isinstance(meant, Sweep):
        names = ", ".join(dict.fromkeys(run.id for run in meant.runs()))
        raise ReseedError(f"{word} is a sweep, but latents belong to a run: name one of {names}")
    return meant if isinstance(meant, Path) else meant.path


def _contexts(run: Path, line: CommandLine) -> Contexts:
    contexts = Contexts.of(run)
    if contexts is None:
        with suppress(FileNotFoundError):  # a folder that is not a run's
            if "tokenizer" not in (read_record(run / "run.json").get("fingerprints") or {}):
                raise ReseedError(f"{run.name} has no contexts, because its activations are not "
                                  "those of a language model on a text")  # fmt: skip
        command = ["reseed", "evaluate", str(run), "evaluation=contexts", *line.overrides]
        raise ReseedError(f"{run.name} has no contexts yet; make them with: {shlex.join(command)}")
    return contexts


def _shown(
    run: Path, contexts: Contexts, latents: Sequence[int], runtime: RuntimeConfig
) -> list[LatentView]:
    """Return the latents, with their matches in the newest comparison that contains the run."""
    described = [contexts.latent(latent) for latent in latents]
    sweep, name = _newest_sweep(run, runtime), run.resolve().name
    if sweep and (damage := Sweep(sweep).damaged_output(FILE, PAIRS)):
        raise ReseedError(f"{damage}. `reseed report {sweep}` writes it again")
    if sweep and (stale := Sweep(sweep).stale_cell(Run(run))):
        raise ReseedError(
            f"{stale} was compared before {name} was trained again: `reseed compare` with the "
            "arguments of the sweep compares it again"
        )
    matches = matches_of(sweep, name, latents) if sweep else {}
    return [LatentView(name, contexts, one, matches.get(one.latent)) for one in described]


def _newest_sweep(run: Path, runtime: RuntimeConfig) -> Path | None:
    tables = [
        path.parent / FILE
        for path in Path(runtime.sweeps).glob("*/manifest.jsonl")
        if os.path.lexists(path.parent / FILE)
        and any(own.path.resolve() == run.resolve() for own in Sweep(path.parent).runs())
    ]
    return max(tables, key=lambda path: path.lstat().st_mtime_ns).parent if tables else None


def _of_partner(partner: Partner, run: Path) -> LatentView | None:
    """Return a partner with its contexts, or None if there is no partner or no contexts."""
    contexts = Contexts.of(run.resolve().parent / partner.run)
    if contexts is None or partner.latent is None:
        return None
    return LatentView(partner.run, contexts, contexts.latent(partner.latent))
