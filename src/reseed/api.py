"""The Python API: what the command line does, as functions. `reseed` exports them.

    study = reseed.compose("comparison=quickstart", "training.tokens=300_000")
    result = study.run()

Overrides are those of the command line, and so are the options, defaults and errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed import activations, sae
from reseed.activations.found_model import FoundModel
from reseed.activations.language_model import LanguageModel
from reseed.activations.stored import Shards
from reseed.activations.stored_files import COPIES, is_float, write_tensor, wrong_dtype
from reseed.activations.synthetic.surrogate import surrogate_label
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.hydra_app import CommandLine, override, parse, sweeps
from reseed.cli.plan import make_plan, plan_runs, study_of, take_evaluations
from reseed.cli.tune import searches
from reseed.errors import ConfigError, ReseedError
from reseed.experiment import Experiment, experiment_from
from reseed.experiment.resolve import find_model
from reseed.store.find import find_sweep
from reseed.store.runs import Run
from reseed.study.result import StudyResult, read_result
from reseed.study.study import Study
from reseed.system.console import messages_to
from reseed.system.devices import pick_device
from reseed.system.environment import derived_data, derived_folder
from reseed.train.config import RuntimeConfig

Activations = Tensor | np.ndarray


def compose(
    *overrides: str,
    activations: Activations | Sequence[Activations] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Study:
    """Compose and check a study from the overrides of the command line.

    With ``comparison=`` the study is that of ``reseed run``; otherwise its runs are trained and not
    compared, as by ``reseed train``, and by ``reseed train -m`` if an override lists values
    (``seed=0,1,2``). Nothing is trained or written until a method of the study is called.

    Args:
        overrides: for example ``"comparison=seeds"``, ``"sae=topk,relu"``, ``"seed=0,1,2"``.
        activations: activations to train on, in place of ``model=``: [rows, d_in] or [sequences,
            positions, d_in], or a list of these. They are copied once into the folder of derived
            data (``runtime.cache``), under a hash of their content, and must stay there until the
            study is done.
        progress: called with each message; by default messages are printed.

    Raises:
        ConfigError: a job is invalid; the message has the full key, the rule and the value.
        ReseedError: a key or an option does not exist.
    """
    line = _line(overrides)
    with messages_to(progress):
        if activations is not None:
            line = _line([*overrides, *_from_memory(line, activations)])
        evaluations = take_evaluations(line)
        with line.composer():
            compares = any(o.key_or_group == "comparison" for o in parse(line.overrides))
            line.multirun = compares or bool(sweeps(line.overrides))
        line.command = "run" if compares else "train"
        _check_is_for_python(line)
        plan = make_plan(line) if compares else plan_runs(line)
        if plan.runtime.plan_only:
            raise ConfigError("{key} is for the command line: call Study.plan()", "plan_only")
        return study_of(line, plan, evaluations, progress)


def load_sweep(name: str | Path, sweeps: str | Path = "sweeps") -> StudyResult:
    """Read the result of a comparison from its folder.

    Args:
        name: a folder, a name in ``sweeps``, or the beginning of one.
        sweeps: the folder of the sweeps.

    Raises:
        ReseedError: nothing has this name, several have, or nothing has been compared.
    """
    sweep = find_sweep(str(name), Path(sweeps))
    if not sweep.compared:
        raise ReseedError(f"{sweep.path}: its runs have not been compared")
    return read_result(sweep)


def read_activations(
    tokens: Int[Tensor, "sequences positions"] | np.ndarray | Sequence[Sequence[int]],
    *where: str | Run,
) -> Float[Tensor, "sequences positions d_in"]:
    """Read the activations of a language model at one hookpoint, at all positions.

    The model runs in its own dtype; the activations are returned as float32 on the CPU. The last
    model stays loaded for the next call.

    Args:
        tokens: token ids of sequences of one length, including any token for the beginning of the
            text: SAEs are trained on sequences that begin with it.
        where: a run, whose SAE reads these activations; or overrides that name a model, a layer and
            a hookpoint (``"model=path"``, ``"model.path=FOLDER"``, ``"layer=2"``,
            ``"hookpoint=mlp_out"``).

    Raises:
        ConfigError: the model has no such layer or hookpoint, is not a language model, or is not
            the one that the run was trained with; or the tokens do not fit it.
    """
    if any(isinstance(one, Run) for one in where):
        if len(where) != 1:
            raise ConfigError("read_activations takes one run, or overrides; got both")
        experiment, runtime = _of_run(where[0]), RuntimeConfig()  # type: ignore[arg-type]
    else:
        line = _line([str(one) for one in where])
        with line.composer() as composed:
            experiment, runtime = experiment_from(composed(line.overrides))
    found, hook = find_model(experiment, runtime), experiment.hook
    for run in (one for one in where if isinstance(one, Run)):
        for what, fingerprint in found.fingerprints.items():
            if run.record["fingerprints"].get(what) != fingerprint:
                raise ConfigError(f"{run.path}: the {what} is not that of the run's training")
        if run.record["identity"].get("place") != found.site_identity(hook).get("place"):
            raise ConfigError(f"{run.path}: version 0.1 read another tensor as {hook}")
    if not isinstance(found, FoundModel) or experiment.surrogate == "gaussian":
        label = surrogate_label(found.label, experiment.surrogate)
        raise ConfigError(f"read_activations needs a language model; {label} has no tokens")
    found.check(hook)
    ids = _checked(tokens, found)
    batches = _loaded(found, str(pick_device(runtime.device))).activations(ids, [hook])
    return torch.cat([batch[hook].float().cpu() for batch in batches])


def _from_memory(line: CommandLine, activations: Any) -> list[str]:
    """Copy activations into the folder of derived data, and return the overrides that read them."""
    with line.composer() as composed:
        keys = [o.key_or_group for o in parse(line.overrides)]
        given = dict(zip(keys, line.overrides, strict=True))
        for key, text in given.items():
            if key.partition(".")[0] == "model" and key != "model.label":
                raise ConfigError(f"give activations= or {{key}}=, not both; got {text}", key)
        runtime = [text for key, text in given.items() if key.partition(".")[0] == "runtime"]
        chosen = composed(runtime)["runtime"].get("cache")
    try:
        with derived_data(derived_folder(chosen)) as folder:
            file = _stored(activations, folder)
    except ConfigError as error:
        raise ConfigError(error.message, error.key.replace("path", "activations")) from None
    label = [] if "model.label" in given else ["model.label=memory"]
    return ["model=activations", override("model.path", file), "model.origin=memory", *label]


def _stored(given: Any, folder: Path) -> Path:
    """Return the file of derived data that holds these activations; write it if it is missing."""
    each = given if isinstance(given, list | tuple) else [given]
    tensors = []
    for i, x in enumerate(each):
        if not isinstance(x, Tensor | np.ndarray):
            rule = "must be a tensor, an array or a list of them"
            raise ConfigError(f"{{key}} {rule}; item {i} is a {type(x).__name__}", "path")
        if isinstance(x, np.ndarray) and not is_float(x.dtype):
            raise wrong_dtype(f"item {i}", x.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # arrays that are not writable
            tensors.append((f"item {i}", torch.as_tensor(x)))
    shards = Shards.of(tensors)
    file = folder / COPIES / f"{shards.fingerprint()}.safetensors"
    if not file.is_file():
        like = shards.tensors[0]
        shape = [sum(len(x) for x in shards.tensors), *like.shape[1:]]
        write_tensor(file, shape, like.dtype, (block for _, _, block in shards.blocks()))
    return file


@lru_cache(maxsize=1)
def _loaded(found: FoundModel, device: str) -> LanguageModel:
    return LanguageModel(found, device)


def _check_is_for_python(line: CommandLine) -> None:
    if searches(line) or line.launcher[0] == SLURM:
        (text,) = [o for o in line.overrides if o.startswith(("hydra/sweeper=", "hydra/launcher="))]
        raise ConfigError(f"this works on the command line only, as `reseed {line.command}`; got "
                          f"{text}")  # fmt: skip


def _line(overrides: Sequence[str]) -> CommandLine:
    flags = [o for o in overrides if str(o).startswith("-")]
    if flags:
        raise ConfigError(f"overrides are KEY=VALUE; got the flag {flags[0]}")
    return CommandLine("run", overrides)


def _of_run(run: Run) -> Experiment:
    activations.load_all()
    sae.load_all()
    return Experiment.from_dict(run.record["experiment"])


def _checked(tokens: Any, found: FoundModel) -> Int[Tensor, "sequences positions"]:
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tokens must be sequences of one length: {error}") from None
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ConfigError(
            "tokens must be integers [sequences, positions], at least one; got "
            f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        )
    size = int(found.transformers_config.get_text_config().vocab_size)
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ConfigError(
            f"tokens must be from 0 to {size - 1}, the vocabulary of {found.label}; got "
            f"{int(ids.min())} to {int(ids.max())}"
        )
    if ids.shape[1] > found.context_length:
        raise ConfigError(
            f"sequences must have at most {found.context_length} positions, the context of "
            f"{found.label}; got {ids.shape[1]}"
        )
    return ids.long()
