"""The format of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, one folder per
hookpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

from safetensors.torch import save as to_safetensors

from reseed.sae.base import SAE
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import base
from reseed.sae.formats.base import Exporting, Imported
from reseed.sae.formats.files import Settings, Tensors, read_safetensors, read_settings
from reseed.sae.topk import KSparseConfig, TopKConfig
from reseed.system.files import atomic_write_bytes, atomic_write_json

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"


@final
class Sparsify(Exporting):
    """The format of sparsify: f = TopK_k(ReLU(E (x − b_dec) + b)), or the largest latent of each of
    k groups; transcoders do not subtract b_dec."""

    name = "sparsify"
    layouts = ((CONFIG, WEIGHTS),)
    exports: ClassVar[tuple[str, ...]] = ("topk",)

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        settings = read_settings(folder / CONFIG)
        d_in = settings.size("d_in")
        file = folder / WEIGHTS
        tensors = Tensors(file, read_safetensors(file), _sizes(settings, d_in))
        settings.refuse("signed", "reseed has no architecture with latents of either sign")
        activation = settings.one_of("activation", ("topk", "groupmax"), "topk")
        transcode = settings.get("transcode", bool, False)
        taken = {
            "W_enc": tensors.take("encoder.weight", "num_latents", "d_in"),
            "b_enc": tensors.take("encoder.bias", "num_latents"),
            "W_dec": tensors.take("W_dec", "num_latents", "d_in"),
            "b_dec": tensors.take("b_dec", "d_in"),
        }
        notes = without_skip(tensors)
        tensors.finish()
        sae = base.topk(
            file,
            taken,
            settings.size("k"),
            centred=not transcode,
            activation=activation,
            multi_topk=settings.get("multi_topk", bool, False),
        )
        if transcode:
            notes += ("a transcoder: it reconstructs the module's output",)
        metadata = {"hookpoint": folder.name, **settings.get("metadata", dict, {})}
        return Imported(sae, metadata, notes, (folder / CONFIG, file), transcode)

    def _save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        config = sae.config
        assert isinstance(config, TopKConfig)
        refuse_weighing(config, self.name)
        own = base.state(sae)
        tensors = {
            "encoder.weight": own["W_enc"],
            "encoder.bias": own["b_enc"],
            "W_dec": own["W_dec"],
            "b_dec": own["b_dec"],
        }
        settings = {
            "activation": config.activation,
            "expansion_factor": max(1, sae.num_latents // sae.d_in),
            "normalize_decoder": config.unit_norm_decoder,
            "num_latents": sae.num_latents,
            "k": config.k,
            "multi_topk": config.multi_topk,
            "skip_connection": False,
            "transcode": False,
            "d_in": sae.d_in,
            "metadata": dict(metadata),  # sparsify ignores keys that it does not know
        }
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        atomic_write_bytes(folder / WEIGHTS, to_safetensors(whole))
        atomic_write_json(folder / CONFIG, settings)
        return ()


def refuse_weighing(config: KSparseConfig, name: str) -> None:
    """Raise `CheckpointError` for an SAE that chooses latents by f‖d‖: the format chooses by f."""
    if config.weigh_by_decoder_norm:
        raise CheckpointError(
            f"{name} cannot hold `weigh_by_decoder_norm=true`: it chooses latents by f, not f‖d‖"
        )


def _sizes(settings: Settings, d_in: int) -> dict[str, int]:
    """Return the sizes that the weights must have; ``num_latents: 0`` means d_in × expansion."""
    num_latents = settings.get("num_latents", int, 0)
    if num_latents < 0:
        raise CheckpointError(
            f"{settings.file}: `num_latents` must be at least 0; got {num_latents}"
        )
    return {"d_in": d_in, "num_latents": num_latents or d_in * settings.size("expansion_factor")}


def without_skip(tensors: Tensors, name: str = "W_skip") -> tuple[str, ...]:
    """Drop a skip connection of zeros and return a note; refuse any other.

    Raises:
        CheckpointError: the skip connection is not zero.
    """
    if name not in tensors:
        return ()
    if bool((tensors.raw(name) != 0).any()):
        raise CheckpointError(
            f"{tensors.file}: `{name}` adds a linear map of the input to the reconstruction, which "
            "no architecture of reseed does"
        )
    return (f"`{name}` is zero and was dropped",)
