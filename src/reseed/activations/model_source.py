"""Language models as sources (``model=``): configurations, files, and fingerprints of content.

A configuration's `resolve` finds and identifies a model without loading its weights. From the hub
it downloads only the configuration and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from reseed.activations.dataset import DatasetConfig
from reseed.activations.language_model import FoundModel, ModelConfig
from reseed.activations.source import ResolvedData
from reseed.activations.text_source import resolve_model_text
from reseed.config import setting
from reseed.errors import ConfigError
from reseed.system.files import user_path
from reseed.system.integrity import DamagedFileError, read_record, write_record

RANDOM_SEED = 1
"""Seed of the weights of ``surrogate=random_weights``. It is the same for all runs, so that they
share a stream, and it is part of the fingerprint, and so of the signature."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_LIGHT = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
              "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip


@dataclass(frozen=True)
class ResolvedModel(FoundModel):
    """A resolved language model, which can be given a text and random weights."""

    def with_random_weights(self) -> ResolvedModel:
        fingerprint = random_fingerprint(self.folder, RANDOM_SEED)
        return replace(self, fingerprint=fingerprint, random_seed=RANDOM_SEED)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        tokenizer = hash_files([self.folder / name for name in _TOKENIZER])
        return {"model": self.fingerprint, "tokenizer": tokenizer}

    def with_attention(self) -> ResolvedModel:
        """Return the same model with `ModelConfig.attention` settled.

        Raises:
            ConfigError: the architecture lacks the implementation that is asked for.
        """
        return replace(self, config=self.config.with_attention(self.skeleton))

    def data(self, config: DatasetConfig, cache: Path) -> ResolvedData:
        return resolve_model_text(self, config, cache)


@dataclass(frozen=True)
class EmbeddedModelConfig(ModelConfig, name="embedded"):
    """The small GPT-NeoX included in the package."""

    def resolve(self, cache: Path) -> ResolvedModel:
        self.check_attention()
        folder = Path(str(files("reseed") / "assets" / "model"))
        fingerprint = weights_fingerprint(folder, cache)
        return ResolvedModel(self, folder, fingerprint, "embedded").with_attention()


@dataclass(frozen=True, kw_only=True)
class PathModelConfig(ModelConfig, name="path"):
    """A folder written by `save_pretrained`. The weights are identified by their content."""

    path: str = setting(signed=False)

    def resolve(self, cache: Path) -> ResolvedModel:
        """Find the model.

        Raises:
            ConfigError: the folder does not exist or holds no transformers model.
        """
        self.check_attention()
        folder = user_path(self.path)
        check_folder(folder)
        label = folder.resolve().name
        found = ResolvedModel(self, folder, weights_fingerprint(folder, cache), label)
        check_fit(found.skeleton, folder)
        return found.with_attention()


@dataclass(frozen=True, kw_only=True)
class HubModelConfig(ModelConfig, name="hub"):
    """A model of the Hugging Face hub, pinned to the commit that ``revision`` resolves to."""

    repository: str = setting()
    revision: str = setting("main", signed=False)

    def resolve(self, cache: Path) -> ResolvedModel:
        """Find the model.

        Raises:
            ConfigError: the hub is unreachable and the model is not in the local cache.
        """
        self.check_attention()
        folder = snapshot(self.repository, self.revision)
        label = self.repository.rpartition("/")[2].lower()
        fingerprint = f"{self.repository}@{folder.name}"
        return ResolvedModel(self, folder, fingerprint, label).with_attention()

    def weights_folder(self, folder: Path) -> Path:
        # The folder's name is the resolved commit; the branch may have moved since.
        return snapshot(self.repository, folder.name, weights=True)


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder lacks a transformers model or some of its weights."""
    if not folder.is_dir():
        raise ConfigError(f"{{key}} must be an existing folder; got {folder}", "path")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{{key}} must hold a transformers model: there is no config.json in {folder}", "path"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{{key}} must hold weights as *.safetensors: none in {folder}", "path")
    for file in weights:
        _check_weights(file)
    for file in folder.glob("*.safetensors.index.json"):
        _check_index(file)
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{{key}}: {folder / 'config.json'} is not JSON: {error}", "path"
        ) from None


def check_fit(skeleton: nn.Module, folder: Path) -> None:
    """Check that a folder's weights fit its config.json: transformers would draw missing ones.

    Names may differ, because transformers converts weights of many families. So only weights whose
    neighbours in another layer have the model's own names count as missing.

    Raises:
        ConfigError: a weight has another shape than the model's, or a layer lacks it.
    """
    wanted = {name: list(tensor.shape) for name, tensor in skeleton.named_parameters()}
    found: set[str] = set()
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            here = set(tensors.keys())
            names |= here
            for name in (name for name in wanted if name in here):
                found.add(name)
                there = tensors.get_slice(name)
                if there.get_dtype() in _FLOATS and there.get_shape() != wanted[name]:
                    raise ConfigError(
                        f"{{key}}: {file} does not fit config.json: `{name}` has shape "
                        f"{there.get_shape()}, expected {wanted[name]}",
                        "path",
                    )
    if not found and not _ends_of(wanted) & names:
        raise ConfigError(
            f"{{key}}: the weights in {folder} have no name of the model of config.json, such as "
            f"{next(iter(wanted))}",
            "path",
        )
    kinds = {_NUMBER.sub(".*.", name) for name in found}
    missing = [name for name in wanted if name not in found and _NUMBER.sub(".*.", name) in kinds]
    if missing:
        raise ConfigError(
            f"{{key}}: the weights in {folder} do not fit config.json: `{missing[0]}` is missing",
            "path",
        )


def _ends_of(names: Iterable[str]) -> set[str]:
    """Return the names without their first parts: a checkpoint may lack the model's prefix."""
    return {name.split(".", count)[-1] for name in names for count in range(name.count(".") + 1)}


_FLOATS = ("F64", "F32", "F16", "BF16")  # quantised weights have other shapes
_NUMBER = re.compile(r"\.\d+\.")


def _check_index(file: Path) -> None:
    """Raise `ConfigError` unless an index maps weights to files of its own folder."""
    try:
        places = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        lost = [p for p in places if Path(p).name != p or not (file.parent / p).is_file()]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{{key}}: {file} is not an index of weights: {error}", "path") from None
    if lost:
        raise ConfigError(f"{{key}}: {file} names {min(lost)}, no file of its folder", "path")


def _check_weights(file: Path) -> None:
    """Raise `ConfigError` if a safetensors file is shorter or longer than its header says."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{{key}}: {file} is damaged: {error}", "path") from None


def snapshot(repository: str, revision: str, weights: bool = False) -> Path:
    """Return the local folder of a hub model, downloading it if needed; its name is the commit.

    Args:
        weights: download the weights too, not only configuration and tokenizer.

    Raises:
        ConfigError: the hub is unreachable, and the model is not in the local cache.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_LIGHT, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as online:
        try:  # without a network, use an earlier download
            return Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception:
            raise ConfigError(
                f"{{key}}: cannot get {repository} (revision {revision}) from the "
                f"hub, and it is not in the local cache: {_first_line(online)}",
                "repository",
            ) from online


def weights_fingerprint(folder: Path, cache: Path) -> str:
    """Return the SHA-256 over architecture and weights.

    The digest of large weights (over 100 MB) is cached under the files' paths, sizes and mtimes.
    """
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    stamp = json.dumps([[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths])
    key = hashlib.sha256(stamp.encode()).hexdigest()[:32]
    remembered = cache / "fingerprints" / f"{key}.json"
    with suppress(FileNotFoundError, DamagedFileError):
        return read_record(remembered)["sha256"]
    fingerprint = hash_files(paths)
    if sum(p.stat().st_size for p in paths) > 100_000_000:
        write_record(remembered, {"sha256": fingerprint, "files": [p.name for p in paths]})
    return fingerprint


def random_fingerprint(folder: Path, seed: int) -> str:
    """Return the fingerprint of random weights: the seed and a hash of the architecture."""
    return f"random_weights-seed{seed}-{hash_files([folder / 'config.json'])}"


def hash_files(paths: Sequence[Path]) -> str:
    """Return 32 hex digits of the SHA-256 over names and contents of those files that exist."""
    sha = hashlib.sha256()
    for path in paths:
        if path.is_file():
            sha.update(path.name.encode())
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:32]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
