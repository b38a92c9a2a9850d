"""Folders are deleted in few places, each of which deletes only what reseed made."""

from __future__ import annotations

import ast
from pathlib import Path

import reseed

PLACES = {
    "activations/cache.py": "entries: folders with a digest in the name, and no links",
    "distributed/launcher.py": "the private folder in which it lets processes meet",
    "distributed/worker.py": "the same folder, if the leader was killed",
    "sae/formats/__init__.py": "a folder that the same call created",
    "system/files.py": "its temporary folders; callers of `atomic_folder` check the earlier one",
}


def test_folders_are_deleted_in_known_places() -> None:
    root = Path(reseed.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Attribute)}  # fmt: skip
        if names & {"rmtree", "removedirs", "rmdir"}:
            found.add(path.relative_to(root).as_posix())
    assert found == set(PLACES)
