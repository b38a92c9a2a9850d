"""Search path for the user's own options: yaml files in the folder RESEED_CONFIG_DIR."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ReseedSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = os.environ.get("RESEED_CONFIG_DIR")
        if folder:
            search_path.append("reseed-user", f"file://{Path(folder).expanduser().resolve()}")
