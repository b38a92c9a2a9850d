"""``reseed compare``: match the trained runs of a comparison cell by cell, and write its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine, override, parse

if TYPE_CHECKING:
    from reseed.cli.plan import Plan
    from reseed.compare.cell import CellResult
    from reseed.store.runs import Run
    from reseed.store.sweeps import Sweep


def task(config: DictConfig) -> None:
    """Compare one cell, whose runs the sweep's manifest lists: the Hydra job."""
    from hydra.core.hydra_config import HydraConfig

    from reseed.compare.config import ComparisonConfig
    from reseed.config import build
    from reseed.store.sweeps import Sweep
    from reseed.train.config import RuntimeConfig

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


def compare_cell_of(sweep: Any, axes: dict[str, str], settings: Any, runtime: Any) -> None:
    """Compare the finished runs of one cell, unless its results exist already."""
    import torch

    from reseed.compare.cell import compare_cell
    from reseed.compare.config import pair_axes
    from reseed.compare.dictionary import load_dictionaries
    from reseed.compare.matching import MatchingCache
    from reseed.compare.pairing import add_axis_columns, axis_label
    from reseed.study.compare import write_with_activations
    from reseed.system.console import counted, say, throttled_say
    from reseed.system.devices import pick_device

    rows = sweep.rows(axes)
    pairs = zip(rows, sweep.runs(**axes), strict=True)
    paired = pair_axes(settings.pair_by)
    finished = [({x: row["axes"][x] for x in paired}, run) for row, run in pairs if run.finished]
    folder = sweep.cell_folder(axes)
    name = ", ".join(f"{axis}={value}" for axis, value in axes.items()) or "all runs"
    if len(finished) < 2:
        say(f"  {name}: {len(finished)} of {len(rows)} runs finished, nothing to compare")
        return
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    runs = [run for _, run in finished]
    done = _done(folder, runs, settings)
    if done is not None:
        write_with_activations(done, runs, folder, name, runtime)
        return
    _check_weights(finished, name)
    pairs_up = counted(math.comb(len(finished), 2), "pair")
    say(f"  comparing {name}: {len(finished)} runs, {pairs_up}")
    loaded = [load_dictionaries(run, axis_label(place)) for place, run in finished]
    trained, untrained = zip(*loaded, strict=True)
    device = str(pick_device(runtime.device))
    # Matchings lie beside the sweeps, because several sweeps may share a pair.
    store = MatchingCache(sweep.path.parent / "matchings", device=device, progress=throttled_say())
    # A pretrained SAE has no known initialisation, so its cell has no untrained comparison.
    started = [one for one in untrained if one is not None]
    started = started if len(started) == len(trained) else []
    result = compare_cell(trained, started, settings, matcher=store, device=device)
    places = {run.id: place for place, run in finished}
    write_with_activations(
        replace(result, pairs=add_axis_columns(result.pairs, places, settings)),
        runs,
        folder,
        name,
        runtime,
    )


def _done(folder: Path, runs: Sequence[Run], settings: Any) -> CellResult | None:
    """Return the stored result of a cell if it has these runs and settings, else None."""
    from reseed.compare.cell import CellResult

    try:
        done = CellResult.read(folder)
    except (FileNotFoundError, ValueError):
        return None
    same_runs = done.runs["run"].tolist() == [run.id for run in runs]
    return done if same_runs and done.settings.signed() == settings.signed() else None


def is_complete(sweep: Sweep, axes: dict[str, str], settings: Any) -> bool:
    """Return True if all runs of a cell are finished and compared."""
    from reseed.compare.activations.tables import NOTE

    runs = sweep.runs(**axes)
    if not all(run.finished for run in runs):
        return False
    done = _done(sweep.cell_folder(axes), runs, settings)
    if done is None or not settings.activation_tokens:
        return done is not None
    # The note is "interrupted" if a job was stopped; any other note is a final reason.
    return NOTE in done.pairs and "interrupted" not in set(done.pairs[NOTE])


def _check_weights(runs: Sequence[tuple[dict[str, str], Run]], cell: str) -> None:
    """Raise `ReseedError` if seeds of one cell were trained with different penalty weights.

    Args:
        runs: pairs of a run's values of the paired axes, and the run.
    """
    from reseed.compare.config import REPLICATES
    from reseed.errors import ReseedError

    alike: dict[tuple[str, ...], set[float | None]] = {}
    for place, run in runs:
        chosen = tuple(value for axis, value in place.items() if axis not in REPLICATES)
        alike.setdefault(chosen, set()).add(run.record.get("penalty_weight"))
    for chosen, weights in alike.items():
        if len(weights) == 1:
            continue
        told = ", ".join(f"{w:.4g}" if w is not None else "none" for w in weights)
        cell = ", ".join([cell, *chosen])
        raise ReseedError(
            f"{cell}: its runs were trained with different penalty weights ({told}), because their "
            "calibration was lost or repeated elsewhere, so more than the seed differs. Delete the "
            "runs of one weight and train them again."
        )


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("compare", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    if line.only_shows:
        line.show(task, arguments)
        return 0
    from reseed.cli import sources
    from reseed.cli.plan import make_plan
    from reseed.errors import ReseedError

    if sources.named_in(line):
        return sources.compare_sources(line)
    plan = make_plan(line)
    if not any(run.finished for run in plan.runs):
        raise ReseedError(
            f"none of the {len(plan.runs)} runs is finished: `reseed run` with the same arguments "
            "trains them"
        )
    if line.launcher[0] == SLURM:
        from reseed.cli.cluster.command import launch

        plan.write()
        return launch(line, plan.jobs, plan.runtime, plan.sweep, plan.settings, trains=False)
    return compare_plan(line, plan)


def compare_plan(line: CommandLine, plan: Plan) -> int:
    """Launch the compare jobs of a plan, one per cell; then collect, draw and print the results.

    Returns:
        the exit status: 1 if a cell is incomplete or could not be compared.
    """
    from reseed.compare.config import pair_axes
    from reseed.study.collect import collect
    from reseed.system.console import say

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
