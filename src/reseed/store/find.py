"""Look-up of runs and sweeps by folder, by name, or by the beginning of the name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reseed.errors import ReseedError, did_you_mean
from reseed.store.runs import Run, RunError, RunStore
from reseed.store.sweeps import Sweep

MOST_NAMES = 8
"""Maximum number of names that a message lists."""
_SAE_FILE = "sae.json"  # `reseed.sae.checkpoint.DESCRIPTION_FILE`, whose module loads torch


def find_by_name(word: str, outputs: Path | str, sweeps: Path | str) -> Run | Sweep | Path:
    """Find a run, a sweep, or the folder of another SAE by path, name, or the name's beginning.

    Args:
        outputs, sweeps: the folders of runs and of sweeps.

    Raises:
        ReseedError: nothing matches, or several names do.
    """
    for folder in (Path(word), Path(outputs) / word, Path(sweeps) / word):
        if Run(folder).exists:
            return Run(folder)
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
        if folder.is_dir() and _has_sae(folder):
            return folder
    known: dict[str, Run | Sweep] = {run.id: run for run in RunStore(outputs).runs()}
    manifests = Path(sweeps).glob("*/manifest.jsonl")
    known |= {path.parent.name: Sweep(path.parent) for path in sorted(manifests)}
    if name := complete_name(word, known):
        return known[name]
    raise ReseedError(
        f"there is no run, sweep or SAE {word}: no such folder, and nothing of that name in "
        f"{outputs}/ and {sweeps}/.{did_you_mean(word, known)}"
    )


def find_sweep(word: str, root: Path) -> Sweep:
    """Return the sweep that a word names: a folder, a name under ``root``, or its beginning.

    Raises:
        ReseedError: no sweep matches, or several do.
    """
    for folder in (Path(word), root / word):
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
    names = sorted(p.parent.name for p in root.glob("*/manifest.jsonl"))
    if name := complete_name(word, names):
        return Sweep(root / name)
    starts = dict.fromkeys(name.rpartition("-")[0] for name in names)  # without the digest
    raise ReseedError(
        f"there is no sweep {word} in {root}/.{did_you_mean(word, [*names, *starts])}"
    )


def complete_name(word: str, names: Iterable[str]) -> str | None:
    """Return the name that starts with ``word``, or None.

    Raises:
        ReseedError: several names start with it.
    """
    found = [name for name in names if name.startswith(word)]
    if len(found) > 1:
        listed = "".join(f"\n  {name}" for name in found[:MOST_NAMES])
        more = f"\n  and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
        raise ReseedError(f"{word} may be any of these: give more of the name{listed}{more}")
    return found[0] if found else None


def _has_sae(folder: Path) -> bool:
    return (folder / _SAE_FILE).is_file()


def load_run(name: str | Path, outputs: str | Path = "outputs") -> Run:
    """Return a run after verifying its record and its files.

    Args:
        name: a folder, or a name in ``outputs``, or the beginning of one.
        outputs: the folder of the runs.

    Raises:
        ReseedError: nothing has this name, or several have.
        RunError: the record or a file is damaged, or the record belongs to another signature.
    """
    folders = (Path(name), Path(outputs) / name)
    run = next((Run(folder.resolve()) for folder in folders if Run(folder).exists), None)
    if run is None:
        known = {run.id: run for run in RunStore(outputs).runs()}
        found = complete_name(str(name), known)
        if found is None:
            raise RunError(
                f"there is no run {name}: no such folder, and nothing of that name in {outputs}/."
                f"{did_you_mean(str(name), known)}"
            )
        run = Run(known[found].path.resolve())
    run.verify()
    return run
