"""``reseed check LATENTS.csv sae=...``: check whether named latents replicate in other seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reseed.cli.arguments import check_parser
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import make_plan, study_of
from reseed.compare.replication import Named, parse_index, read_named
from reseed.errors import ConfigError, ReseedError
from reseed.report.replication import CHECK_FILES, print_check
from reseed.store.runs import Run
from reseed.study.check import ReplicationCell, cell_of_latents, check_latents
from reseed.study.plan import Plan
from reseed.system.console import say

DEFAULT = "comparison=seeds"


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    from reseed.cli.cluster.command import run_on_cluster

    own, rest = check_parser().parse_known_args(list(arguments))
    line = CommandLine("check", rest)
    files = [word for word in line.overrides if _is_file(word)]
    line.overrides = [word for word in line.overrides if word not in files]
    if not any(word.startswith("comparison=") for word in line.overrides):
        line.overrides.insert(0, DEFAULT)
    line.typed = tuple(line.overrides)
    named = _named(files, own.latents)
    source = Path(files[0]) if files else None
    plan = make_plan(line)
    folder = _folder(own.out, source, plan)
    cell = cell_of_latents(plan, named)
    named = [replace(one, run=cell.run_of(one).id) for one in named]
    lacking = cell.missing()
    if lacking and own.train and line.launcher[0] == SLURM:
        plan.write()
        run_on_cluster(line, plan)
        lacking = cell.missing()
    elif lacking and own.train:
        study_of(line, plan).train(strict=False)
        lacking = cell.missing()
    told = [_missing_message(lacking, cell, line)] if lacking else []
    own_runs = {one.run for one in named}
    if lacking and (len(lacking) > len(cell.runs) - 2 or any(r.id in own_runs for r in lacking)):
        raise ReseedError(told[0])
    table, files = check_latents(plan, cell, named, folder, told)
    print_check(table)
    say(f"{folder}/: {', '.join(file.name for file in files)}")
    return 1 if lacking else 0


def _is_file(word: str) -> bool:
    """Return True if a word is not an override, and so names the list of latents."""
    return Path(word).is_file() or ("=" not in word and not word.startswith(("~", "+")))


def _named(files: Sequence[str], listed: str | None) -> list[Named]:
    """Read the latents from the file or from the command line."""
    if len(files) > 1:
        raise ConfigError(f"give one list of latents; got {', '.join(files)}")
    if files and listed is not None:
        raise ConfigError(f"the latents are given twice: by {files[0]} and by --latents {listed}")
    if files:
        return read_named(files[0])
    if listed is None:
        raise ConfigError(
            "no latents are given: give a csv file with a column `latent`, or --latents 3,17,250"
        )
    words = [word.strip() for word in listed.split(",")]
    return [Named(parse_index(word, "--latents"), "--latents") for word in words]


def _folder(out: str | None, source: Path | None, plan: Plan) -> Path:
    """Return the folder for results: --out, else the list's folder, else the comparison's."""
    folder = Path(out) if out else source.parent if source else plan.sweep.path
    if out and folder.exists() and not folder.is_dir():
        raise ConfigError(f"{{key}} must be a folder; got {out}, which is a file", "--out")
    for name in CHECK_FILES:
        if source and (folder / name).resolve() == source.resolve():
            raise ConfigError(
                f"{{key}}: {folder / name} is the list of latents itself, and would be "
                "overwritten: name another folder",
                "--out",
            )
    return folder


def _missing_message(lacking: Sequence[Run], cell: ReplicationCell, line: CommandLine) -> str:
    """Return the message that names the missing runs and the command that trains them."""
    names = ", ".join(f"{run.id} ({run.damage or run.status})" for run in lacking)
    command = shlex.join(["reseed", "run", *line.config_flags, *line.overrides])
    return (
        f"{len(lacking)} of {len(cell.runs)} runs are not finished: {names}. Train them with "
        f"--train, or with: {command}"
    )
