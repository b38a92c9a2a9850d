"""A server that runs reseed commands in forked children of a process that imported everything.

A kill test starts the same command a hundred times; imports take seconds, a fork milliseconds. The
parent never runs a parallel region, because pools of OpenMP or numba threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Ended:
    """The end of a child: its exit status (negative if a signal killed it), output and duration."""

    status: int
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Forks:
    """The tests' connection to the parent. Children run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=os.environ | ONE_THREAD, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def prepare(self, overrides: Sequence[str]) -> list[str]:
        """Return a command that trains this sweep, as `reseed train -m` does.

        The parent composes and checks it, so that its children need not run Hydra.
        """
        self._ask("prepare", list(overrides))
        return ["trained", self._answer()]

    def start(self, command: Sequence[str], fault: dict[str, Any] | None = None) -> int:
        """Start a command, with a ``fault`` (arguments of `faults.put`), and return its pid."""
        self._ask("start", list(command), fault)
        return int(self._answer())

    def end(self, pid: int, after: float | None = None, number: int = signal.SIGKILL) -> Ended:
        """Wait for a child; if it still runs ``after`` so many seconds, send it a signal."""
        self._ask("end", pid, after, int(number))
        status, seconds = json.loads(self._answer())
        return Ended(status, self.said(pid), seconds)

    def run(
        self, command: Sequence[str], fault: dict[str, Any] | None = None,
        after: float | None = None, number: int = signal.SIGKILL,
    ) -> Ended:  # fmt: skip
        """Start a command and wait for its end."""
        return self.end(self.start(command, fault), after, number)

    def said(self, pid: int) -> str:
        """Return the output of a child so far."""
        return (self.folder / f"{pid}.log").read_text()

    def said_when(self, pid: int, ready: Callable[[str], bool], within_s: float = 60) -> str:
        """Wait until a child's output is ``ready``, and return it."""
        end = time.monotonic() + within_s
        while not ready(said := self.said(pid)):
            assert time.monotonic() < end, f"not within {within_s} s; so far: {said}"
            time.sleep(0.005)
        return said

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, *words: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the parent of the forks has died"
        return line.strip()


_prepared: list[tuple[Any, Any]] = []


def _trained(number: int) -> int:
    """Do what `reseed train` does after it has composed and checked everything."""
    from reseed.study.train import train_missing

    failures = train_missing(*_prepared[number])
    for run, error in failures.items():
        print(f"failed: {run}: {error}")
    return 1 if failures else 0


def _prepare(overrides: list[str]) -> int:
    from reseed.cli.hydra_app import CommandLine
    from reseed.cli.plan import check_jobs

    jobs, runtime = check_jobs(CommandLine("train", []), overrides, multirun=True)
    _prepared.append(([job.resolved for job in jobs], runtime))
    return len(_prepared) - 1


def _serve() -> None:
    # Import before the first fork what commands import lazily.
    import matplotlib.pyplot
    import torch
    import transformers.models.llama  # noqa: F401

    import reseed.cli.check
    import reseed.cli.run
    import reseed.compare.cell
    import reseed.study.result
    import reseed.train.group  # noqa: F401

    torch.set_num_threads(1)
    matplotlib.use("agg")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep other output out of the answers
    doing = {"prepare": _prepare, "start": _start, "end": _wait}
    while line := sys.stdin.readline():
        what, *rest = json.loads(line)
        print(json.dumps(doing[what](*rest)), file=answers, flush=True)


def _start(command: list[str], fault: dict[str, Any] | None) -> int:
    pid = os.fork()
    if not pid:
        _child(command, fault)
    Path(f"{pid}.log").touch()
    return pid


def _wait(pid: int, after: float | None, number: int) -> tuple[int, float]:
    started = time.perf_counter()
    while True:
        found, status = os.waitpid(pid, 0 if after is None else os.WNOHANG)
        seconds = time.perf_counter() - started
        if found:
            return os.waitstatus_to_exitcode(status), seconds
        if after is not None and seconds >= after:
            os.kill(pid, number)
            after = None
        else:
            time.sleep(0.001)


def _child(command: list[str], fault: dict[str, Any] | None) -> None:
    log = os.open(f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (for the child's life)
    status = 1
    try:
        if fault is not None:
            import faults

            faults.put(**fault)
        if command[0] == "trained":
            from reseed.cli.errors import run_and_report

            sys.exit(run_and_report(lambda: _trained(int(command[1]))))
        from reseed.cli.main import main

        main(command)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
