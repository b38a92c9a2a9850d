"""The format of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, version 6 and earlier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from reseed.sae.base import SAE
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import base
from reseed.sae.formats.base import TRANSCODER_NOTE, Exporting, Imported
from reseed.sae.formats.files import Settings, Tensors, read_safetensors, read_settings
from reseed.sae.formats.sparsify import refuse_weighing, without_skip
from reseed.sae.gated import Gated
from reseed.sae.topk import TopK, TopKConfig
from reseed.system.files import atomic_write_bytes, atomic_write_json

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
_TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_SITES = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "attn_z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
"""Site → the hook of TransformerLens with the same meaning: its attn_out and mlp_out, too, are what
is added to the residual stream, after any norm."""
_PER_TOKEN = "it rescales each token by its own norm, which cannot be folded into weights"
_NORMALIZED = {
    "constant_norm_rescale": _PER_TOKEN,
    "layer_norm": _PER_TOKEN,
    "covariance_whitening": "these files do not store the whitening matrix",
}
VERSION = "6.54.0"
"""The version of SAELens in whose format reseed writes."""


@final
class SAELens(Exporting):
    """The format of SAELens: standard, topk, jumprelu and gated. SAELens stores an SAE trained as
    BatchTopK or Matryoshka as a jumprelu with one threshold; reseed writes it in the same way."""

    name = "saelens"
    layouts = ((CONFIG, WEIGHTS),)
    exports: ClassVar[tuple[str, ...]] = (
        "topk", "relu", "jumprelu", "gated", "batch_topk", "matryoshka",
    )  # fmt: skip

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        settings, file = read_settings(folder / CONFIG), folder / WEIGHTS
        sizes = {"d_in": settings.size("d_in"), "num_latents": settings.size("d_sae")}
        tensors = Tensors(file, read_safetensors(file), sizes)
        declared = _architecture(settings)
        transcoder = declared in _TRANSCODERS
        architecture = _TRANSCODERS.get(declared, declared)
        centred = not transcoder and settings.get("apply_b_dec_to_input", bool, True)
        taken = _parameters(tensors, settings, transcoder)
        sae, notes = _built(architecture, settings, tensors, taken, centred)
        notes += without_skip(tensors)
        tensors.finish()
        sae, folded = _normalized(sae, settings, folder)
        notes += folded
        if settings.get("reshape_activations", str, "none") == "hook_z":
            notes += ("its input is the concatenated outputs of the heads: [..., heads × d_head]",)
        if transcoder:
            notes += (TRANSCODER_NOTE,)
        metadata = settings.get("metadata", dict, {})
        older = {k: settings.values[k] for k in ("model_name", "hook_name", "hook_point")
                 if k in settings.values}  # fmt: skip
        return Imported(sae, {**older, **metadata}, notes, (settings.file, file), transcoder)

    def _save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        own = base.state(sae)
        tensors = {"W_enc": own["W_enc"].T, "W_dec": own["W_dec"], "b_dec": own["b_dec"]}
        settings: dict[str, Any] = {
            "d_in": sae.d_in,
            "d_sae": sae.num_latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": base.is_centred(sae),
            "normalize_activations": "none",
            "reshape_activations": "hook_z" if metadata.get("site") == "attn_z" else "none",
            "metadata": {**_hook(metadata), "sae_lens_version": VERSION, "reseed": dict(metadata)},
        }
        notes: tuple[str, ...] = ()
        if isinstance(sae, TopK):
            settings |= {"architecture": "topk", **_topk_settings(sae.config)}
            tensors["b_enc"] = own["b_enc"]
        elif isinstance(sae, Gated):
            settings["architecture"] = "gated"
            tensors |= {"b_gate": own["b_enc"], "b_mag": own["b_mag"], "r_mag": own["r_mag"]}
        elif sae.config.name == "relu":
            settings["architecture"] = "standard"
            tensors["b_enc"] = own["b_enc"]
        else:
            threshold = base.thresholds(sae)
            assert threshold is not None
            settings["architecture"] = "jumprelu"
            tensors |= {"b_enc": own["b_enc"], "threshold": threshold}
            if sae.config.name != "jumprelu":
                notes = (f"sae={sae.config.name} is stored as a jumprelu, without its k",)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        atomic_write_bytes(folder / WEIGHTS, to_safetensors(whole))
        atomic_write_json(folder / CONFIG, settings)
        return notes


def _architecture(settings: Settings) -> str:
    """Return the architecture; before version 6 it could depend on the activation function."""
    declared = settings.get("architecture", str, "standard")
    before = settings.get("activation_fn", str, settings.get("activation_fn_str", str, "relu"))
    if declared == "standard" and before == "topk":
        return "topk"
    if before not in ("relu", "topk"):
        raise CheckpointError(
            f"{settings.file}: `activation_fn` is {before!r}, which no architecture of reseed "
            "equals; it reads relu and topk"
        )
    known = ("standard", "topk", "jumprelu", "gated", *_TRANSCODERS)
    return settings.one_of("architecture", known, "standard")


def _parameters(tensors: Tensors, settings: Settings, transcoder: bool) -> dict[str, Tensor]:
    """Return W_enc, W_dec and b_dec under our names."""
    if transcoder and (d_out := settings.size("d_out")) != (d_in := settings.size("d_in")):
        raise CheckpointError(
            f"{settings.file}: it maps {d_in} activations to {d_out}; reseed needs inputs and "
            "reconstructions of the same width"
        )
    taken = {
        "W_enc": tensors.take("W_enc", "d_in", "num_latents").T,
        "W_dec": tensors.take("W_dec", "num_latents", "d_in"),
        "b_dec": tensors.take("b_dec", "d_in"),
    }
    # Before version 6 a latent could be rescaled before the decoder, which equals scaling its row.
    scale = "finetuning_scaling_factor"
    if scale in tensors:
        factor = tensors.take(scale, "num_latents")
        if settings.get(scale, bool, False):
            taken["W_dec"] = taken["W_dec"] * factor[:, None]
    return taken


def _built(
    architecture: str,
    settings: Settings,
    tensors: Tensors,
    taken: dict[str, Tensor],
    centred: bool,
) -> tuple[SAE, tuple[str, ...]]:
    """Build the SAE for normalised inputs, and return it with notes."""
    file = tensors.file
    if architecture == "gated":
        taken |= {
            "b_enc": tensors.take("b_gate", "num_latents"),
            "b_mag": tensors.take("b_mag", "num_latents"),
            "r_mag": tensors.take("r_mag", "num_latents"),
        }
        return base.gated(file, taken, centred=centred), ()
    taken["b_enc"] = tensors.take("b_enc", "num_latents")
    if architecture == "jumprelu":
        threshold = tensors.take("threshold", "num_latents")
        return base.jumprelu(file, taken, threshold, centred=centred), ()
    if architecture == "standard":
        return base.relu(file, taken, centred=centred), ()
    notes: tuple[str, ...] = ()
    if settings.get("rescale_acts_by_decoder_norm", bool, False):
        # The latents of SAELens are f‖d‖; it chooses by f‖d‖ and divides by ‖d‖ before decoding.
        norms = taken["W_dec"].double().norm(dim=1)
        if bool((norms == 0).any()):
            raise CheckpointError(
                f"{file}: `W_dec` has zero rows, but latents are divided by the rows' norms "
                "(`rescale_acts_by_decoder_norm`)"
            )
        taken["W_enc"] = (taken["W_enc"].double() * norms[:, None]).float()
        taken["b_enc"] = (taken["b_enc"].double() * norms).float()
        taken["W_dec"] = (taken["W_dec"].double() / norms[:, None]).float()
        notes = ("the norms of the decoder's rows are folded into the encoder",)
    return base.topk(file, taken, _k(settings), centred=centred), notes


def _k(settings: Settings) -> int:
    """Return k; before version 6 it was an argument of the activation function."""
    older = settings.get("activation_fn_kwargs", dict, {})
    return settings.size("k", Settings(settings.file, older).size("k", None) or 100)


def _normalized(sae: SAE, settings: Settings, folder: Path) -> tuple[SAE, tuple[str, ...]]:
    """Return the SAE for raw activations, with notes."""
    kind = settings.values.get("normalize_activations")
    if isinstance(kind, bool):  # before version 6
        kind = "expected_average_only_in" if kind else "none"
    else:
        kind = settings.get("normalize_activations", str, "none")
    if kind == "none":
        return sae, ()
    if kind in _NORMALIZED:
        raise CheckpointError(
            f"{settings.file}: `normalize_activations` is {kind!r}: {_NORMALIZED[kind]}"
        )
    if kind != "expected_average_only_in":
        raise CheckpointError(f"{settings.file}: `normalize_activations` {kind!r} is not known")
    if not (folder / SCALER).is_file():
        raise CheckpointError(
            f"{settings.file}: `normalize_activations` is {kind!r}, but the scale of the "
            f"activations is neither folded in nor in a file {SCALER}"
        )
    scale = read_settings(folder / SCALER).get("scaling_factor", float)
    if not 0 < scale < torch.inf:
        raise CheckpointError(f"{folder / SCALER}: `scaling_factor` must be above 0; got {scale}")
    return sae.folded(scale), (f"the input scale {scale:.6g} is folded in",)


def _topk_settings(config: TopKConfig) -> dict[str, Any]:
    refuse_weighing(config, "saelens")
    if config.activation != "topk":
        raise CheckpointError(f"saelens cannot hold `activation={config.activation}`")
    return {"k": config.k, "rescale_acts_by_decoder_norm": False}


def _hook(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of the activations under SAELens' keys."""
    found: dict[str, Any] = {}
    if "model" in metadata:
        found["model_name"] = metadata["model"]
    if metadata.get("site") in _SITES and "layer" in metadata:
        found["hook_name"] = _SITES[metadata["site"]].format(metadata["layer"])
    elif "hookpoint" in metadata:
        found["hook_name"] = metadata["hookpoint"]
    if "context_length" in metadata:
        found["context_size"] = metadata["context_length"]
    return found
