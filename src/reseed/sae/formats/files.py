"""Sources of saved SAEs, and readers of their files.

A source is a folder, a file, or a place on the hub, which is downloaded. The readers of other
libraries' files load data only and never run code. Errors name the file and the fault.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reseed.sae.checkpoint import CheckpointError, plain_tensors
from reseed.system.files import user_path

HUB = "hub:"
MAIN = "main"
_HUB = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/@\s]+))?(?:/(?P<path>[^\s]+?))?/?"
)
_WEIGHTS = (".safetensors", ".npz", ".pt")


@dataclass(frozen=True)
class HubPlace:
    """A place on the Hugging Face hub: ``hub:OWNER/NAME[@revision][/path]``."""

    repo: str
    revision: str = MAIN
    path: str = ""

    @classmethod
    def parse(cls, source: str) -> HubPlace:
        """Parse a source; raise `CheckpointError` if it does not have that form."""
        found = _HUB.fullmatch(source.removeprefix(HUB))
        if found is None or ".." in Path(found["path"] or "").parts:
            raise CheckpointError(
                f"a place on the hub is written {HUB}OWNER/NAME[@revision][/path]; got {source}"
            )
        return cls(found["repo"], found["revision"] or MAIN, found["path"] or "")

    def __str__(self) -> str:
        return f"{HUB}{self.repo}@{self.revision}" + (f"/{self.path}" if self.path else "")


def fetch(
    source: str | Path | None,
    repo: str | None = None,
    revision: str | None = None,
    path: str | None = None,
) -> Path:
    """Return the local folder or file of a source, downloaded if need be.

    Args:
        source: a path or ``hub:…``; None if ``repo`` is given.
        repo, revision, path: a place on the hub.

    Raises:
        CheckpointError: neither or both of ``source`` and ``repo`` are given, the path does not
            exist, or the download fails.
    """
    place = parse_source(source, repo, revision, path)
    if isinstance(place, HubPlace):
        return download(place)[0]
    if not place.exists():
        raise CheckpointError(f"there is no folder {place}{_hint(str(source))}")
    return place


def parse_source(
    source: str | Path | None,
    repo: str | None = None,
    revision: str | None = None,
    path: str | None = None,
) -> Path | HubPlace:
    """Return the local path or the place on the hub that a source names.

    Raises: see `fetch`.
    """
    if (source is None) == (repo is None):
        raise CheckpointError("give either a source or `repo` to say where the SAE is")
    if repo is not None:
        source = (
            f"{HUB}{repo}" + (f"@{revision}" if revision else "") + (f"/{path}" if path else "")
        )
        return HubPlace.parse(source)
    if isinstance(source, str) and source.startswith(HUB):
        place = HubPlace.parse(source)
        if revision is None:
            return place
        if place.revision not in (MAIN, revision):
            raise CheckpointError(
                f"{source} names revision {place.revision}, but `revision` is {revision}"
            )
        return HubPlace(place.repo, revision, place.path)
    if revision is not None or path is not None:
        raise CheckpointError(
            f"`revision` and `path` apply to the hub only; got the folder {source}"
        )
    return user_path(str(source))


def download(place: HubPlace) -> tuple[Path, str]:
    """Return the local copy of a place on the hub, and its commit.

    Raises:
        CheckpointError: the hub cannot be reached and the local cache lacks the place, or the
            repository has no such path.
    """
    from huggingface_hub import snapshot_download

    wanted = {"revision": place.revision, "allow_patterns": [place.path, f"{place.path}/*"]}
    try:
        if not place.path:  # a repository may hold thousands of SAEs: take only its top level
            wanted["allow_patterns"] = _top(place)
        root = Path(snapshot_download(place.repo, **wanted))  # type: ignore[arg-type]
    except CheckpointError:
        raise
    except Exception as online:
        wanted.pop("allow_patterns")
        try:  # without a network, use an earlier download
            root = Path(snapshot_download(place.repo, local_files_only=True, **wanted))  # type: ignore[arg-type]
        except Exception:
            reason = (str(online).strip().splitlines() or [type(online).__name__])[0]
            raise CheckpointError(
                f"cannot get {place} from the hub, and it is not in the local cache: {reason}"
            ) from online
    found = root / place.path
    if not found.exists():
        raise CheckpointError(f"{place.repo} (revision {place.revision}) has no {place.path}")
    return found, root.name


def _top(place: HubPlace) -> list[str]:
    """Return the files at the top of a repository.

    Raises:
        CheckpointError: no file at the top has weights; the message lists folders with weights.
    """
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(place.repo, revision=place.revision)
    top = [name for name in names if "/" not in name]
    if not any(name.endswith(_WEIGHTS) for name in top):
        weights = (name for name in names if name.endswith(_WEIGHTS))
        folders = list(dict.fromkeys(name.rpartition("/")[0] for name in weights))
        raise CheckpointError(
            f"{place} has no SAE at its top level. Name a folder, as in {HUB}{place.repo}/"
            f"{folders[0] if folders else 'FOLDER'}; folders with weights: {first_few(folders)}"
        )
    return top


def first_few(names: Sequence[str], most: int = 8) -> str:
    """List the first names for a message."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most]) or 'none'}{more}"


def _hint(source: str) -> str:
    """Suggest the place on the hub that a missing path may stand for."""
    if re.fullmatch(r"[\w-]+/[\w.-]+", source):
        return f"; for a repository on the hub write {HUB}{source}"
    return ""


_LARGEST = 2**31
MISSING: Any = object()
"""Marks a setting without a default."""


class Tensors:
    """The tensors of one file, taken out by name with their shapes checked.

    Args:
        file: for messages.
        tensors: all tensors of the file, after `plain_tensors`.
        sizes: the named sizes (``d_in``, ``num_latents``) that are known beforehand.
    """

    def __init__(
        self, file: Path, tensors: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None
    ) -> None:
        self.file = file
        self.sizes = dict(sizes or {})
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @property
    def names(self) -> list[str]:
        """Sorted names of the tensors that were not taken yet."""
        return sorted(self._left)

    def take(self, name: str, *shape: str) -> Tensor:
        """Return a tensor as float32 on the CPU.

        Args:
            shape: names of its sizes; a new name takes the size found here.

        Raises:
            CheckpointError: the tensor is missing, empty, of another shape, not of floats, or
                holds values that are not finite.
        """
        tensor = self.raw(name)
        known = [
            self.sizes.setdefault(size, n) for size, n in zip(shape, tensor.shape, strict=False)
        ]
        if list(tensor.shape) != known or len(tensor.shape) != len(shape):
            expected = ", ".join(
                f"{size}={self.sizes[size]}" if size in self.sizes else size for size in shape
            )
            raise CheckpointError(
                f"{self.file}: `{name}` has shape {list(tensor.shape)}, expected [{expected}]"
            )
        if 0 in tensor.shape:
            raise CheckpointError(f"{self.file}: `{name}` is empty")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.file}: `{name}` must hold floats; got {tensor.dtype}")
        tensor = tensor.to("cpu", torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.file}: `{name}` holds values that are not finite")
        return tensor

    def raw(self, name: str) -> Tensor:
        """Return a tensor unchanged.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self._left:
            there = ", ".join(self.names) or "nothing"
            raise CheckpointError(f"{self.file}: `{name}` is missing; the file holds {there}")
        return self._left.pop(name)

    def number(self, name: str) -> float:
        """Return the single element of a tensor.

        Raises:
            CheckpointError: the tensor is missing or does not have exactly one element.
        """
        tensor = self.raw(name)
        if tensor.numel() != 1:
            raise CheckpointError(
                f"{self.file}: `{name}` must be one number; it has shape {list(tensor.shape)}"
            )
        if not bool(tensor.isfinite()):
            raise CheckpointError(f"{self.file}: `{name}` must be finite; got {float(tensor):g}")
        return float(tensor)

    def finish(self) -> None:
        """Raise `CheckpointError` if a tensor was not taken: it could change the SAE's output."""
        if self._left:
            raise CheckpointError(
                f"{self.file}: the tensor `{self.names[0]}` is unknown in this format and may "
                "change what the SAE computes"
            )


class Settings:
    """The entries of a JSON file."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def get(self, key: str, kind: type, default: Any = MISSING) -> Any:
        """Return an entry of a given type; ``null`` counts as missing.

        Raises:
            CheckpointError: it is missing without a default, or has another type.
        """
        value = self.values.get(key)
        if value is None:
            if default is MISSING:
                raise CheckpointError(f"{self.file}: `{key}` is missing")
            return default
        # Python counts True as an int; people write 32 for a float.
        ok = isinstance(value, (int, float) if kind is float else kind)
        if not ok or (kind is not bool and isinstance(value, bool)):
            wanted = {int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
            raise CheckpointError(
                f"{self.file}: `{key}` must be {wanted.get(kind, 'true or false')}; got {value!r}"
            )
        return value

    def size(self, key: str, default: Any = MISSING) -> Any:
        """Return a whole number of at least 1, or the default."""
        value = self.get(key, int, default)
        if value is not None and not 1 <= value < _LARGEST:
            bound = "at least 1" if value < 1 else f"below {_LARGEST:,}"
            raise CheckpointError(f"{self.file}: `{key}` must be {bound}; got {value}")
        return value

    def one_of(self, key: str, known: tuple[str, ...], default: str) -> str:
        """Return a setting that has one of the known values; another could mean another SAE.

        Raises:
            CheckpointError: the value is unknown.
        """
        value = self.get(key, str, default)
        if value not in known:
            listed = ", ".join(known)
            raise CheckpointError(
                f"{self.file}: `{key}` is {value!r}, which no architecture of reseed equals; "
                f"reseed reads {listed}"
            )
        return value

    def refuse(self, key: str, reason: str) -> None:
        """Raise `CheckpointError` if a switch is on that no architecture of reseed has."""
        if self.get(key, bool, False):
            raise CheckpointError(f"{self.file}: `{key}` is true: {reason}")


def read_settings(file: Path) -> Settings:
    """Read a JSON file that holds a mapping.

    Raises:
        CheckpointError: it cannot be read or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON (truncated?): {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a mapping; got {type(values).__name__}")
    return Settings(file, values)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return plain_tensors(file, _read(file, load_file, (SafetensorError, OSError, ValueError)))


def read_npz(file: Path) -> dict[str, Tensor]:
    """Read the arrays of an npz file. Pickled objects are refused: they could run code.

    Raises:
        CheckpointError: the file is missing or damaged, or holds objects.
    """

    def arrays(file: Path) -> dict[str, Tensor]:
        with np.load(file, allow_pickle=False) as found:
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("it is not an archive of arrays")
            return {name: torch.from_numpy(found[name]) for name in found.files}

    kinds = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, MemoryError)
    return plain_tensors(file, _read(file, arrays, kinds))


def read_pt(file: Path) -> Any:
    """Read a file that torch saved: only tensors and plain values (``weights_only``).

    Raises:
        CheckpointError: the file is missing or damaged, or holds objects, which could run code.
    """

    def saved(file: Path) -> Any:
        with warnings.catch_warnings():  # torch deprecates kinds of tensors, which are refused
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)

    kinds = (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError)
    return _read(file, saved, (*kinds, AttributeError, IndexError, TypeError))


def _read(file: Path, read: Callable[[Path], Any], kinds: tuple[type[BaseException], ...]) -> Any:
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}")
    try:
        return read(file)
    except kinds as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file} cannot be read (truncated, or not a data file?): {reason}"
        ) from error
