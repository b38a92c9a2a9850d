"""Check of named latents: do they replicate in the other seeds of their SAE?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reseed.compare.cell import CellResult, cell_settings
from reseed.compare.config import ComparisonConfig
from reseed.compare.replication import BothRows, Named, replication_table
from reseed.errors import ConfigError, ReseedError, did_you_mean
from reseed.report.replication import check_table, write_check
from reseed.report.table import Table
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run
from reseed.study.compare import compare_cell_of
from reseed.study.plan import Plan

FIRST_SEED = "0"


@dataclass(frozen=True)
class ReplicationCell:
    """The cell of a comparison that the named latents belong to.

    Attributes:
        settings: the settings of the comparison.
        axis: the paired axis: ``seed``, or ``dataset.order_seed``.
        axes: the cell's values of the unpaired axes.
        runs: value of the paired axis → run.
    """

    settings: ComparisonConfig
    axis: str
    axes: dict[str, str]
    runs: dict[str, Run]

    @property
    def name(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.axes.items()) or "all runs"

    def missing(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.finished]

    def run_of(self, one: Named) -> Run:
        """Return the run of a latent: the named run, else that of seed 0, else the first."""
        axis = self.axis
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


def cell_of_latents(plan: Plan, named: Sequence[Named]) -> ReplicationCell:
    """Return the cell that all named latents belong to."""
    cells = _cells(plan)
    runs = {run.id: cell for cell in cells for run in cell.runs.values()}
    wanted: dict[int, ReplicationCell] = {}
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


def _cells(plan: Plan) -> list[ReplicationCell]:
    found: dict[tuple[tuple[str, str], ...], ReplicationCell] = {}
    for launch in plan.launches:
        assert launch.arm is not None
        settings = plan.comparison.of_arm(launch.arm.name)
        if not settings.pairs_are_a_sample:
            raise ConfigError(
                "{key} must be seed (or dataset.order_seed) to check latents, because a latent "
                f"replicates across seeds of one SAE; got {settings.pair_words}",
                "comparison.pair_by",
            )
        axis = str(launch.arm.pair_by)
        for job in launch.jobs:
            axes = {name: value for name, value in job.axes.items() if name != axis}
            cell = found.setdefault(tuple(axes.items()), ReplicationCell(settings, axis, axes, {}))
            cell.runs[job.axes[axis]] = job.resolved.run(plan.store)
    return list(found.values())


def check_latents(
    plan: Plan,
    cell: ReplicationCell,
    named: Sequence[Named],
    folder: Path,
    notes: Sequence[str] = (),
) -> tuple[Table, list[Path]]:
    """Compare the cell if necessary, look the latents up in it, and write the result.

    Args:
        named: the latents, each with the id of its run.
        folder: the folder for the files.
        notes: remarks for the table.

    Returns:
        the table, and the files written.
    """
    plan.write()
    compare_cell_of(plan.sweep, cell.axes, cell.settings, plan.runtime)
    result: CellResult = CellResult.read(plan.sweep.cell_folder(cell.axes))
    runs = {run.id: run for run in cell.runs.values()}

    def rows(run: str) -> BothRows:
        sae = load_sae(runs[run].path)
        return sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()

    frame = replication_table(result, named, rows)
    finished = [run for run in runs.values() if run.finished]
    table = check_table(frame, result, cell_settings(finished, cell.axes), notes)
    folder.mkdir(parents=True, exist_ok=True)
    return table, write_check(frame, table, folder)
