"""reseed's own format: ``sae.safetensors`` and ``sae.json`` (`reseed.sae.checkpoint`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from reseed.sae.base import SAE
from reseed.sae.checkpoint import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    load_sae,
    read_metadata,
    save_sae,
)
from reseed.sae.formats.base import Format, Imported


@final
class Reseed(Format):
    """reseed's own format: any architecture, with its whole configuration."""

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
