"""Choice of the SAEs that a command evaluates: of runs, sweeps and folders, or of declared runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reseed.cli.app import CommandLine
from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.held_out import as_trained, of_data
from reseed.cli.names import check_heeded, meant_by, runtime_of
from reseed.config import ReseedError, digest
from reseed.console import counted
from reseed.evaluate.base import EvaluationConfig, Subject
from reseed.evaluations import EvaluationError, Stored, folder_of
from reseed.experiment import Resolved
from reseed.runs import INITIAL_FILE, Run, RunError, RunStore
from reseed.sae.base import SAE
from reseed.sae.checkpoint import WEIGHTS_FILE, load_sae, read_metadata
from reseed.sweeps import Sweep
from reseed.train.config import RuntimeConfig

if TYPE_CHECKING:
    from reseed.cli.plan import Plan


@dataclass(frozen=True)
class Target:
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
        parts = [identity["model"], of_data(identity["dataset"]), identity.get("surrogate")]
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
            Stored.read(self.result_folder(config))
        except (FileNotFoundError, EvaluationError):
            return False
        return True

    def subject(self, device: str, with_untrained: bool) -> Subject:
        """Load the SAE.

        Raises:
            CheckpointError: the SAE cannot be loaded.
        """
        sae = load_sae(self.folder, device)
        born = _untrained(Run(self.folder)) if with_untrained else None
        hook = self.resolved.experiment.hook
        return Subject(self.id, sae, hook, born.to(device) if born else None)


def target_of(
    folder: Path, runtime: RuntimeConfig, declared: Callable[[], Resolved] | None = None
) -> Target:
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
        return Target(folder, as_trained(run.record, runtime))
    assert declared is not None
    resolved, d_in = declared(), load_sae(folder).d_in
    if d_in != resolved.d_in:
        raise ReseedError(
            f"{folder}: its `d_in` (={d_in}) must be that of {resolved.experiment.hook} of "
            f"{resolved.model_label} (={resolved.d_in})"
        )
    return Target(folder, resolved)


@dataclass(frozen=True)
class Chosen:
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


def chosen_by(words: Sequence[str], line: CommandLine) -> Chosen:
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


def _of_comparison(line: CommandLine) -> Chosen:
    from reseed.cli.plan import make_plan

    plan = make_plan(line)
    found = chosen_of(plan)
    if found.folders:
        plan.write()
    return found


def chosen_of(plan: Plan) -> Chosen:
    """Return the finished runs of a comparison."""
    return replace(_finished(plan.runs, plan.runtime), sweeps=(plan.sweep,))


def _declared(line: CommandLine) -> Chosen:
    from reseed.cli.jobs import check_jobs

    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    runs = {job.resolved.signature: job.resolved.run(RunStore(runtime.outputs)) for job in jobs}
    return _finished(list(runs.values()), runtime)


def _named(words: Sequence[str], line: CommandLine) -> Chosen:
    runtime = runtime_of(line)
    runs: dict[Path, Run] = {}
    saes: list[Path] = []
    sweeps: list[Sweep] = []
    for word in words:
        meant = meant_by(word, runtime)
        if isinstance(meant, Sweep):
            sweeps.append(meant)
            runs |= {run.path: run for run in meant.runs()}
        elif isinstance(meant, Run):
            runs[meant.path] = meant
        else:
            saes.append(meant)
    found = _finished(list(runs.values()), runtime)
    if not saes:
        check_heeded(line, ("wait",) if line.launcher[0] == SLURM else ())
    return replace(found, folders=(*found.folders, *saes), sweeps=tuple(sweeps))


def _finished(runs: Sequence[Run], runtime: RuntimeConfig) -> Chosen:
    lacking = tuple(f"{run.id}: {_state(run)}" for run in runs if not run.finished)
    return Chosen(runtime, tuple(run.path for run in runs if run.finished), lacking)


def _state(run: Run) -> str:
    words = {"missing": "not trained"}
    failure = run.failure
    return f"failed ({failure['message']})" if failure else words.get(run.status, run.status)


def of_lacking(lacking: Sequence[str]) -> list[str]:
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
