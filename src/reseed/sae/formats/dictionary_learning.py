"""The format of dictionary_learning: ``ae.pt`` and ``config.json``, one folder per trainer."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from reseed.sae.base import SAE
from reseed.sae.batch_topk import BatchSparseSAE, BatchTopKConfig
from reseed.sae.checkpoint import CheckpointError, plain_tensors
from reseed.sae.formats import base
from reseed.sae.formats.base import Exporting, Imported
from reseed.sae.formats.files import Settings, Tensors, read_pt, read_settings
from reseed.sae.formats.sparsify import refuse_weighing
from reseed.sae.matryoshka import Matryoshka, MatryoshkaConfig
from reseed.sae.topk import KSparseConfig, TopKConfig
from reseed.system.files import atomic_write_bytes, atomic_write_json

WEIGHTS, CONFIG = "ae.pt", "config.json"
UNSET = -1.0
"""Value of a threshold that training never set: every positive latent is active."""


@final
class DictionaryLearning(Exporting):
    """The format of dictionary_learning. ``config.json`` names the class of the dictionary,
    ``ae.pt`` holds its tensors, ``checkpoints/ae_<step>.pt`` those of intermediate steps."""

    name = "dictionary_learning"
    layouts = ((WEIGHTS, CONFIG),)
    exports: ClassVar[tuple[str, ...]] = (
        "topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu",
    )  # fmt: skip

    def folder_of(self, path: Path) -> Path | None:
        if path.suffix != ".pt" or not path.is_file():
            return super().folder_of(path)
        beside = (path.parent, path.parent.parent)
        return next((folder for folder in beside if (folder / CONFIG).is_file()), None)

    def recognises(self, path: Path) -> bool:
        named = path.suffix == ".pt" and self.folder_of(path) is not None
        return named or super().recognises(path)

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        file = path if path.suffix == ".pt" else folder / WEIGHTS
        settings = read_settings(folder / CONFIG)
        trainer = Settings(settings.file, settings.get("trainer", dict))
        declared = trainer.one_of("dict_class", tuple(_READERS), "AutoEncoder")
        tensors = Tensors(file, _state(file))
        sae, notes = _READERS[declared](tensors, trainer)
        tensors.finish()
        said = ("lm_name", "layer", "submodule_name")
        metadata = {key: trainer.values[key] for key in said if key in trainer.values}
        ours = settings.get("reseed", dict, {})
        return Imported(sae, {**metadata, **ours}, notes, (settings.file, file))

    def _save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        declared, tensors, more, notes = _written(sae)
        trainer = {
            "dict_class": declared,
            "activation_dim": sae.d_in,
            "dict_size": sae.num_latents,
            "layer": metadata.get("layer", 0),
            "lm_name": metadata.get("model", "unknown"),
            **more,
        }
        buffer = io.BytesIO()
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, buffer)
        atomic_write_bytes(folder / WEIGHTS, buffer.getvalue())
        atomic_write_json(folder / CONFIG, {"trainer": trainer, "reseed": dict(metadata)})
        return notes


def _state(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a dictionary.

    Raises:
        CheckpointError: the file is the state of an unfinished training or holds other objects.
    """
    saved = read_pt(file)
    if isinstance(saved, dict) and "ae" in saved and "step" in saved:
        others = ", ".join(sorted(map(str, saved)))
        raise CheckpointError(
            f"{file} is the state of a training that was interrupted at step {saved['step']} "
            f"(it holds {others}), not a finished SAE: finish the training, or save only its `ae`"
        )
    return plain_tensors(file, saved)


def _linear(tensors: Tensors, bias: str | None, centre: str) -> dict[str, Tensor]:
    """Take the tensors of linear layers: ``encoder.weight`` [F, D], ``decoder.weight`` [D, F]."""
    taken = {
        "W_enc": tensors.take("encoder.weight", "num_latents", "d_in"),
        "W_dec": tensors.take("decoder.weight", "d_in", "num_latents").T,
        "b_dec": tensors.take(centre, "d_in"),
    }
    if bias is not None:
        taken["b_enc"] = tensors.take(bias, "num_latents")
    return taken


def _matrices(tensors: Tensors) -> dict[str, Tensor]:
    """Take the tensors of plain matrices: ``W_enc`` [D, F], ``W_dec`` [F, D]."""
    return {
        "W_enc": tensors.take("W_enc", "d_in", "num_latents").T,
        "W_dec": tensors.take("W_dec", "num_latents", "d_in"),
        "b_enc": tensors.take("b_enc", "num_latents"),
        "b_dec": tensors.take("b_dec", "d_in"),
    }


_Read = tuple[SAE, tuple[str, ...]]


def _relu(tensors: Tensors, trainer: Settings) -> _Read:
    return base.relu(tensors.file, _linear(tensors, "encoder.bias", "bias"), centred=True), ()


def _relu_new(tensors: Tensors, trainer: Settings) -> _Read:
    taken = _linear(tensors, "encoder.bias", "decoder.bias")
    return base.relu(tensors.file, taken, centred=False), ()


def _gated(tensors: Tensors, trainer: Settings) -> _Read:
    taken = _linear(tensors, "gate_bias", "decoder_bias")
    taken |= {
        "b_mag": tensors.take("mag_bias", "num_latents"),
        "r_mag": tensors.take("r_mag", "num_latents"),
    }
    return base.gated(tensors.file, taken), ()


def _jumprelu(tensors: Tensors, trainer: Settings) -> _Read:
    taken, threshold = _matrices(tensors), tensors.take("threshold", "num_latents")
    return base.jumprelu(tensors.file, taken, threshold, centred=False), ()


def _topk(tensors: Tensors, trainer: Settings) -> _Read:
    taken = _linear(tensors, "encoder.bias", "b_dec")
    if "threshold" in tensors:  # for an alternative to k, which the library disables by default
        tensors.number("threshold")
    return base.topk(tensors.file, taken, _k(tensors, trainer)), ()


def _batch_topk(tensors: Tensors, trainer: Settings) -> _Read:
    taken = _linear(tensors, "encoder.bias", "b_dec")
    return _with_threshold(BatchTopKConfig, tensors, trainer, taken)


def _matryoshka(tensors: Tensors, trainer: Settings) -> _Read:
    taken = _matrices(tensors)
    sizes = tensors.raw("group_sizes").tolist()
    width = tensors.sizes["num_latents"]
    if not isinstance(sizes, list) or sum(sizes) != width or min(sizes) < 1:
        raise CheckpointError(
            f"{tensors.file}: `group_sizes` must be above 0 and add up to {width}; got {sizes}"
        )
    ends = torch.tensor(sizes).cumsum(0).tolist()
    prefixes = tuple(end / width for end in ends)
    return _with_threshold(MatryoshkaConfig, tensors, trainer, taken, prefixes=prefixes)


def _with_threshold(
    kind: type[BatchTopKConfig],
    tensors: Tensors,
    trainer: Settings,
    taken: dict[str, Tensor],
    **values: Any,
) -> _Read:
    threshold = tensors.number("threshold")
    notes: tuple[str, ...] = ()
    if threshold == UNSET:
        notes = ("its threshold was never set: every positive latent is active",)
    elif not 0 <= threshold < torch.inf:
        raise CheckpointError(
            f"{tensors.file}: `threshold` must be at least 0, or -1 if it is unset; got "
            f"{threshold:g}"
        )
    taken = {**taken, "threshold": torch.tensor(max(threshold, 0.0))}
    k = _k(tensors, trainer)
    sae = base.build_from_weights(kind, tensors.file, taken, k=k, aux_alpha=0.0, **values)
    return sae, notes


def _k(tensors: Tensors, trainer: Settings) -> int:
    """Return k: from the weights, or from the configuration where older weights lack it."""
    declared = trainer.size("k", None)
    stored = tensors.number("k") if "k" in tensors else declared
    if stored is not None and stored != int(stored):
        raise CheckpointError(f"{tensors.file}: `k` must be a whole number; got {stored}")
    if stored is None:
        raise CheckpointError(
            f"{tensors.file}: `k` is missing; {trainer.file.name} does not give it either"
        )
    if declared is not None and declared != stored:
        raise CheckpointError(
            f"{tensors.file}: `k` is {stored:g}, but {trainer.file.name} says {declared}"
        )
    return int(stored)


_READERS: dict[str, Callable[[Tensors, Settings], _Read]] = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}

_Written = tuple[str, dict[str, Tensor], dict[str, Any], tuple[str, ...]]


def _written(sae: SAE) -> _Written:
    """Return the class name, its tensors, further entries of the configuration, and notes."""
    own, config = base.state(sae), sae.config
    linear = {"encoder.weight": own["W_enc"], "decoder.weight": own["W_dec"].T}
    matrices = {"W_enc": own["W_enc"].T, "W_dec": own["W_dec"], "b_dec": own["b_dec"]}
    if isinstance(config, KSparseConfig):
        return _k_sparse(sae, config, linear, matrices)
    if config.name == "relu" and base.is_centred(sae):
        notes: tuple[str, ...] = ()
        if not config.unit_norm_decoder:
            notes = ("load it with `normalize_decoder=False`, or the library rescales latents",)
        tensors = {**linear, "encoder.bias": own["b_enc"], "bias": own["b_dec"]}
        return "AutoEncoder", tensors, {}, notes
    if config.name == "relu":
        tensors = {**linear, "encoder.bias": own["b_enc"], "decoder.bias": own["b_dec"]}
        return "AutoEncoderNew", tensors, {}, ()
    if config.name == "gated":
        more = {"r_mag": own["r_mag"], "gate_bias": own["b_enc"], "mag_bias": own["b_mag"]}
        return "GatedAutoEncoder", {**linear, **more, "decoder_bias": own["b_dec"]}, {}, ()
    threshold = base.thresholds(sae)
    assert threshold is not None
    tensors = {**matrices, "b_enc": base.uncentred_b_enc(sae), "threshold": threshold}
    return "JumpReluAutoEncoder", tensors, {}, ()


def _k_sparse(
    sae: SAE, config: KSparseConfig, linear: dict[str, Tensor], matrices: dict[str, Tensor]
) -> _Written:
    """Return the same as `_written` for TopK, BatchTopK and Matryoshka."""
    refuse_weighing(config, DictionaryLearning.name)
    if not isinstance(config.k, int):
        raise CheckpointError(
            f"{DictionaryLearning.name} cannot hold k={config.k}: its k is a whole number"
        )
    own = base.state(sae)
    threshold = own["threshold"] if isinstance(sae, BatchSparseSAE) else torch.tensor(UNSET)
    common = {"k": torch.tensor(config.k, dtype=torch.int32), "threshold": threshold}
    if isinstance(sae, Matryoshka):
        ends = torch.tensor((0, *sae.config.prefix_sizes(sae.num_latents)))
        tensors = {**matrices, "b_enc": own["b_enc"], "group_sizes": ends.diff()}
        return "MatryoshkaBatchTopKSAE", {**tensors, **common}, {"k": config.k}, ()
    if isinstance(config, TopKConfig) and config.activation != "topk":
        raise CheckpointError(
            f"{DictionaryLearning.name} cannot hold `activation={config.activation}`"
        )
    declared = "BatchTopKSAE" if isinstance(sae, BatchSparseSAE) else "AutoEncoderTopK"
    tensors = {**linear, "encoder.bias": own["b_enc"], "b_dec": own["b_dec"], **common}
    return declared, tensors, {"k": config.k}, ()
