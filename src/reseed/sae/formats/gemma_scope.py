"""The formats of Gemma Scope (``params.npz`` without a configuration) and Gemma Scope 2
(``params.safetensors`` with lower-case names, and usually a ``config.json``)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from reseed.sae.base import SAE
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import base
from reseed.sae.formats.base import TRANSCODER_NOTE, Exporting, Imported
from reseed.sae.formats.files import Tensors, read_npz, read_safetensors, read_settings
from reseed.sae.formats.sparsify import without_skip
from reseed.system.files import atomic_write_bytes

FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"


@final
class GemmaScope(Exporting):
    """The formats of Gemma Scope: f = ReLU(π)·1[π > θ], π = x W_enc + b_enc, without subtracting
    b_dec."""

    name = "gemma_scope"
    layouts = ((FIRST,), (SECOND,))
    exports: ClassVar[tuple[str, ...]] = ("jumprelu", "relu", "batch_topk", "matryoshka")

    def folder_of(self, path: Path) -> Path | None:
        return path.parent if path.suffix == ".npz" and path.is_file() else super().folder_of(path)

    def recognises(self, path: Path) -> bool:
        return super().recognises(path) or (path.suffix == ".npz" and path.is_file())

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        if path.suffix == ".npz" or (path.is_dir() and (path / FIRST).is_file()):
            return _first(path if path.is_file() else path / FIRST)
        return _second(folder)

    def _save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        own, threshold = base.state(sae), base.thresholds(sae)
        assert threshold is not None
        arrays = {
            "W_enc": own["W_enc"].T.contiguous().numpy(),
            "W_dec": own["W_dec"].numpy(),
            "b_enc": base.uncentred_b_enc(sae).numpy(),
            "b_dec": own["b_dec"].numpy(),
            "threshold": threshold.numpy(),
        }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        atomic_write_bytes(folder / FIRST, buffer.getvalue())
        notes = [] if not metadata else ["params.npz does not store where the SAE comes from"]
        if sae.config.name != "jumprelu":
            notes.append(f"sae={sae.config.name} is stored as a JumpReLU, without its k")
        return tuple(notes)


def _first(file: Path) -> Imported:
    """Read ``params.npz`` (Gemma Scope)."""
    tensors = Tensors(file, read_npz(file))
    scale = tensors.take("scaling_factor", "num_latents") if "scaling_factor" in tensors else None
    if scale is not None and bool((scale != 1).any()):  # some finetuned SAEs have it
        raise CheckpointError(
            f"{file}: `scaling_factor` rescales latents, which reseed does not support"
        )
    sae = _jumprelu(tensors, "W_enc", "W_dec")
    tensors.finish()
    # Only the path gives the SAE's origin: .../layer_12/width_16k/average_l0_82/params.npz
    said = dict(re.findall(r"(layer|width|average_l0)_(\w+)", "/".join(file.parts[-5:])))
    return Imported(sae, said, (), (file,))


def _second(folder: Path) -> Imported:
    """Read ``params.safetensors`` (Gemma Scope 2)."""
    file, config = folder / SECOND, folder / CONFIG
    tensors = Tensors(file, read_safetensors(file))
    metadata: dict[str, Any] = {}
    transcoder = False
    if config.is_file():
        settings = read_settings(config)
        settings.one_of("architecture", ("jump_relu",), "jump_relu")
        metadata = {k: v for k, v in settings.values.items() if isinstance(v, str | int | float)}
        points = [settings.get(f"hf_hook_point_{side}", str, None) for side in ("in", "out")]
        transcoder = points[1] is not None and points[0] != points[1]
    sae = _jumprelu(tensors, "w_enc", "w_dec")
    notes = without_skip(tensors, "affine_skip_connection")
    tensors.finish()
    if transcoder:
        notes += (TRANSCODER_NOTE,)
    reads = (file, config) if config.is_file() else (file,)
    return Imported(sae, metadata, notes, reads, transcoder)


def _jumprelu(tensors: Tensors, encoder: str, decoder: str) -> SAE:
    taken = {
        "W_enc": tensors.take(encoder, "d_in", "num_latents").T,
        "W_dec": tensors.take(decoder, "num_latents", "d_in"),
        "b_enc": tensors.take("b_enc", "num_latents"),
        "b_dec": tensors.take("b_dec", "d_in"),
    }
    threshold = tensors.take("threshold", "num_latents")
    return base.jumprelu(tensors.file, taken, threshold, centred=False)
