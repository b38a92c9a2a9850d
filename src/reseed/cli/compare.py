"""``reseed compare``: match the trained runs of a comparison, cell by cell; write its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from reseed.cli.app import CommandLine, override, parse
from reseed.cli.errors import reported

if TYPE_CHECKING:
    from reseed.cli.plan import Plan
    from reseed.runs import Run


def task(config: DictConfig) -> None:
    """Compare one cell: the Hydra job. It finds its runs in the sweep's manifest."""
    from hydra.core.hydra_config import HydraConfig

    from reseed.compare.config import ComparisonConfig
    from reseed.config import build
    from reseed.sweeps import Sweep

    own = HydraConfig.get()
    sweep = Sweep(Path(own.sweep.dir))
    settings = build(_plain(config.comparison), "comparison", ComparisonConfig)
    words = {key: value for key, _, value in (o.partition("=") for o in own.overrides.task)}
    axes = [axis for axis in sweep.manifest[0]["axes"] if axis != settings.pair_by]
    compare_cell_of(sweep, {axis: words[axis] for axis in axes}, settings)


def compare_cell_of(sweep: Any, axes: dict[str, str], settings: Any) -> None:
    """Compare the finished runs of one cell, unless that has been done."""
    from reseed.compare.cell import CellResult, compare_cell
    from reseed.console import say

    rows = sweep.rows(axes)
    found = sweep.runs(**axes)
    finished = [(row, run) for row, run in zip(rows, found, strict=True) if run.finished]
    folder = sweep.cell_folder(axes)
    name = ", ".join(f"{axis}={value}" for axis, value in axes.items()) or "all runs"
    if len(finished) < 2:
        say(f"  {name}: {len(finished)} of {len(rows)} runs finished, nothing to compare")
        return
    ids = [run.id for _, run in finished]
    try:
        done = CellResult.read(folder)
        if done.runs["run"].tolist() == ids and done.settings.signed() == settings.signed():
            return
    except (FileNotFoundError, ValueError):
        pass
    pairs = math.comb(len(finished), 2)
    say(f"  comparing {name}: {len(finished)} runs, {pairs} pairs")
    trained, untrained = zip(
        *(dictionaries(run, row["axes"][settings.pair_by]) for row, run in finished), strict=True
    )
    compare_cell(trained, untrained, settings).write(folder)


def dictionaries(run: Run, seed: str) -> tuple[Any, Any]:
    """What the comparison needs of a run: its trained self, and its untrained self."""
    from dataclasses import replace

    import torch

    from reseed.compare.dictionary import Dictionary
    from reseed.sae import load_all
    from reseed.sae.base import SAEConfig

    load_all()
    record, metrics, latents = run.record, run.metrics, run.latents()
    sae = run.sae()
    trained = Dictionary(
        id=run.id,
        seed=seed,
        encoder=sae.W_enc.detach().numpy(),
        decoder=sae.W_dec.detach().numpy(),
        firing=latents["firing"],
        held_out_tokens=metrics["tokens"],
        dead=latents["tokens_since_fired"] >= record["dead_after_tokens"],
        metrics={k: metrics[k] for k in ("fvu", "l0", "cosine", "dead_fraction")},
    )
    # The start is a pure function of the record, so it is made again instead of being stored.
    config = SAEConfig.from_dict(record["experiment"]["sae"], "sae")
    start = config.build(record["d_in"], torch.Generator().manual_seed(record["init_seed"]))
    untrained = replace(
        trained, encoder=start.W_enc.detach().numpy(), decoder=start.W_dec.detach().numpy()
    )
    return trained, untrained


def main(arguments: Sequence[str]) -> int:
    return reported(lambda: _main(CommandLine("compare", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    if line.only_shows:
        line.show(task, arguments)
        return 0
    from reseed.cli.plan import make_plan
    from reseed.config import ReseedError

    plan = make_plan(line)
    missing = [run for run in plan.runs if not run.finished]
    if missing:
        raise ReseedError(
            f"{len(missing)} of {len(plan.runs)} runs are not there yet (the first: "
            f"{missing[0].id}, {missing[0].status}): `reseed run` with the same arguments trains "
            "them"
        )
    compare_plan(line, plan)
    return 0


def compare_plan(line: CommandLine, plan: Plan) -> None:
    """Launch the compare jobs of a plan, one per cell; then collect, draw and print."""
    from reseed.cli.collect import collect

    plan.sweep.write_manifest(plan.jobs, plan.store, plan.axes)
    cells = [o for o in plan.overrides if parse([o])[0].get_key_element() != plan.settings.pair_by]
    # A sweep of one job is still a sweep: the job reads its folder from hydra.sweep.dir.
    line.launch(task, [*cells, override("hydra.sweep.dir", plan.sweep.path)], multirun=True)
    collect(plan.sweep, plan.settings)


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)
