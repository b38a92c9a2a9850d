"""``reseed compare``: match trained runs cell by cell, and write the tables of the comparison.

``reseed compare sources=[a,b,c]`` compares existing SAEs by their weights, without a model. With
``model=``, ``dataset=``, ``layer=`` or ``hookpoint=`` it also measures the SAEs on activations: it
adds the missing runs of `sae=pretrained` and compares the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from reseed.cli import train
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine, override, parse
from reseed.cli.plan import Plan, make_plan
from reseed.compare.config import ComparisonConfig, pair_axes
from reseed.config import build
from reseed.errors import ConfigError, ReseedError
from reseed.store.sweeps import Sweep
from reseed.system.console import counted, say, throttled_say
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

if TYPE_CHECKING:
    from reseed.compare.cell import CellResult
    from reseed.compare.dictionary import Dictionary

KEY = "sources"
_ACTIVATIONS = ("model", "dataset", "layer", "hookpoint")
"""Config groups that declare activations; any of them requests the comparison on activations."""
_MEASURED = ("fvu", "l0", "cosine", "dead_fraction")
"""Metrics of runs on held-out tokens, which are unknown if only weights are compared."""


def task(config: DictConfig) -> None:
    """Compare one cell, whose runs the sweep's manifest lists: the Hydra job."""
    from reseed.study.compare import compare_cell_of

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
    from reseed.cli.cluster.command import run_on_cluster

    if any(word.partition("=")[0] == KEY for word in line.overrides):
        return compare_sources(line)
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
    """Launch the compare jobs of a plan, one per cell; then collect, plot and print the results.

    Returns:
        the exit status: 1 if a cell is incomplete or could not be compared.
    """
    from reseed.study.collect import collect

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
    complete = collect(plan.sweep, plan.settings)
    return 0 if complete and not errors else 1


def compare_sources(line: CommandLine) -> int:
    """Compare the two or more SAEs that ``sources=`` lists.

    Returns:
        the exit status.

    Raises:
        ConfigError: fewer than two SAEs, a repeated SAE, or a key without effect.
    """
    with line.composer() as composed:
        parsed = list(zip(parse(line.overrides), line.overrides, strict=True))
        given = [o.value() for o, _ in parsed if o.key_or_group == KEY]
        rest = {o.key_or_group: text for o, text in parsed if o.key_or_group != KEY}
        sources = _checked(given)
        for key in ("comparison", "sae", "source", "seed"):
            if key in rest:
                raise ConfigError(f"{{key}} cannot be given with {KEY}=[…]; got {rest[key]}", key)
        words = [override("", source)[1:] for source in sources]
        own = [
            "comparison=base",
            "comparison.name=sources",
            f"comparison.grid={{sae: [pretrained], source: [{', '.join(words)}]}}",
            "comparison.pair_by=source",
            *rest.values(),
        ]
        wanted = {key.partition(".")[0] for key in rest}
        values = {} if wanted & set(_ACTIVATIONS) else composed(own)
    if not values:
        line.overrides = own
        return _on_activations(line)
    unheeded = sorted(key for key in rest if key.partition(".")[0] not in ("comparison", "runtime"))
    if unheeded:
        raise ConfigError(
            f"{{key}} changes nothing when only weights are compared; got {rest[unheeded[0]]}",
            unheeded[0],
        )
    return _by_weights(sources, values)


def _checked(given: Sequence[Any]) -> list[str]:
    if len(given) != 1 or not isinstance(given[0], list):
        got = given[0] if len(given) == 1 else given
        raise ConfigError(
            f"{{key}} must be one list, as in {KEY}=[FOLDER,hub:OWNER/NAME]; got {got}", KEY
        )
    sources = [str(source) for source in given[0]]
    if len(sources) < 2:
        raise ConfigError(f"{{key}} must list at least 2 SAEs; got {len(sources)}", KEY)
    if twice := [s for i, s in enumerate(sources) if s in sources[:i]]:
        raise ConfigError(f"{{key}} must list every SAE once; {twice[0]} is there twice", KEY)
    return sources


def _on_activations(line: CommandLine) -> int:
    """Train (that is, measure) and compare the sources as runs of `sae=pretrained`."""
    plan = make_plan(line)
    plan.write()
    launches = [(launch.overrides, launch.jobs) for launch in plan.launches]
    status = train.train_jobs(line, launches, plan.runtime, plan.sweep)
    return max(status, compare_plan(line, plan))


def _by_weights(sources: Sequence[str], values: dict[str, Any]) -> int:
    from reseed.report.figures import write_figures
    from reseed.report.table_files import write_tables
    from reseed.report.terminal import print_summary

    declared = values["comparison"] | {"activation_tokens": 0}
    settings = build(declared, "comparison", ComparisonConfig).check_primary()
    runtime = build(values["runtime"], "runtime", RuntimeConfig)
    read = [_dictionary(source) for source in sources]
    for i, (one, _) in enumerate(read):
        same = [sources[k] for k, (other, _) in enumerate(read[:i]) if other.id == one.id]
        if same:
            raise ConfigError(f"{{key}}: {same[0]} and {sources[i]} are the same SAE", KEY)
    result, folder = _compared([one for one, _ in read], settings, runtime)
    knobs = {
        "sae": "|".join(dict.fromkeys(kind for _, kind in read)),
        "num_latents": "|".join(dict.fromkeys(f"{one.num_latents}" for one, _ in read)),
    }
    cells = [(knobs, result)]
    write_tables(cells, folder)
    drawn = write_figures(cells, folder)
    print_summary(cells, title="sources")
    say(f"{folder}/: summary (md, csv, tex), pairs.csv, latents.parquet, pairings.csv, matrix.csv"
        + (", figures (png, svg)" if drawn else ""))  # fmt: skip
    return 0


def _dictionary(source: str) -> tuple[Dictionary, str]:
    """Return an SAE's encoder and decoder rows, without firing counts, and its architecture."""
    from reseed.compare.dictionary import Dictionary
    from reseed.sae.checkpoint import CheckpointError
    from reseed.sae.formats import import_sae
    from reseed.sae.formats.files import fetch
    from reseed.sae.pretrained import fingerprint_of

    try:
        sae = import_sae(fetch(source)).sae
    except CheckpointError as error:
        raise ConfigError(f"{{key}}: {error}", KEY) from error
    nothing = np.zeros(sae.num_latents, dtype=np.int64)
    rows = {"encoder": sae.W_enc.detach().numpy(), "decoder": sae.W_dec.detach().numpy()}
    unknown: dict[str, float] = {name: float("nan") for name in _MEASURED}
    made = Dictionary(
        id=f"{sae.config.name}-{sae.num_latents}-{fingerprint_of(sae)}",
        seed=source,
        firing=nothing,
        held_out_tokens=0,
        dead=nothing.astype(bool),
        metrics=unknown,
        **rows,
    )
    return made, sae.config.name


def _compared(
    found: Sequence[Dictionary], settings: ComparisonConfig, runtime: RuntimeConfig
) -> tuple[CellResult, Path]:
    """Match all pairs, and write the result into the sweep folder of these SAEs and settings."""
    from reseed.compare.cell import compare_cell
    from reseed.compare.matching import MatchingCache
    from reseed.compare.pairing import add_axis_columns

    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    sweep = Sweep.of(runtime.sweeps, "sources", [one.id for one in found], settings.signed())
    say(f"comparing {counted(len(found), 'SAE')} by their weights")
    device = str(pick_device(runtime.device))
    store = MatchingCache(sweep.path.parent / "matchings", device=device, progress=throttled_say())
    result = compare_cell(found, (), settings, matcher=store, device=device)
    places = {one.id: {"source": one.seed} for one in found}
    result = replace(result, pairs=add_axis_columns(result.pairs, places, settings))
    result.write(sweep.cell_folder({}))
    return result, sweep.path
