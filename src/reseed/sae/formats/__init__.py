"""SAEs that others have trained: every format that is read, recognised by its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reseed.config import nearest
from reseed.sae.base import SAE
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats.base import Format, Imported
from reseed.sae.formats.dictionary_learning import DictionaryLearning
from reseed.sae.formats.gemma_scope import GemmaScope
from reseed.sae.formats.llama_scope import LlamaScope
from reseed.sae.formats.reseed import Reseed
from reseed.sae.formats.saelens import SAELens
from reseed.sae.formats.source import found_at
from reseed.sae.formats.sparsify import Sparsify

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Reseed(),
        Sparsify(),
        SAELens(),
        DictionaryLearning(),
        GemmaScope(),
        LlamaScope(),
    )
}
_SHOWN = 8  # names in a message


def load_sae(
    source: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    format: str | None = None,
    repo: str | None = None,
    revision: str | None = None,
    path: str | None = None,
) -> SAE:
    """An SAE in any format that is known, for raw activations.

    Args:
        source: a run folder, the folder (or a file) of another library's, or
            ``hub:OWNER/NAME[@revision][/path]``.
        format: a key of `FORMATS`; by default recognised by the files.
        repo, revision, path: the parts of such a ``hub:`` source, in its place.

    Raises:
        CheckpointError: there is nothing, nothing that is known, or nothing that none of our
            architectures is equal to; with the reason.
    """
    return import_sae(found_at(source, repo, revision, path), format).sae.to(device)


def import_sae(path: Path, format: str | None = None) -> Imported:
    """The SAE in a folder or file, with what its files say of it.

    Raises: see `load_sae`.
    """
    return recognised(path, format).load(path)


def recognised(path: Path, format: str | None = None) -> Format:
    """The format of a folder or file.

    Raises:
        CheckpointError: it is of none (or not of the one that is named); what is there, and what
            would have been recognised.
    """
    known = FORMATS.values() if format is None else [named(format)]
    if not path.exists():
        raise CheckpointError(f"there is no folder {path}")
    found = next((one for one in known if one.recognises(path)), None)
    if found is None:
        wanted = "; ".join(_wanted(one) for one in known)
        raise CheckpointError(f"{path} {_held(path)}. Recognised is {wanted}.{_below(path, known)}")
    return found


def named(format: str) -> Format:
    """The format of that name.

    Raises:
        CheckpointError: there is none.
    """
    if format not in FORMATS:
        listed = ", ".join(FORMATS)
        raise CheckpointError(
            f"no format is called `{format}`.{nearest(format, FORMATS)} Formats: {listed}."
        )
    return FORMATS[format]


def export_sae(
    sae: SAE, folder: Path, format: str, metadata: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Write an SAE in a format; notes on what does not come along.

    Raises:
        CheckpointError: the format holds nothing that is equal to it.
    """
    return named(format).save(sae, folder, metadata or {})


def _wanted(one: Format) -> str:
    return f"{one.name}: {' or '.join(' with '.join(layout) for layout in one.layouts)}"


def _held(path: Path) -> str:
    if path.is_file():
        return "is no file of a known format, or lacks what belongs beside it"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = ", ".join(names[:_SHOWN]) or "nothing"
    return f"holds no SAE of a known format; it holds {listed}{more}"


def _below(path: Path, known: Any) -> str:
    """Folders just below that are of a known format."""
    if not path.is_dir():
        return ""
    found = []
    for folder in sorted(path.glob("*/")) + sorted(path.glob("*/*/")):
        one = next((one for one in known if one.recognises(folder)), None)
        if one is not None:
            found.append(f"{folder.relative_to(path)} ({one.name})")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f" Below it are {', '.join(found[:_SHOWN])}{more}: name one." if found else ""
