"""Search path for options from elsewhere: those of the user and those of installed packages.

The user's are the yaml files in the folder RESEED_CONFIG_DIR. An installed package names its folder
by an entry point in the group ``reseed.conf``, for example ``mine = my_package.conf``. reseed's own
options come first, so that none of them can be replaced.
"""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ReseedSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from reseed.cli.hydra_app import conf_dir
        from reseed.config import CONF

        folder = os.environ.get("RESEED_CONFIG_DIR")
        if folder:
            search_path.append("reseed-user", f"file://{Path(folder).expanduser().resolve()}")
        # Hydra calls this plugin in every program of the environment that uses Hydra.
        if any(element.path == conf_dir() for element in search_path.get_path()):
            for entry in entry_points(group=CONF):
                search_path.append(f"reseed-{entry.name}", f"file://{_folder(entry)}")


def _folder(entry: EntryPoint) -> Path:
    """Return the folder that an installed package names, without importing the package.

    Raises:
        ReseedError: there is no such folder.
    """
    from reseed.errors import plugin_error

    package, *below = entry.value.split(".")
    spec = find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or ()
    for folder in (Path(place, *below) for place in places):
        if folder.is_dir():
            return folder.resolve()
    raise plugin_error(entry, f"there is no folder {entry.value}")
