"""Tokens and held-out activations of a sweep, FVU of all SAEs, and timing of the sweep's parts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps import ours
from sweeps.plan import Plan

POOL = 16
"""Batches of activations, used in turn to time a step."""


def prepare(plan: Plan) -> dict[str, Any]:
    """Tokenise once, into reseed's cache, and write the peers' tokens and held-out activations.

    The tokens are written in the order in which reseed's stream reads them.

    Returns:
        the model's folder, d_in, the name of its list of layers, seconds of tokenising.

    Raises:
        ValueError: the text is too short.
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from safetensors.torch import save_file

    from reseed.activations.model_source import EmbeddedModelConfig, PathModelConfig
    from reseed.activations.text import DocstringsConfig, TextFilesConfig
    from reseed.activations.token_store import Packing
    from reseed.experiment.resolve import cache_folder
    from reseed.train.config import RuntimeConfig

    torch.set_num_threads(plan.threads)
    options: dict[str, Any] = {
        "context_length": plan.context,
        "exclude_first_position": False,
        "exclude_special_tokens": False,
    }
    text = DocstringsConfig(**options)
    if plan.text is not None:
        text = TextFilesConfig(path=plan.text, **options)
    config = EmbeddedModelConfig() if plan.model == "embedded" else PathModelConfig(path=plan.model)
    cache = cache_folder(RuntimeConfig())  # the same cache as that of the command line
    started = time.perf_counter()
    found = config.resolve(cache)
    train, held_out = found.data(text, cache).stores(plan.tokens)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    packed, packed_held_out = Packing(train, text), Packing(held_out, text)
    wanted = plan.held_out // plan.context
    if packed.num_sequences < plan.sequences or packed_held_out.num_sequences < wanted:
        raise ValueError(
            f"--tokens must not exceed the {len(train):,} training tokens of the text for "
            f"{plan.label}, which also needs {plan.held_out:,} held-out tokens (there are "
            f"{len(held_out):,}); got {plan.tokens:,}"
        )
    sequences = packed.sequences(0, plan.sequences)
    Dataset.from_dict({"input_ids": sequences.astype(np.int64)}).save_to_disk(
        str(plan.folder("tokens"))
    )
    np.save(plan.folder("tokens.npy"), sequences)
    model = _model(found.folder)
    held = packed_held_out.sequences(0, wanted)
    batches = list(_activations(model, held, plan))
    save_file(
        {str(layer): torch.cat([each[layer] for each in batches]) for layer in plan.layers},
        plan.folder("held_out.safetensors"),
    )
    info = {
        "folder": str(found.folder),
        "d_in": batches[0][plan.layers[0]].shape[1],
        "layers": _layers(model)[0],
        "tokenising_s": seconds,
    }
    plan.folder("info.json").write_text(json.dumps(info))
    return info


def fvu(folders: Sequence[Path], plan: Plan) -> dict[str, Any]:
    """Measure FVU and L0 of every SAE in ``folders`` on the held-out activations.

    Returns:
        folder → SAE → the two numbers.
    """
    import torch
    from safetensors.torch import load_file

    from reseed import load_sae
    from reseed.evaluate.reconstruction import Reconstruction

    torch.set_num_threads(plan.threads)
    held_out = load_file(plan.folder("held_out.safetensors"))
    found: dict[str, Any] = {}
    for folder in folders:
        found[folder.name] = {}
        for name, path in saved(folder).items():
            measured = Reconstruction(load_sae(path))
            measured.add(held_out[name.split("-")[1].removeprefix("layer")])
            metrics = measured.metrics()
            found[folder.name][name] = {"fvu": metrics["fvu"], "l0": metrics["l0"]}
    return found


def identical(one: Path, other: Path) -> list[int]:
    """Return the number of SAEs that are bit-identical in two folders, and of those in both."""
    first, second = saved(one), saved(other)
    both = [name for name in first if name in second]
    same = [
        name
        for name in both
        if (first[name] / "sae.safetensors").read_bytes()
        == (second[name] / "sae.safetensors").read_bytes()
    ]
    return [len(same), len(both)]


def saved(folder: Path) -> dict[str, Path]:
    """Return the folder of each SAE of a contender: reseed's run folder, or written by `save`."""
    found = {path.parent.name: path.parent for path in folder.glob("*/sae.safetensors")}
    return ours.finished(folder) or found


def save(weights: Mapping[str, Mapping[str, Any]], folder: Path, plan: Plan) -> None:
    """Write a peer's SAEs in reseed's format."""
    import torch

    from reseed.sae.checkpoint import save_sae
    from reseed.sae.relu import ReLUConfig
    from reseed.sae.topk import TopKConfig

    for name, tensors in weights.items():
        config = ReLUConfig(num_latents=plan.num_latents)
        if name.startswith("topk"):
            config = TopKConfig(num_latents=plan.num_latents, k=plan.k)
        sae = config.build(tensors["W_enc"].shape[1], torch.Generator().manual_seed(0))
        sae.load_state_dict({key: value.detach() for key, value in tensors.items()})
        save_sae(sae, folder / name)


def model_pass(plan: Plan, most: int = 262_144) -> dict[str, float]:
    """Measure seconds of the bare model, up to the deepest layer, for all tokens of the plan.

    Args:
        most: number of tokens timed at most; the result is scaled up.
    """
    import numpy as np
    import torch

    torch.set_num_threads(plan.threads)
    sequences = np.load(plan.folder("tokens.npy"), mmap_mode="r")
    timed = sequences[: max(plan.batch, min(most, plan.tokens)) // plan.context]
    model = _model(json.loads(plan.folder("info.json").read_text())["folder"])
    list(_activations(model, timed[: 2 * plan.batch // plan.context], plan))
    started, used = time.perf_counter(), time.process_time()
    for _ in _activations(model, timed, plan):
        pass
    scale = plan.sequences / len(timed)
    return {
        "wall": scale * (time.perf_counter() - started),
        "cpu": scale * (time.process_time() - used),
    }


def sae_step(plan: Plan, architecture: str, repeats: int = 24) -> dict[str, float]:
    """Estimate seconds of all steps of one SAE from the median step, on the model's activations."""
    import numpy as np
    import torch
    from contenders.ours import ReseedClipped

    torch.set_num_threads(plan.threads)
    sequences = np.load(plan.folder("tokens.npy"), mmap_mode="r")
    model = _model(json.loads(plan.folder("info.json").read_text())["folder"])
    layer = plan.layers[0]
    part = sequences[: POOL * plan.batch // plan.context]
    x = torch.cat([found[layer] for found in _activations(model, part, plan)])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x *= x.shape[1] ** 0.5 / x.norm(dim=1).mean()
    batches = x.split(plan.batch)
    contender = ReseedClipped(architecture, x.shape[1], plan.num_latents)
    wall, cpu = [], []
    for turn in range(repeats + 4):
        started, used = time.perf_counter(), time.process_time()
        contender.step(batches[turn % len(batches)])
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    median = statistics.median
    return {"wall": plan.steps * median(wall[4:]), "cpu": plan.steps * median(cpu[4:])}


class _Enough(Exception):
    """Raised by the deepest layer's hook to stop the model's pass."""


def _activations(model: Any, sequences: Any, plan: Plan) -> Iterator[dict[int, Any]]:
    """Yield the outputs [tokens, D] of the plan's layers, per batch of sequences."""
    import numpy as np
    import torch

    deepest, found = max(plan.layers), {}
    handles = []
    for layer in plan.layers:

        def hook(module: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden.flatten(0, 1)
            if layer == deepest:
                raise _Enough

        handles.append(_layers(model)[1][layer].register_forward_hook(hook))
    step = plan.batch // plan.context
    try:
        with torch.inference_mode():
            for first in range(0, len(sequences), step):
                tokens = torch.from_numpy(sequences[first : first + step].astype(np.int64))
                try:
                    model(input_ids=tokens, use_cache=False)
                except _Enough:
                    yield dict(found)
    finally:
        for handle in handles:
            handle.remove()


def _model(folder: str | Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _layers(model: Any) -> tuple[str, Any]:
    """Return the name of the model's list of layers, and the list."""
    from torch import nn

    count = model.config.num_hidden_layers
    (found,) = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return found
