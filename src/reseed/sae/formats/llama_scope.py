"""The format of Llama Scope and its library (lm_saes, Llamascopium): weights for activations that
are scaled to E‖x‖ = √D, and the mean norms that give the scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from reseed.sae.base import SAE
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import base
from reseed.sae.formats.base import Format, Imported
from reseed.sae.formats.files import Settings, Tensors, read_safetensors, read_settings

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
FIRST_CONFIG, FIRST_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NORM = "dataset_average_activation_norm"
_TOGETHER = {"batchtopk": "chooses latents within the batch, and the files store no threshold to "
             "choose them for a single token"}  # fmt: skip


@final
class LlamaScope(Format):
    """The format of Llama Scope: f = π·1[π‖d‖ > θ] (or ReLU, TopK), π = (s x) W_E + b_E,
    x̂ = (f W_D + b_D) / s, s = √D / norm.

    It is converted for raw activations: biases and thresholds, and therefore latents, are divided
    by s.
    """

    name = "llama_scope"
    layouts = ((CONFIG, WEIGHTS), (FIRST_CONFIG, FIRST_WEIGHTS))

    def folder_of(self, path: Path) -> Path | None:
        folder = super().folder_of(path)
        return folder.parent if folder is not None and path.name == "final.safetensors" else folder

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        first = not (folder / WEIGHTS).is_file()
        settings = read_settings(folder / (FIRST_CONFIG if first else CONFIG))
        file = folder / (FIRST_WEIGHTS if first else WEIGHTS)
        sizes = {"d_in": settings.size("d_model"), "num_latents": _num_latents(settings)}
        tensors = Tensors(file, read_safetensors(file), sizes)
        settings.one_of("sae_type", ("sae",), "sae")
        settings.refuse("use_glu_encoder", "reseed has no architecture with a gated linear encoder")
        points = [settings.get(f"hook_point_{side}", str, side) for side in ("in", "out")]
        scale_in, scale_out = _scales(settings, tensors, points)
        # The fold divides by the input's scale, but the reconstruction has the output's scale.
        sae = _read(settings, tensors, sizes, scale_in / scale_out).folded(scale_in)
        tensors.finish()
        transcoder = points[0] != points[1]
        notes: tuple[str, ...] = ()
        if scale_in != 1:
            notes = (f"the input scale {scale_in:.6g} is folded in: latents are in raw units",)
        if transcoder:
            notes += (f"a transcoder: it reconstructs {points[1]}",)
        metadata = {"hookpoint": points[0], "model": settings.get("model_name", str, None)}
        said = {key: value for key, value in metadata.items() if value is not None}
        return Imported(sae, said, notes, (settings.file, file), transcoder)


def _num_latents(settings: Settings) -> int:
    given = settings.get("d_sae", int, None)
    return given or int(settings.size("d_model") * settings.get("expansion_factor", float))


def _scales(settings: Settings, tensors: Tensors, points: list[str]) -> tuple[float, float]:
    """Return s of the input and of the output: √D over the mean norm of the activations."""
    kind = settings.one_of("norm_activation", ("dataset-wise", "inference"), "dataset-wise")
    stored = settings.get(NORM, dict, {})
    found: list[float] = []
    for point, side in zip(points, ("in", "out"), strict=True):
        name = f"{NORM}.{point}"
        # Both sides of an SAE are one hookpoint, whose norm is stored once.
        here = tensors.number(name) if name in tensors else None
        norm = here if here is not None else stored.get(point, stored.get(side))
        found.append(found[0] if norm is None and found and points[0] == points[1] else norm)  # type: ignore[arg-type]
    if kind == "inference":
        return 1.0, 1.0
    for norm, point in zip(found, points, strict=True):
        if not isinstance(norm, int | float) or not math.isfinite(norm) or norm <= 0:
            raise CheckpointError(
                f"{settings.file}: `{NORM}` must be above 0 at {point}, because the weights expect "
                f"scaled activations; got {norm!r}"
            )
    root = math.sqrt(settings.size("d_model"))
    return root / found[0], root / found[1]


def _read(settings: Settings, tensors: Tensors, sizes: dict[str, int], gain: float) -> SAE:
    """Build the SAE for scaled activations, its reconstruction multiplied by ``gain``."""
    taken = _parameters(tensors, sizes)
    norms = taken["W_dec"].double().norm(dim=1)
    if gain != 1:
        taken |= {name: (taken[name].double() * gain).float() for name in ("W_dec", "b_dec")}
    function = settings.one_of("act_fn", ("relu", "jumprelu", "topk", *_TOGETHER), "relu")
    if function in _TOGETHER:
        raise CheckpointError(f"{settings.file}: `act_fn` {function!r} {_TOGETHER[function]}")
    weighed = settings.get("sparsity_include_decoder_norm", bool, True)
    if function == "relu":
        return base.relu(tensors.file, taken, centred=False)
    if function == "topk":
        return base.topk(
            tensors.file,
            taken,
            settings.size("top_k"),
            centred=False,
            weigh_by_decoder_norm=weighed,
        )
    threshold = _threshold(settings, tensors)
    if weighed:
        threshold = threshold / norms
    return base.jumprelu(tensors.file, taken, threshold.float(), centred=False)


def _parameters(tensors: Tensors, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the parameters under our names; the library's own names have changed once."""
    if "W_E" in tensors:
        taken = {
            "W_enc": tensors.take("W_E", "d_in", "num_latents").T,
            "W_dec": tensors.take("W_D", "num_latents", "d_in"),
        }
        bias_in, bias_out = "b_E", "b_D"
    else:
        taken = {
            "W_enc": tensors.take("encoder.weight", "num_latents", "d_in"),
            "W_dec": tensors.take("decoder.weight", "d_in", "num_latents").T,
        }
        bias_in, bias_out = "encoder.bias", "decoder.bias"
    taken["b_enc"] = tensors.take(bias_in, "num_latents")
    there = bias_out in tensors  # `use_decoder_bias`
    taken["b_dec"] = tensors.take(bias_out, "d_in") if there else torch.zeros(sizes["d_in"])
    return taken


def _threshold(settings: Settings, tensors: Tensors) -> Tensor:
    """Return θ in float64."""
    names = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
    for name in names:
        if name in tensors:
            return tensors.take(name, "num_latents").double().exp()
    given: Any = settings.get("jump_relu_threshold", float, None)
    if given is None:
        raise CheckpointError(
            f"{tensors.file}: `{names[0]}` is missing, and {settings.file.name} has no "
            "`jump_relu_threshold` either"
        )
    return torch.full((tensors.sizes["num_latents"],), float(given), dtype=torch.float64)
