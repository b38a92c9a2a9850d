"""Base classes of the formats of saved SAEs, and reseed's own format.

Letters as in `reseed.sae.base`: D ``d_in``, F ``num_latents``; our W_enc and W_dec are [F, D]. A
format reads its files into one of our architectures so that latents and reconstructions equal those
of its own formula; otherwise it raises `CheckpointError` with the reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from reseed.sae.base import SAE
from reseed.sae.checkpoint import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    load_sae,
    read_metadata,
    save_sae,
)

TRANSCODER_NOTE = "a transcoder: it reconstructs activations at another hookpoint"


@dataclass(frozen=True)
class Imported:
    """An SAE that was read from files of some format.

    Attributes:
        sae: for raw activations, in float32; not to be trained.
        metadata: the SAE's origin (model, hookpoint, ...) as far as the files give it.
        notes: caveats for the user: sentences without a full stop.
        reads: the files that were read.
        transcoder: whether it reconstructs activations at another hookpoint than its input's.
    """

    sae: SAE
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    transcoder: bool = False


class Format(ABC):
    """A format of saved SAEs. Subclasses are final and have no state.

    Attributes:
        name: the value for ``format=`` and ``--to``.
        layouts: tuples of files; a folder has the format if it holds every file of any tuple.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]

    def recognises(self, path: Path) -> bool:
        """Return whether ``path``, a folder or one of its files, has this format."""
        folder = self.folder_of(path)
        return folder is not None and any(
            all((folder / file).is_file() for file in layout) for layout in self.layouts
        )

    def folder_of(self, path: Path) -> Path | None:
        """Return ``path`` if it is a folder, or the parent of a file that a layout names."""
        if path.is_dir():
            return path
        named = {Path(file).name for layout in self.layouts for file in layout}
        return path.parent if path.is_file() and path.name in named else None

    @abstractmethod
    def load(self, path: Path) -> Imported:
        """Read a recognised folder or file.

        Raises:
            CheckpointError: files are missing, damaged or inconsistent, or none of our
                architectures equals the SAE; the message gives the reason.
        """

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Write ``sae`` into ``folder`` (created if need be), each file atomically.

        Args:
            metadata: the SAE's origin; stored as far as the format can.

        Returns:
            notes for the user.

        Raises:
            CheckpointError: the format has nothing equal to this SAE.
        """
        raise CheckpointError(
            f"cannot write sae={sae.config.name} as {self.name}: reseed only reads this format"
        )


class Exporting(Format):
    """A format of another library that reseed also writes.

    Attributes:
        exports: the stable names of the architectures that it can hold.
    """

    exports: ClassVar[tuple[str, ...]]

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        if sae.config.name not in self.exports:
            raise CheckpointError(
                f"{self.name} cannot hold sae={sae.config.name}: it holds {', '.join(self.exports)}"
            )
        return self._save(sae, folder, metadata)

    @abstractmethod
    def _save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Do the work of `save` for an architecture in `exports`."""


@final
class Reseed(Format):
    """reseed's own format (`reseed.sae.checkpoint`): any architecture, its whole configuration."""

    name = "reseed"
    layouts = ((DESCRIPTION_FILE,),)

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        sae, reads = load_sae(folder), (folder / DESCRIPTION_FILE, folder / WEIGHTS_FILE)
        return Imported(sae, read_metadata(folder), (), reads)

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        save_sae(sae, folder, metadata)
        return ()
