"""Tests that a signal during numba's compilation is handled after it."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from numba.core import event

from reseed.system.compiling import njit

KIND = "numba:compiler_lock"


def test_a_signal_waits_for_the_end_of_the_outermost_compilation() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    event.start_event(KIND)
    event.start_event(KIND)
    os.kill(os.getpid(), signal.SIGINT)
    event.end_event(KIND)
    with pytest.raises(KeyboardInterrupt):
        event.end_event(KIND)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class CtrlC(event.Listener):
    """Listener that sends SIGINT from inside the compiler."""

    def on_start(self, event: event.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def on_end(self, event: event.Event) -> None: ...


def test_a_signal_does_not_interrupt_a_compilation() -> None:
    @njit
    def total(n: int) -> float:
        found = 0.0
        for i in range(n):
            found += (i % 7) * 0.5
        return found

    with event.install_listener("numba:compile", CtrlC()), pytest.raises(KeyboardInterrupt):
        total(10)
    assert total.signatures, "the compilation ends before the signal is handled"
    assert total(10) == sum((i % 7) * 0.5 for i in range(10))


def test_compiling_in_another_thread_leaves_signal_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: (event.start_event(KIND), event.end_event(KIND)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
