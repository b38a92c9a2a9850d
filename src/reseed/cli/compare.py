"""``reseed compare``: match trained runs cell by cell, and write the tables of the comparison.

``reseed compare sources=[a,b,c]`` compares existing SAEs by their weights, without a model. With
``model=``, ``dataset=``, ``layer=`` or ``hookpoint=`` it also measures the SAEs on activations: it
adds the missing runs of `sae=pretrained` and compares the runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine, Override, override, parse
from reseed.cli.plan import make_plan, study_of
from reseed.cli.print_results import print_result
from reseed.compare.config import ComparisonConfig
from reseed.config import build
from reseed.errors import ConfigError
from reseed.report.terminal import print_summary
from reseed.store.runs import refuse_damaged
from reseed.study.sources import KEY, compare_weights
from reseed.study.study import none_finished
from reseed.system.console import say
from reseed.train.config import RuntimeConfig

_ACTIVATIONS = ("model", "dataset", "layer", "hookpoint")
"""Config groups that declare activations; any of them requests the comparison on activations."""


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("compare", arguments)))


def _main(line: CommandLine) -> int:
    from reseed.cli.cluster.command import run_on_cluster

    if any(word.partition("=")[0] == KEY for word in line.overrides):
        return compare_sources(line)
    plan = make_plan(line)
    if line.launcher[0] == SLURM:
        refuse_damaged(plan.runs)
        if not any(run.finished for run in plan.runs):
            raise none_finished(plan)
        plan.write()
        return run_on_cluster(line, plan, trains=False)
    result = study_of(line, plan).compare()
    print_result(result)
    return 0 if result.complete else 1


def compare_sources(line: CommandLine) -> int:
    """Compare the two or more SAEs that ``sources=`` lists.

    Returns:
        the exit status.

    Raises:
        ConfigError: fewer than two SAEs, a repeated SAE, or a key without effect.
    """
    from reseed.cli.cluster.command import run_on_cluster

    with line.composer() as composed:
        parsed = list(zip(parse(line.overrides), line.overrides, strict=True))
        given = [_listed(o, text) for o, text in parsed if o.key_or_group == KEY]
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
        plan = make_plan(line)
        if line.launcher[0] == SLURM:
            plan.write()
            return run_on_cluster(line, plan)
        result = study_of(line, plan).run()
        print_result(result)
        return 0 if result.complete else 1
    unheeded = sorted(key for key in rest if key.partition(".")[0] not in ("comparison", "runtime"))
    if unheeded:
        raise ConfigError(
            f"{{key}} changes nothing when only weights are compared; got {rest[unheeded[0]]}",
            unheeded[0],
        )
    declared = values["comparison"] | {"activation_tokens": 0}
    settings = build(declared, "comparison", ComparisonConfig).check_primary()
    runtime = build(values["runtime"], "runtime", RuntimeConfig)
    cells, folder, drawn = compare_weights(sources, settings, runtime)
    print_summary(cells, title="sources")
    say(f"{folder}/: summary (md, csv, tex), pairs.csv, latents.parquet, pairings.csv, matrix.csv"
        + (", figures (png, svg)" if drawn else ""))  # fmt: skip
    return 0


def _listed(parsed: Override, text: str) -> Any:
    """Return the value of ``sources=``, with unquoted words as they are written.

    Hydra reads the folder ``1e3`` as 1000.0, and ``true`` as a truth value.
    """
    value = parsed.value()
    if not isinstance(value, list) or all(isinstance(source, str) for source in value):
        return value
    words = _WORD.findall(text.partition("=")[2].strip()[1:-1])
    if len(words) != len(value):  # nested lists
        return value
    return [
        word.strip() if isinstance(source, int | float | None) else source
        for source, word in zip(value, words, strict=True)
    ]


_WORD = re.compile(r"""(?:'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^,'"])+""")
"""An element of a list: quoted strings and other characters up to a comma."""


def _checked(given: Sequence[Any]) -> list[str]:
    if len(given) != 1 or not isinstance(given[0], list):
        got = given[0] if len(given) == 1 else given
        raise ConfigError(
            f"{{key}} must be one list, as in {KEY}=[FOLDER,hub:OWNER/NAME]; got {got}", KEY
        )
    for source in given[0]:
        if not isinstance(source, str) or not source.strip():
            raise ConfigError(f"{{key}} must list folders, files or hub:…; got {source!r}", KEY)
    sources: list[str] = given[0]
    if len(sources) < 2:
        raise ConfigError(f"{{key}} must list at least 2 SAEs; got {len(sources)}", KEY)
    if twice := [s for i, s in enumerate(sources) if s in sources[:i]]:
        raise ConfigError(f"{{key}} must list every SAE once; {twice[0]} is there twice", KEY)
    return sources
