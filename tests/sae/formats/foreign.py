"""Writers of SAEs in other libraries' layouts, and the libraries' formulas in float64.

Shapes: W_enc and W_dec are [F, D] as ours; each writer transposes them as its format needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 12, 40, 4


def draws(seed: int = 0, unit: bool = False, scale: float = 1.0) -> dict[str, Tensor]:
    """Draw parameters for every architecture in float32: nonzero biases, an untied encoder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = normal(F, D)
    norms = W_dec.norm(dim=1, keepdim=True)
    return {
        "W_enc": normal(F, D) / D**0.5,
        "W_dec": W_dec / norms if unit else W_dec * 0.7,
        "b_enc": 0.2 * normal(F) * scale,
        "b_dec": 0.5 * normal(D) * scale,
        "threshold": normal(F).abs() * 0.4 * scale,
        "r_mag": 0.3 * normal(F),
        "b_mag": 0.2 * normal(F) * scale,
    }


def tokens(count: int = 64, scale: float = 1.0, seed: int = 7) -> Float[Tensor, "count d_in"]:
    return scale * torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def pre(p: dict[str, Tensor], x: Tensor, *, centred: bool) -> Tensor:
    """Return π in float64."""
    rows = x.double() - p["b_dec"].double() if centred else x.double()
    return rows @ p["W_enc"].double().T + p["b_enc"].double()


def topk(values: Tensor, k: int = K) -> Tensor:
    """Keep the k largest of ReLU(values) and set the rest to 0."""
    positive = values.relu()
    found = positive.topk(k, dim=1)
    return torch.zeros_like(positive).scatter(1, found.indices, found.values)


def jump(values: Tensor, threshold: Tensor) -> Tensor:
    return values.relu() * (values > threshold.double())


def decoded(p: dict[str, Tensor], latents: Tensor) -> Tensor:
    return latents @ p["W_dec"].double() + p["b_dec"].double()


def assert_same(sae: Any, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    """Assert equality within 1e-5 of the largest value, and the same active latents."""
    out = sae(x)
    for name, ours, theirs in (
        ("latents", out.latents, latents),
        ("encode", sae.encode(x), latents),
        ("reconstruction", out.reconstruction, reconstruction),
    ):
        worst = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        assert worst < 1e-5, (name, worst)
    assert torch.equal(out.latents > 0, latents > 0)
    assert bool((latents > 0).any())


def write(folder: Path, config: str | None, settings: dict[str, Any] | None, **files: Any) -> Path:
    """Write a folder with a JSON file and files of tensors (``sae__safetensors`` names one)."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / config).write_text(json.dumps(settings))
    for name, tensors in files.items():
        file = folder / name.replace("__", ".")
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if file.suffix == ".safetensors":
            save_file(whole, file)
        elif file.suffix == ".npz":
            np.savez(file, **{key: tensor.numpy() for key, tensor in whole.items()})
        else:
            torch.save(whole, file)
    return folder


def sparsify(folder: Path, p: dict[str, Tensor], **settings: Any) -> Path:
    declared = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True,
        "num_latents": F, "k": K, "multi_topk": False, "skip_connection": False,
        "transcode": False, "d_in": D,
    } | settings  # fmt: skip
    tensors = {
        "encoder.weight": p["W_enc"],
        "encoder.bias": p["b_enc"],
        "W_dec": p["W_dec"],
        "b_dec": p["b_dec"],
    }
    tensors |= {"W_skip": p["W_skip"]} if "W_skip" in p else {}
    return write(folder, "cfg.json", declared, sae__safetensors=tensors)


def saelens(folder: Path, p: dict[str, Tensor], architecture: str, **settings: Any) -> Path:
    declared = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.3.hook_resid_post"},
    } | settings  # fmt: skip
    tensors = {"W_enc": p["W_enc"].T, "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    if architecture == "gated":
        tensors |= {"b_gate": p["b_enc"], "b_mag": p["b_mag"], "r_mag": p["r_mag"]}
    else:
        tensors["b_enc"] = p["b_enc"]
    if "jumprelu" in architecture:
        tensors["threshold"] = p["threshold"]
    tensors |= {name: p[name] for name in ("finetuning_scaling_factor", "W_skip") if name in p}
    return write(folder, "cfg.json", declared, sae_weights__safetensors=tensors)


def dictionary(folder: Path, tensors: dict[str, Tensor], kind: str, **trainer: Any) -> Path:
    declared = {"trainer": {"dict_class": kind, "lm_name": "pythia", "layer": 3, **trainer}}
    return write(folder, "config.json", declared, ae__pt=tensors)


def linear(p: dict[str, Tensor], **names: str) -> dict[str, Tensor]:
    """Return the tensors of dictionary_learning's linear classes; ``bias="b_dec"`` adds ours."""
    tensors = {"encoder.weight": p["W_enc"], "decoder.weight": p["W_dec"].T}
    return tensors | {theirs.replace("__", "."): p[ours] for theirs, ours in names.items()}


def matrices(p: dict[str, Tensor], *more: str) -> dict[str, Tensor]:
    """Return the tensors of dictionary_learning's classes of plain matrices."""
    tensors = {"W_enc": p["W_enc"].T, "W_dec": p["W_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    return tensors | {name: p[name] for name in more}


def gemma_scope(folder: Path, p: dict[str, Tensor]) -> Path:
    return write(folder, None, None, params__npz=matrices(p, "threshold"))


def gemma_scope_2(folder: Path, p: dict[str, Tensor], **settings: Any) -> Path:
    tensors = {name.lower(): tensor for name, tensor in matrices(p, "threshold").items()}
    tensors |= {"affine_skip_connection": p["W_skip"]} if "W_skip" in p else {}
    declared = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b",
        "hf_hook_point_in": "model.layers.7.output",
    } | settings
    return write(folder, "config.json", declared, params__safetensors=tensors)


def llama_scope(
    folder: Path, p: dict[str, Tensor], norms: dict[str, float] | None, **settings: Any
) -> Path:
    declared = {
        "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K,
        "hook_point_in": "blocks.9.hook_resid_post", "hook_point_out": "blocks.9.hook_resid_post",
    } | settings  # fmt: skip
    tensors = {"W_E": p["W_enc"].T, "b_E": p["b_enc"], "W_D": p["W_dec"], "b_D": p["b_dec"]}
    if declared["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = p["threshold"].log()
    for point, norm in (norms or {}).items():
        tensors[f"dataset_average_activation_norm.{point}"] = torch.tensor(norm)
    return write(folder, "config.json", declared, sae_weights__safetensors=tensors)
