"""``reseed check LATENTS.csv sae=...``: check whether named latents replicate in other seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reseed.cli import train
from reseed.cli.arguments import check_parser
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import Launch, Plan, make_plan
from reseed.errors import ConfigError, ReseedError, did_you_mean
from reseed.store.runs import Run
from reseed.system.console import say

if TYPE_CHECKING:
    from reseed.compare.cell import CellResult
    from reseed.compare.replication import BothRows, Named

DEFAULT = "comparison=seeds"
FIRST_SEED = "0"


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    own, rest = check_parser().parse_known_args(list(arguments))
    line = CommandLine("check", rest)
    files = [word for word in line.overrides if _is_file(word)]
    line.overrides = [word for word in line.overrides if word not in files]
    if not any(word.startswith("comparison=") for word in line.overrides):
        line.overrides.insert(0, DEFAULT)
    named = _named(files, own.latents)
    source = Path(files[0]) if files else None
    plan = make_plan(line)
    folder = _folder(own.out, source, plan)
    cell = _cell(plan, named)
    named = [replace(one, run=cell.run_of(one).id) for one in named]
    lacking = cell.missing()
    if lacking and own.train:
        plan.write()
        jobs = [(launch.overrides, launch.jobs) for launch in plan.launches]
        train.train_jobs(line, jobs, plan.runtime, plan.sweep)
        lacking = cell.missing()
    told = [_missing_message(lacking, cell, line)] if lacking else []
    own_runs = {one.run for one in named}
    if lacking and (len(lacking) > len(cell.runs) - 2 or any(r.id in own_runs for r in lacking)):
        raise ReseedError(told[0])
    _check(plan, cell, named, folder, told)
    return 1 if lacking else 0


def _is_file(word: str) -> bool:
    """Return True if a word is not an override, and so names the list of latents."""
    return Path(word).is_file() or ("=" not in word and not word.startswith(("~", "+")))


def _named(files: Sequence[str], listed: str | None) -> list[Named]:
    """Read the latents from the file or from the command line."""
    from reseed.compare.replication import Named, parse_index, read_named

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
    from reseed.report.replication import CHECK_FILES

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


@dataclass(frozen=True)
class _Cell:
    """The cell of a comparison that the named latents belong to.

    Attributes:
        axes: the cell's values of the unpaired axes.
        runs: value of the paired axis → run.
    """

    launch: Launch
    axes: dict[str, str]
    runs: dict[str, Run]

    @property
    def name(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.axes.items()) or "all runs"

    def missing(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.finished]

    def run_of(self, one: Named) -> Run:
        """Return the run of a latent: the named run, else that of seed 0, else the first."""
        axis = str(self.launch.arm.pair_by)
        by_id = {run.id: run for run in self.runs.values()}
        seeds = ", ".join(self.runs)
        if one.seed and one.seed not in self.runs:
            raise ReseedError(
                f"{one.where}: there is no {axis} {one.seed} in the comparison; there are {seeds}"
            )
        if not one.run:
            default = FIRST_SEED if FIRST_SEED in self.runs else next(iter(self.runs))
            return self.runs[one.seed or default]
        run = by_id[Path(one.run).name]
        of_seed = self.runs[one.seed] if one.seed else run
        if of_seed.id != run.id:
            raise ReseedError(
                f"{one.where}: the run of {axis} {one.seed} is {of_seed.id}; got {run.id}"
            )
        return run


def _cell(plan: Plan, named: Sequence[Named]) -> _Cell:
    """Return the cell that all named latents belong to."""
    cells = _cells(plan)
    runs = {run.id: cell for cell in cells for run in cell.runs.values()}
    wanted: dict[int, _Cell] = {}
    for one in named:
        name = Path(one.run).name if one.run else ""
        if name and name not in runs:
            raise ReseedError(
                f"{one.where}: there is no run {one.run} in the comparison."
                f"{did_you_mean(name, runs)} `reseed status` lists the runs"
            )
        if name:
            wanted[id(runs[name])] = runs[name]
    if len(wanted) == 1 and all(one.run for one in named):
        (cell,) = wanted.values()
    elif len(cells) == 1:
        (cell,) = cells
    else:
        names = "; ".join(cell.name for cell in cells)
        raise ReseedError(
            f"the comparison has {len(cells)} cells ({names}), and the latents must be of one: "
            "give each axis one value, or name runs of one cell in a column `run`"
        )
    return cell


def _cells(plan: Plan) -> list[_Cell]:
    found: dict[tuple[tuple[str, str], ...], _Cell] = {}
    for launch in plan.launches:
        arm = launch.arm
        settings = plan.settings.of_arm(arm.name)
        if not settings.pairs_are_a_sample:
            raise ConfigError(
                "{key} must be seed (or dataset.order_seed) to check latents, because a latent "
                f"replicates across seeds of one SAE; got {settings.pair_words}",
                "comparison.pair_by",
            )
        for job, place in zip(launch.jobs, launch.places, strict=True):
            axis = str(arm.pair_by)
            axes = {name: value for name, value in place.items() if name != axis}
            cell = found.setdefault(tuple(axes.items()), _Cell(launch, axes, {}))
            cell.runs[place[axis]] = job.resolved.run(plan.store)
    return list(found.values())


def _missing_message(lacking: Sequence[Run], cell: _Cell, line: CommandLine) -> str:
    """Return the message that names the missing runs and the command that trains them."""
    names = ", ".join(f"{run.id} ({run.status})" for run in lacking)
    command = shlex.join(["reseed", "run", *line.config_flags, *line.overrides])
    return (
        f"{len(lacking)} of {len(cell.runs)} runs are not finished: {names}. Train them with "
        f"--train, or with: {command}"
    )


def _check(
    plan: Plan, cell: _Cell, named: Sequence[Named], folder: Path, told: Sequence[str]
) -> None:
    """Compare the cell if necessary, look the latents up, and write and print the result."""
    from reseed.compare.cell import CellResult, cell_settings
    from reseed.compare.replication import replication_table
    from reseed.report.replication import check_table, print_check, write_check
    from reseed.sae.checkpoint import load_sae
    from reseed.study.compare import compare_cell_of

    plan.write()
    settings = plan.settings.of_arm(cell.launch.arm.name)
    compare_cell_of(plan.sweep, cell.axes, settings, plan.runtime)
    result: CellResult = CellResult.read(plan.sweep.cell_folder(cell.axes))
    runs = {run.id: run for run in cell.runs.values()}

    def rows(run: str) -> BothRows:
        sae = load_sae(runs[run].path)
        return sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()

    frame = replication_table(result, named, rows)
    finished = [run for run in runs.values() if run.finished]
    words = check_table(frame, result, cell_settings(finished, cell.axes), told)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_check(frame, words, folder)
    print_check(words)
    say(f"{folder}/: {', '.join(file.name for file in files)}")
