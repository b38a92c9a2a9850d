"""Judgement of a command line: is a malformed input refused in one line, and nothing written?"""

from __future__ import annotations

import importlib.util
import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from reseed.cli import COMMANDS
from reseed.cli.main import main

LIMIT_S = 10.0
_FORBIDDEN = ("Traceback", "defect of reseed")


@dataclass(frozen=True)
class Case:
    """A malformed input.

    Attributes:
        kind: the row of the printed table.
        words: the command line. ``{shared}`` stands for the folder of `make_shared`.
        make: writes files into the folder in which the command runs.
        message: a part that the message must have.
        may_pass: the input may also be accepted, because a rule of another library ignores the
            value: exit status 0 and no error.
    """

    kind: str
    words: tuple[str, ...]
    make: Callable[[Path], object] | None = None
    message: str = ""
    may_pass: bool = False

    def __str__(self) -> str:
        text = " ".join(self.words)
        return f"{self.kind}: {text if len(text) <= 300 else text[:300] + ' ...'}"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one case: the problem, if any (""), and the seconds of the command."""

    case: Case
    problem: str
    seconds: float
    accepted: bool = False


class _TooLate(BaseException):
    """The end of a command that takes too long."""


def judge(case: Case, root: Path) -> Verdict:
    """Run one command in a new folder below ``root`` and judge what it prints and writes.

    Args:
        root: holds ``shared`` and the cache; commands may write into the cache alone.
    """
    here = root / "here"
    here.mkdir()
    try:
        with _in(here, root):
            _forget()
            if case.make is not None:
                case.make(here)
            before = _files(root)
            started = time.monotonic()
            status, out, err = _run([w.format(shared=root / "shared") if "{shared}" in w else w
                                     for w in case.words])  # fmt: skip
            seconds = time.monotonic() - started
            written = sorted(_files(root) - before)
        accepted = case.may_pass and status == 0 and not err
        problem = "" if accepted else _problem(case, status, out, err, written)
        return Verdict(case, problem, seconds, accepted)
    finally:
        for folder in here.rglob("*"):
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o700)
        shutil.rmtree(here)


def _problem(case: Case, status: int | None, out: str, err: str, written: Sequence[str]) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    if status is None:
        return f"took more than {LIMIT_S:g} s"
    for word in _FORBIDDEN:
        if word in out + err:
            return f"printed {word!r}: {lines[-2] if len(lines) > 1 else lines}"
    if status == 0:
        return "was accepted"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"printed {len(lines)} lines of errors: {lines[:4]}"
    if len(lines[0]) > 2_000:
        return f"printed a line of {len(lines[0]):,} characters: {lines[0][:200]}"
    if case.message not in err:
        return f"does not say {case.message!r}: {lines[0]}"
    return f"wrote {', '.join(written)}" if written else ""


def _run(words: Sequence[str]) -> tuple[int | None, str, str]:
    """Run a command in this process; a status of None means that it took too long."""
    out, err = io.StringIO(), io.StringIO()

    def late(number: int, frame: object) -> None:
        raise _TooLate

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S, 1.0)  # again, if a library swallows the first
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(list(words))
        status: int | None = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except _TooLate:
        status = None
    except BaseException as error:
        status = 1
        err.write(f"Traceback: {type(error).__name__}: {error}\n")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return status, out.getvalue(), err.getvalue()


def _files(root: Path) -> set[str]:
    """List the files below ``root`` with size and time of change, except those of the cache."""
    found = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != root / "cache"]
        for name in (*folders, *names):
            about = Path(folder, name).lstat()
            stamp = "" if name in folders else f" ({about.st_size} bytes, {about.st_mtime_ns})"
            found.add(f"{Path(folder, name).relative_to(root)}{stamp}")
    return found


@contextmanager
def _in(folder: Path, root: Path) -> Iterator[None]:
    """Work in a folder, with the user's folders below ``root`` and no network."""
    own = {
        "RESEED_CACHE": root / "cache",
        "HOME": root,
        "HF_HOME": root / "cache" / "hf",
        "MPLCONFIGDIR": root / "cache" / "matplotlib",
        "TMPDIR": root,
        "HF_HUB_OFFLINE": "1",
    }
    before, place = dict(os.environ), Path.cwd()
    os.environ.update({name: str(value) for name, value in own.items()})
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)


def import_all() -> None:
    """Import what the commands import, which would count as time of the first of them."""
    for name in COMMANDS:
        if importlib.util.find_spec(f"reseed.cli.{name}") is not None:
            importlib.import_module(f"reseed.cli.{name}")
    for name in (
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "pyarrow.parquet",
        "reseed.cli.cluster.command",
    ):
        importlib.import_module(name)


def _forget() -> None:
    """Clear what commands remember of models, texts and SAEs: each case has others of a name."""
    for name in ("experiment.resolve", "sae.pretrained", "activations.text_source",
                 "activations.tokens"):  # fmt: skip
        for value in vars(importlib.import_module(f"reseed.{name}")).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def limit_memory(gib: float = 16) -> None:
    """Let this process fail with MemoryError before the machine runs out of memory."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), most))


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the table of kinds: number, refused, accepted by a rule, failed, slowest."""
    kinds = list(dict.fromkeys(v.case.kind for v in verdicts))
    rows: list[tuple[str, ...]] = [
        ("malformed", "inputs", "refused", "ignored", "failed", "slowest")
    ]
    for kind in (*kinds, "all"):
        own = [v for v in verdicts if kind in (v.case.kind, "all")]
        accepted, failed = sum(v.accepted for v in own), sum(bool(v.problem) for v in own)
        numbers = (len(own), len(own) - accepted - failed, accepted, failed)
        rows.append((kind, *map(str, numbers), f"{max(v.seconds for v in own):.1f} s"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip
