"""numba, which every compiled loop comes from, compiles to the end before a signal is heeded.

An exception that a signal raises inside the compiler is lost in a callback of LLVM, or leaves a
function half compiled: the command would go on as if nothing had been asked, end with an error that
is none, or crash. It takes a second or two, once for each function on each machine.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from numba import njit
from numba.core import event

__all__ = ["njit"]

_HEEDED = (signal.SIGINT, signal.SIGTERM)


class _Deferring(event.Listener):
    """Notes signals between the start and the end of a compilation, and raises them after it."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.noted: list[int] = []

    def on_start(self, event: event.Event) -> None:
        # Handlers run in the main thread alone; other threads are not interrupted.
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth += 1
        if self.depth == 1:
            self.handlers = {number: signal.signal(number, self._note) for number in _HEEDED}

    def on_end(self, event: event.Event) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth -= 1
        if self.depth:
            return
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        noted, self.noted = self.noted, []
        if noted:
            signal.raise_signal(noted[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted.append(number)


# A module's first line runs once in a process: one listener.
event.register("numba:compiler_lock", _Deferring())
