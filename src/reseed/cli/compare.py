"""``reseed compare``: match the trained runs of a comparison cell by cell, and write its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from reseed.cli.cluster.command import run_on_cluster
from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine, override, parse
from reseed.cli.plan import Plan, make_plan
from reseed.compare.config import ComparisonConfig, pair_axes
from reseed.config import build
from reseed.errors import ReseedError
from reseed.store.sweeps import Sweep
from reseed.study.collect import collect
from reseed.study.compare import compare_cell_of
from reseed.system.console import say
from reseed.train.config import RuntimeConfig


def task(config: DictConfig) -> None:
    """Compare one cell, whose runs the sweep's manifest lists: the Hydra job."""
    own = HydraConfig.get()
    sweep = Sweep(Path(own.sweep.dir))
    settings = ComparisonConfig.from_dict(sweep.settings, "comparison")
    words = {key: value for key, _, value in (o.partition("=") for o in own.overrides.task)}
    name = config.comparison.get("arm", "")
    settings = settings.of_arm(name)
    arm = {"arm": name} if name else {}
    runtime = build(OmegaConf.to_container(config.runtime, resolve=True), "runtime", RuntimeConfig)  # type: ignore[arg-type]
    (own_arm,) = settings.each_arm()
    axes = arm | {axis: words[axis] for axis in own_arm.cell_axes}
    compare_cell_of(sweep, axes, settings, runtime)


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("compare", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    plan = make_plan(line)
    if not any(run.finished for run in plan.runs):
        raise ReseedError(
            f"none of the {len(plan.runs)} runs is finished: `reseed run` with the same arguments "
            "trains them"
        )
    if line.launcher[0] == SLURM:
        plan.write()
        return run_on_cluster(
            line, plan.jobs, plan.runtime, plan.sweep, plan.settings, trains=False
        )
    return compare_plan(line, plan)


def compare_plan(line: CommandLine, plan: Plan) -> int:
    """Launch the compare jobs of a plan, one per cell; then collect, draw and print the results.

    Returns:
        the exit status: 1 if a cell is incomplete or could not be compared.
    """
    plan.write()
    # Even a single job is launched as a multirun, because it reads hydra.sweep.dir.
    folder = override("hydra.sweep.dir", plan.sweep.path)
    errors: list[Exception] = []
    for launch in plan.launches:
        arm = launch.arm
        paired = pair_axes(arm.pair_by)
        cells = [o for o in launch.overrides if parse([o])[0].key_or_group not in paired]
        which = [override("++comparison.arm", arm.name)] if arm.name else []
        errors += line.launch(task, [*cells, *which, folder], multirun=True)
    for error in errors:
        say(f"not compared: {error}")
    write_with_activations = collect(plan.sweep, plan.settings)
    return 0 if write_with_activations and not errors else 1
