"""Training with reseed through its command line: ``reseed train [-m] …``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweeps.plan import START, WARM_UP, Plan, Sae
from sweeps.processes import Clock


def arguments(plan: Plan, saes: Sequence[Sae], outputs: Path) -> list[str]:
    """Return the command line that trains ``saes``.

    ``saes`` must be all combinations of its architectures, layers and seeds.
    """
    swept = {
        "sae": dict.fromkeys(sae.architecture for sae in saes),
        "layer": dict.fromkeys(sae.layer for sae in saes),
        "seed": dict.fromkeys(sae.seed for sae in saes),
    }
    model = ["model=embedded"] if plan.model == "embedded" else ["model=path", _path("model", plan)]
    text = ["dataset=docstrings"]
    if plan.text is not None:
        text = ["dataset=text_files", _path("dataset", plan)]
    return [
        "train",
        *(["-m"] if len(saes) > 1 else []),
        *model,
        *text,
        *(f"{key}={','.join(map(str, values))}" for key, values in swept.items()),
        "training=standard",
        f"training.tokens={plan.tokens}",
        f"training.batch_size={plan.batch}",
        f"training.lr={plan.lr}",
        f"training.warmup_fraction={WARM_UP}",
        f"training.decay_fraction={1 - WARM_UP}",
        f"sae.num_latents={plan.num_latents}",
        "sae.aux_alpha=0",
        f"sae.encoder_init_scale={START}",
        f"dataset.context_length={plan.context}",
        # The peers cannot leave out the same positions, so every token is used.
        "dataset.exclude_first_position=false",
        "dataset.exclude_special_tokens=false",
        f"dataset.held_out_tokens={plan.batch}",  # cannot be turned off
        f"runtime.threads={plan.threads}",
        "runtime.progress=false",
        "runtime.prefetch=false",  # the same number of threads as the peers
        "runtime.device=cpu",
        "runtime.checkpoint_every_s=1000000",
        f"runtime.outputs='{outputs}'",
        f"runtime.sweeps='{outputs}-sweeps'",
    ]


def train(plan: Plan, saes: Sequence[Sae], outputs: Path, clock: Clock) -> dict[str, Any]:
    """Run the command in the current process; ``outputs`` must not contain these runs yet."""
    from reseed.cli.main import main

    with timed(clock):
        try:
            main(arguments(plan, saes, outputs))
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"reseed ended with status {ended.code}") from ended
    runs = finished(outputs)
    missing = [sae.name for sae in saes if sae.name not in runs]
    if missing:
        raise RuntimeError(f"not trained: {', '.join(missing)}")
    groups = {json.dumps(_record(path).get("group")) for path in runs.values()}
    return {"groups": len(groups)}


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Time the training inside the context.

    It begins with the first pass of a language model with weights, which computes the first chunk
    of activations, and ends with the last return of `lightning.Trainer.fit`.
    """
    import lightning as L
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers import PreTrainedModel

    def seen(module: Any, inputs: Any) -> None:
        # A pass on the meta device only determines shapes.
        real = isinstance(module, PreTrainedModel) and not next(module.parameters()).is_meta
        if real:
            clock.begin()
            handle.remove()

    fit = L.Trainer.fit

    def fit_and_end(*args: Any, **options: Any) -> Any:
        try:
            return fit(*args, **options)
        finally:
            clock.end()

    handle = register_module_forward_pre_hook(seen)
    L.Trainer.fit = fit_and_end
    try:
        yield
    finally:
        L.Trainer.fit = fit
        handle.remove()


def finished(outputs: Path) -> dict[str, Path]:
    """Return the finished runs in a folder, by the SAE's name."""
    found = {}
    for path in sorted(outputs.glob("*/run.json")):
        record = _record(path.parent)
        if record["status"] == "finished":
            experiment = record["experiment"]
            architecture = experiment["sae"]["type"]
            sae = Sae(architecture, experiment["layer"], experiment["seed"])
            found[sae.name] = path.parent
    return found


def forget(outputs: Path) -> None:
    """Delete results, so that the next round trains again."""
    for folder in (outputs, Path(f"{outputs}-sweeps")):
        shutil.rmtree(folder, ignore_errors=True)


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())


def _path(key: str, plan: Plan) -> str:
    path = plan.model if key == "model" else plan.text
    return f"{key}.path='{path}'"
