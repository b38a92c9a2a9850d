"""Look-up of the runs, sweeps and SAEs that a command line names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.hydra_app import CommandLine
from reseed.config import build, digest
from reseed.errors import ConfigError, ReseedError, nearest
from reseed.evaluate.base import EvaluationConfig, LoadedRun
from reseed.experiment.resolve import Resolved
from reseed.sae.base import SAE
from reseed.sae.checkpoint import WEIGHTS_FILE, load_sae, read_metadata
from reseed.store.results import EvaluationError, StoredEvaluation, folder_of
from reseed.store.runs import INITIAL_FILE, Run, RunError, RunStore
from reseed.store.sweeps import Sweep
from reseed.study.compare import held_out_settings, resolve_record
from reseed.system.console import counted
from reseed.train.config import RuntimeConfig

if TYPE_CHECKING:
    from reseed.cli.plan import Plan


# MERGED Choice of the SAEs that a command evaluates: of runs, sweeps and folders, or of declared runs.
def runtime_of(line: CommandLine) -> RuntimeConfig:
    """Build the runtime settings, whose folders hold the runs and sweeps that are named."""
    with line.composer() as composed:
        values = composed(line.overrides)
    return build(values["runtime"], "runtime", RuntimeConfig)


def find_by_name(word: str, runtime: RuntimeConfig) -> Run | Sweep | Path:
    """Find a run, a sweep, or the folder of another SAE by its path, name, or start of the name.

    Raises:
        ReseedError: nothing matches, or several names do.
    """
    for folder in (Path(word), Path(runtime.outputs) / word, Path(runtime.sweeps) / word):
        if Run(folder).exists:
            return Run(folder)
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
        if folder.is_dir() and _has_sae(folder):
            return folder
    known: dict[str, Run | Sweep] = {run.id: run for run in RunStore(runtime.outputs).runs()}
    sweeps = Path(runtime.sweeps).glob("*/manifest.jsonl")
    known |= {path.parent.name: Sweep(path.parent) for path in sorted(sweeps)}
    if name := complete_name(word, known):
        return known[name]
    raise ReseedError(
        f"there is no run, sweep or SAE {word}: no such folder, and nothing of that name in "
        f"{runtime.outputs}/ and {runtime.sweeps}/.{nearest(word, known)}"
    )


def complete_name(word: str, names: Iterable[str]) -> str | None:
    """Return the name that starts with ``word``, or None.

    Raises:
        ReseedError: several names start with it.
    """
    found = [name for name in names if name.startswith(word)]
    if len(found) > 1:
        raise ReseedError(f"{word} may be any of {', '.join(found)}: give more of the name")
    return found[0] if found else None


def _has_sae(folder: Path) -> bool:
    from reseed.sae.checkpoint import DESCRIPTION_FILE

    return (folder / DESCRIPTION_FILE).is_file()


def check_used(line: CommandLine, also: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for overrides that a command on named runs would ignore.

    Args:
        also: keys that the command uses besides those of ``runtime`` and ``hydra``.
    """
    for text in line.overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("/")[0] not in ("runtime", "hydra", *also):
            raise ConfigError(
                f"{{key}} cannot be set for named runs and sweeps: their records say what they "
                f"were trained on; got {text}",
                key,
            )


@dataclass(frozen=True)
class SavedRun:
    """An SAE to be evaluated.

    Attributes:
        folder: the folder of the run, or of an SAE that is not a run.
        resolved: the resolved experiment that the SAE was trained in.
    """

    folder: Path
    resolved: Resolved

    @property
    def id(self) -> str:
        return self.folder.name if Run(self.folder).exists else str(self.folder)

    @property
    def trained(self) -> bool:
        """True if the folder holds a finished run."""
        return Run(self.folder).finished

    @property
    def source(self) -> str:
        """Digest of all that determines the held-out activations except the hookpoint.

        SAEs with the same source are evaluated together.
        """
        identity = self.resolved.identity
        parts = [
            identity["model"],
            held_out_settings(identity["dataset"]),
            identity.get("surrogate"),
        ]
        return digest([*parts, identity["fingerprints"]])

    def result_folder(self, config: EvaluationConfig) -> Path:
        """Return the folder of an evaluation's result.

        A run implies what it was trained on. For an SAE that is not a run, the digest in the
        folder's name includes its weights and the activations it is evaluated on.
        """
        signed = config.signed()
        if not Run(self.folder).exists:
            hook = str(self.resolved.experiment.hook)
            weights = sha256((self.folder / WEIGHTS_FILE).read_bytes()).hexdigest()
            signed |= {"source": self.source, "hookpoint": hook, "weights": weights}
        return folder_of(self.folder, config.name, signed)

    def has_result(self, config: EvaluationConfig) -> bool:
        """Return True if a readable result of the evaluation exists."""
        try:
            StoredEvaluation.read(self.result_folder(config))
        except (FileNotFoundError, EvaluationError):
            return False
        return True

    def subject(self, device: str, with_untrained: bool) -> LoadedRun:
        """Load the SAE.

        Raises:
            CheckpointError: the SAE cannot be loaded.
        """
        sae = load_sae(self.folder, device)
        born = _untrained(Run(self.folder)) if with_untrained else None
        hook = self.resolved.experiment.hook
        return LoadedRun(self.id, sae, hook, born.to(device) if born else None)


def saved_run(
    folder: Path, runtime: RuntimeConfig, declared: Callable[[], Resolved] | None = None
) -> SavedRun:
    """Return the SAE in a folder with the experiment it was trained in.

    Args:
        declared: resolves the experiment that the command line declares; called for an SAE that is
            not a run.

    Raises:
        ReseedError: the model or data of a run is missing or has changed, or the width of an SAE
            differs from that of the declared activations.
    """
    run = Run(folder)
    if run.exists:
        return SavedRun(folder, resolve_record(run.record, runtime))
    assert declared is not None
    resolved, d_in = declared(), load_sae(folder).d_in
    if d_in != resolved.d_in:
        raise ReseedError(
            f"{folder}: its `d_in` (={d_in}) must be that of {resolved.experiment.hook} of "
            f"{resolved.model_label} (={resolved.d_in})"
        )
    return SavedRun(folder, resolved)


@dataclass(frozen=True)
class SelectedRuns:
    """The SAEs that a command line chooses.

    Attributes:
        folders: the folders of the available SAEs.
        lacking: one line for each run that is not finished, with its state.
        sweeps: the sweeps whose tables get the results.
    """

    runtime: RuntimeConfig
    folders: tuple[Path, ...]
    lacking: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = field(default=())

    @property
    def are_runs(self) -> bool:
        """True if every folder is a run, whose record says what it was trained on."""
        return all(Run(folder).exists for folder in self.folders)


def select_runs(words: Sequence[str], line: CommandLine) -> SelectedRuns:
    """Find the SAEs that a command line names.

    Args:
        words: folders and names; if empty, the overrides of ``line`` declare the runs.

    Raises:
        ReseedError: no SAE is available, or a word names nothing.
    """
    if words:
        found = _named(words, line)
    elif any(o.partition("=")[0] == "comparison" for o in line.overrides):
        found = _of_comparison(line)
    else:
        found = _declared(line)
    if not found.folders:
        missing = "; ".join(found.lacking)
        raise ReseedError(f"there is nothing to evaluate: no run is finished ({missing})")
    return found


def _of_comparison(line: CommandLine) -> SelectedRuns:
    from reseed.cli.plan import make_plan

    plan = make_plan(line)
    found = select_comparison_runs(plan)
    if found.folders:
        plan.write()
    return found


def select_comparison_runs(plan: Plan) -> SelectedRuns:
    """Return the finished runs of a comparison."""
    return replace(_finished(plan.runs, plan.runtime), sweeps=(plan.sweep,))


def _declared(line: CommandLine) -> SelectedRuns:
    from reseed.cli.plan import check_jobs

    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    runs = {job.resolved.signature: job.resolved.run(RunStore(runtime.outputs)) for job in jobs}
    return _finished(list(runs.values()), runtime)


def _named(words: Sequence[str], line: CommandLine) -> SelectedRuns:
    runtime = runtime_of(line)
    runs: dict[Path, Run] = {}
    saes: list[Path] = []
    sweeps: list[Sweep] = []
    for word in words:
        meant = find_by_name(word, runtime)
        if isinstance(meant, Sweep):
            sweeps.append(meant)
            runs |= {run.path: run for run in meant.runs()}
        elif isinstance(meant, Run):
            runs[meant.path] = meant
        else:
            saes.append(meant)
    found = _finished(list(runs.values()), runtime)
    if not saes:
        check_used(line, ("wait",) if line.launcher[0] == SLURM else ())
    return replace(found, folders=(*found.folders, *saes), sweeps=tuple(sweeps))


def _finished(runs: Sequence[Run], runtime: RuntimeConfig) -> SelectedRuns:
    lacking = tuple(f"{run.id}: {_state(run)}" for run in runs if not run.finished)
    return SelectedRuns(runtime, tuple(run.path for run in runs if run.finished), lacking)


def _state(run: Run) -> str:
    words = {"missing": "not trained"}
    failure = run.failure
    return f"failed ({failure['message']})" if failure else words.get(run.status, run.status)


def unfinished_lines(lacking: Sequence[str]) -> list[str]:
    """Return the message lines about runs that are not finished."""
    if not lacking:
        return []
    return [
        f"not evaluated, as not finished: {counted(len(lacking), 'run')}",
        *(f"  {x}" for x in lacking),
    ]


def _untrained(run: Run) -> SAE | None:
    """Return the SAE as it was initialised, for raw activations; None if that is not known."""
    if not run.exists:
        return None
    try:
        sae = run.initial_sae()
    except RunError:
        return None
    if (run.path / INITIAL_FILE).is_file():  # stored weights are for raw activations already
        return sae
    record, moments = run.record, run.activations()
    scale: Mapping[str, Any] = read_metadata(run.path)
    sae = sae.folded(scale["input_scale"])
    if moments is not None and record["experiment"]["training"]["b_dec_init"] != "zeros":
        import torch

        sae.initialise_b_dec(torch.from_numpy(moments["mean"]))
    return sae
