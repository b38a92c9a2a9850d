"""What a format of saved SAEs is: which files it has, how it is read, how it is written.

Letters as in `reseed.sae.base`: D ``d_in``, F ``num_latents``; our W_enc and W_dec are [F, D]. A
format reads its files into one of our architectures such that latents and reconstructions are those
of its own formula, or refuses them and says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from reseed.sae.base import SAE
from reseed.sae.checkpoint import CheckpointError


@dataclass(frozen=True)
class Imported:
    """An SAE that was read from files of some format.

    Attributes:
        sae: for raw activations, in float32; not to be trained.
        metadata: what the files say of where it comes from.
        notes: what its user has to know: sentences without a full stop.
        reads: the files.
        transcoder: whether its reconstruction is of activations at another hookpoint.
    """

    sae: SAE
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    transcoder: bool = False


class Format(ABC):
    """One format. Subclasses are final, and have no state.

    Attributes:
        name: as it is given by ``format=`` and ``--to``.
        layouts: the files of a folder by which the format is known; any of them will do.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]

    def recognises(self, path: Path) -> bool:
        """Whether the folder (or one of its files) ``path`` is of this format."""
        folder = self.folder_of(path)
        return folder is not None and any(
            all((folder / file).is_file() for file in layout) for layout in self.layouts
        )

    def folder_of(self, path: Path) -> Path | None:
        """The folder that ``path`` means: itself, or that of a file which a layout names."""
        if path.is_dir():
            return path
        named = {Path(file).name for layout in self.layouts for file in layout}
        return path.parent if path.is_file() and path.name in named else None

    @abstractmethod
    def load(self, path: Path) -> Imported:
        """Read a recognised folder or file.

        Raises:
            CheckpointError: files that are missing, damaged or do not fit each other; an SAE that
                none of our architectures is equal to, with the reason.
        """

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Write ``sae`` into ``folder`` (made if need be), each file atomically.

        Args:
            metadata: where it comes from; kept as far as the format can.

        Returns:
            what its user has to know.

        Raises:
            CheckpointError: the format has nothing that is equal to this SAE.
        """
        raise CheckpointError(
            f"{self.name} cannot hold sae={sae.config.name}: reseed reads it, and does not write it"
        )


class Exporting(Format):
    """A format of another library that is written too.

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
        """`save` of an architecture that is in `exports`."""
