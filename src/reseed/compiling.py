"""numba's `njit`, with signals deferred until a compilation ends.

An exception that a signal handler raises inside the compiler is lost in an LLVM callback, or leaves
a function half compiled: the command would ignore the signal, end with a spurious error, or crash.
A compilation takes a second or two, once per function and machine.
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
    """Listener that holds back signals during a compilation and raises the first one after it."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.noted: list[int] = []

    def on_start(self, event: event.Event) -> None:
        # Signal handlers run only in the main thread; other threads are not interrupted.
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


# A module body runs once per process, so there is one listener.
event.register("numba:compiler_lock", _Deferring())
