"""Files of language models: lookup, checks, and fingerprints of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reseed.errors import ConfigError
from reseed.system.files import atomic_write_json

# MERGED Construction of a language model: without weights, with its trained or with random weights.
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


def skeleton(config: Any) -> nn.Module:
    """Build the model of a transformers configuration on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def trained(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """Load the model with the weights of its folder, on the CPU."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,  # a pickled checkpoint could run code
            trust_remote_code=False,  # so could Python files in the folder
        )


def untrained(config: Any, seed: int, dtype: torch.dtype, attention: str) -> nn.Module:
    """Build the model with its architecture's random initial weights, embeddings included.

    The weights are drawn on the CPU in float32, so that they depend on neither device nor
    precision. The process's random state is left unchanged.
    """
    from transformers import AutoModelForCausalLM

    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the only generator that is forked
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    for weights in model.parameters():  # not buffers: rotary angles stay exact, as when loaded
        weights.data = weights.data.to(dtype)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars, which would disturb the command's own display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
