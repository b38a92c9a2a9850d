"""Hyperparameter search with ``hydra/sweeper=optuna``, for `reseed train` and `reseed run`.

    reseed train hydra/sweeper=optuna objective=fvu sae=relu sae.target_l0=8 seed=0,1 \\
        'training.lr=tag(log, interval(1e-4, 1e-2))' hydra.sweeper.n_trials=20

Intervals, ranges and choices are searched; a list of values stays an axis of the command. A trial
runs the command with the values that Optuna proposes. Its result is the mean of the metric over the
runs (`reseed train`) or the value in the summary (`reseed run`). Finished runs are found by their
signatures, so a restarted study trains nothing twice.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from reseed.cli.hydra_app import CommandLine
from reseed.compare.registry import columns
from reseed.config import digest
from reseed.errors import ConfigError, ReseedError, did_you_mean
from reseed.system.console import say
from reseed.system.files import atomic_write_text

SWEEPER = "hydra/sweeper"
_PARAMS = "hydra.sweeper.params"
_SEARCHED = re.compile(r"^\s*(tag|interval|range|choice)\s*\(")
_OF_RUNS = ("fvu", "explained_variance", "l0", "cosine", "live_fraction", "silent_fraction",
            "dead_fraction")  # fmt: skip
"""Held-out metrics of a run that are numbers."""


def searches(line: CommandLine) -> bool:
    """Return True if the command line asks for a search."""
    chosen = [o.partition("=")[2] for o in line.overrides if o.partition("=")[0] == SWEEPER]
    return bool(chosen) and chosen[-1] == "optuna"


def tune(line: CommandLine, trial: Callable[[Sequence[str], Sequence[str]], list[float]]) -> int:
    """Run the search, and print the best trial.

    Args:
        trial: computes the objectives' values from a trial's overrides and the objectives' names.

    Returns:
        the exit status.
    """
    if find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        raise ReseedError(f"{SWEEPER}=optuna is not installed: pip install 'reseed[optuna]'")
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    names, sweeps = _objectives(line)
    hydras = [o for o in line.overrides if o.lstrip("+~").startswith("hydra")]
    given = [o for o in line.overrides if o not in hydras]
    searched = [o for o in given if _SEARCHED.match(o.partition("=")[2])]
    fixed = [o for o in given if o not in searched and not o.startswith("objective=")]
    if not searched and not any(o.partition("=")[0].startswith(_PARAMS) for o in hydras):
        raise ConfigError(
            "nothing is searched: give a key as interval(...), range(...) or choice(...), as in "
            "'training.lr=tag(log, interval(1e-4, 1e-2))'"
        )
    study = _Study(names, sweeps / f"tune-{digest([sorted(given), sorted(hydras)])}")
    values = {o.partition("=")[0]: o.partition("=")[2] for o in hydras}
    defaults = {
        "hydra.sweep.dir": str(study.folder),
        "hydra.sweeper.direction": "minimize",
        "hydra.sweeper.sampler.seed": "0",  # so that the same command proposes the same values
    }
    if len(names) > 1:
        defaults["hydra.sweeper.direction"] = f"[{','.join(['minimize'] * len(names))}]"
    hydras += [f"{key}={value}" for key, value in defaults.items() if key not in values]

    # Hydra needs the chosen options, because the searched keys may exist only in them.
    choices = [o for o in fixed if "." not in o.partition("=")[0] and not re.search(r"[,(]", o)]
    choices = [o for o in choices if o.partition("=")[0] not in ("objective", "seed", "layer")]

    def task(config: DictConfig) -> float | tuple[float, ...]:
        proposed = _proposed(choices)
        found = trial([*fixed, *proposed], names)
        study.add(proposed, found)
        return found[0] if len(found) == 1 else tuple(found)

    # Optuna gets no other swept keys, because it would search them too.
    line.launch(task, [*hydras, *choices, *searched])
    study.say_best(values.get("hydra.sweeper.direction", defaults["hydra.sweeper.direction"]))
    return 0


def of_runs(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> list[float]:
    """Return the mean of each objective over the runs of a trial."""
    return [sum(float(m[name]) for m in metrics) / len(metrics) for name in names]


def of_summary(row: dict[str, Any], names: Sequence[str]) -> list[float]:
    """Return the value of each objective in the summary of a comparison with one cell.

    Raises:
        ReseedError: the summary has no such number.
    """
    for name in names:
        if not isinstance(row.get(name), int | float):
            numbers = [n for n, value in row.items() if isinstance(value, int | float)]
            raise ReseedError(
                f"objective={name}: the summary has no such number.{did_you_mean(name, numbers)}"
            )
    return [float(row[name]) for name in names]


def _objectives(line: CommandLine) -> tuple[list[str], Path]:
    """Return the checked names of the objectives, and the folder of sweeps."""
    with line.composer() as composed:
        alone = [o for o in line.overrides if o.startswith(("objective=", "runtime"))]
        config = composed(alone)
        said = config["objective"]
    names = [str(name) for name in (said if isinstance(said, list) else [said] if said else [])]
    known = list(_OF_RUNS)
    if line.command == "run":
        known += [n for n, c in columns("pair", "").items() if c.scale in ("fraction", "cosine")]
    if not names:
        raise ConfigError(
            f"{{key}} is required with {SWEEPER}=optuna: the metric to optimise, for example fvu"
            + (" or shared_fraction" if line.command == "run" else ""),
            "objective",
        )
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{{key}} must be a metric of `reseed {line.command}`; got {name}."
                f"{did_you_mean(name, known)} Metrics: {', '.join(known[:12])}"
                + (", ..." if len(known) > 12 else ""),
                "objective",
            )
    return names, Path(config["runtime"]["sweeps"])


def _proposed(choices: Sequence[str]) -> list[str]:
    """Return the overrides of this job that Optuna proposed."""
    return [o for o in HydraConfig.get().overrides.task if o not in choices]


@dataclass
class _Study:
    """The trials so far, with their table.

    Attributes:
        names: the objectives.
        folder: the folder of trials.csv and of the files that Optuna writes.
    """

    names: Sequence[str]
    folder: Path
    trials: list[tuple[list[str], list[float]]] = field(default_factory=list)

    def add(self, proposed: Sequence[str], values: Sequence[float]) -> None:
        """Add a trial, print it and rewrite trials.csv."""
        self.trials.append((list(proposed), list(values)))
        told = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, values, strict=True))
        say(f"trial {len(self.trials)}: {' '.join(proposed)}: {told}")
        keys = [o.partition("=")[0] for o in self.trials[0][0]]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*keys, *self.names])
        for overrides, found in self.trials:
            writer.writerow([*(o.partition("=")[2] for o in overrides), *found])
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.folder / "trials.csv", text.getvalue())

    def say_best(self, direction: str) -> None:
        """Print the best trial (of a single objective) and the path of the tables."""
        if len(self.names) == 1 and self.trials:
            pick = max if "max" in direction else min
            proposed, (value,) = pick(self.trials, key=lambda trial: trial[1][0])
            say(f"best of {len(self.trials)}: {' '.join(proposed)}: {self.names[0]} {value:.4g}")
        say(f"{self.folder}/: trials.csv, optimization_results.yaml")
