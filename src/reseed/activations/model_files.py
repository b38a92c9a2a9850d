"""Files of language models: lookup, checks, and fingerprints of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from reseed.atomic import atomic_write_json
from reseed.config import ConfigError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_LIGHT = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


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
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(
            f"{{key}}: {folder / 'config.json'} is not JSON: {error}", "path"
        ) from None


def _check_weights(file: Path) -> None:
    """Raise `ConfigError` if a safetensors file is shorter or longer than its header says."""
    from safetensors import SafetensorError, safe_open

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

    For large weights (over 100 MB) it is cached by the files' paths, sizes and mtimes.
    """
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    stamp = json.dumps([[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths])
    key = hashlib.sha256(stamp.encode()).hexdigest()[:32]
    remembered = cache / "fingerprints" / f"{key}.json"
    if remembered.is_file():
        return json.loads(remembered.read_text())["sha256"]
    fingerprint = hash_files(paths)
    if sum(p.stat().st_size for p in paths) > 100_000_000:
        atomic_write_json(remembered, {"sha256": fingerprint, "files": [p.name for p in paths]})
    return fingerprint


def random_fingerprint(folder: Path, seed: int) -> str:
    """Return the fingerprint of weights drawn with ``seed``, from the architecture alone."""
    return f"random_weights-seed{seed}-{hash_files([folder / 'config.json'])}"


def hash_files(paths: Sequence[Path]) -> str:
    """Return 32 hex digits of the SHA-256 over names and contents of the existing files."""
    sha = hashlib.sha256()
    for path in paths:
        if path.is_file():
            sha.update(path.name.encode())
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:32]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
