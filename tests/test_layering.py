"""Tests that imports point one way, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "reseed"

# Parts of reseed that each part may import; `cli` may import everything.
TOP = {"cli", "__init__", "__main__"}
BOTTOM = {"config", "atomic", "compiling", "console", "devices", "locks", "ranks"}
ALLOWED = {
    "activations": {"activations"},
    "sae": {"sae"},
    "train": {"train", "activations", "sae", "evaluate", "runs"},
    "evaluate": {"evaluate", "activations", "sae", "evaluations", "contexts"},
    "compare": {"compare", "runs"},
    "report": {"report", "compare", "evaluations", "contexts", "runs", "sweeps"},
    "assets": {"assets", "activations"},
    "runs": {"sae", "environment"},
    "environment": set(),
    "sweeps": {"runs"},
    "evaluations": {"environment"},
    "contexts": {"evaluations"},
    "calibration": set(),
    "experiment": {"activations", "sae", "train", "runs"},
    "missing": {"experiment", "calibration", "follow", "train", "runs"},
    "follow": {"experiment", "sae", "train", "runs"},
    "config": set(),
    "atomic": set(),
    "compiling": set(),
    "console": set(),
    "devices": set(),
    "locks": set(),
    "ranks": set(),
}
# Third-party packages that only some parts may import.
ONLY = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "lightning": {"train"},
    "transformers": {"activations", "assets"},
    "datasets": {"activations"},
    "numba": {"compiling", "sae"},  # sae defines its own intrinsics
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.append((part, path))
    return found


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, at the top or inside functions.

    Leaves out imports under TYPE_CHECKING.
    """
    tree = ast.parse(path.read_text())
    checking = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]  # fmt: skip
    ignored = {id(inner) for node in checking for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong(part: str, names: set[str]) -> list[str]:
    """Return the imports that ``part`` may not make."""
    found = []
    for name in sorted(names):
        root, *rest = name.split(".")
        if root == "reseed" and part not in TOP:
            allowed = ALLOWED[part] | BOTTOM | {"__version__"}
            found += [name] if rest and rest[0] not in allowed else []
        elif root in ONLY and part not in ONLY[root]:
            found.append(name)
    return found


@pytest.mark.parametrize(("part", "path"), modules(), ids=lambda v: str(v).split("src/")[-1])
def test_imports_point_down(part: str, path: Path) -> None:
    assert part in ALLOWED or part in TOP, f"add {part} to ALLOWED"
    assert wrong(part, imports(path)) == []


def test_forbidden_imports_are_found(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "import torch\nfrom reseed.config import Config\n"
        "def f():\n    from reseed.train.group import fit_group\n    import hydra.core\n"
    )
    assert wrong("sae", imports(path)) == ["hydra.core", "reseed.train.group.fit_group"]
    assert wrong("cli", imports(path)) == []
    assert wrong("experiment", imports(path)) == ["hydra.core"]
