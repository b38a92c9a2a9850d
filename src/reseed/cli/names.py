"""Runs, sweeps and SAEs as a command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from reseed.cli.app import CommandLine
from reseed.config import ConfigError, ReseedError, build, nearest
from reseed.runs import Run, RunStore
from reseed.sweeps import Sweep
from reseed.train.config import RuntimeConfig


def runtime_of(line: CommandLine) -> RuntimeConfig:
    """Where a command finds the runs that it names."""
    with line.composer() as composed:
        values = composed(line.overrides)
    return build(values["runtime"], "runtime", RuntimeConfig)


def meant_by(word: str, runtime: RuntimeConfig) -> Run | Sweep | Path:
    """A run, a sweep, or the folder of an SAE that is neither; by path, name, or begin of one."""
    for folder in (Path(word), Path(runtime.outputs) / word, Path(runtime.sweeps) / word):
        if Run(folder).exists:
            return Run(folder)
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
        if folder.is_dir() and _has_sae(folder):
            return folder
    known: dict[str, Run | Sweep] = {run.id: run for run in RunStore(runtime.outputs).runs()}
    sweeps = Path(runtime.sweeps).glob("*/manifest.jsonl")
    known |= {path.parent.name: Sweep(path.parent) for path in sorted(sweeps)}
    if name := begun_by(word, known):
        return known[name]
    raise ReseedError(
        f"there is no run, sweep or SAE {word}: no such folder, and nothing of that name in "
        f"{runtime.outputs}/ and {runtime.sweeps}/.{nearest(word, known)}"
    )


def begun_by(word: str, names: Iterable[str]) -> str | None:
    """The name that begins with a word; None where there is none.

    Raises:
        ReseedError: there are several.
    """
    found = [name for name in names if name.startswith(word)]
    if len(found) > 1:
        raise ReseedError(f"{word} may be any of {', '.join(found)}: say more of the name")
    return found[0] if found else None


def _has_sae(folder: Path) -> bool:
    from reseed.sae.checkpoint import DESCRIPTION_FILE

    return (folder / DESCRIPTION_FILE).is_file()


def check_heeded(line: CommandLine, also: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for what would change nothing: runs say what they were trained on.

    Args:
        also: keys that the command heeds beside those of ``runtime`` and ``hydra``.
    """
    for text in line.overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("/")[0] not in ("runtime", "hydra", *also):
            raise ConfigError(
                f"{{key}} is not for runs and sweeps that are named: they say themselves what they "
                f"were trained on; got {text}",
                key,
            )
