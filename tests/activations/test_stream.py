"""Prefetched chunks are the same chunks, none is computed twice, and no thread is left."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator

import pytest
import torch

from reseed.activations.dataset import STRIPES, DatasetConfig, Position
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.stream import Abandoned, ChunkStream, deal_stripes, generator, prefetch_pays

HOOK = Hookpoint("resid_post", 0)
TOKENS = 64
WAIT_S = 20.0


class Counted(ChunkStream):
    """A stream that records started chunks and their threads, and can fail or be slow."""

    def __init__(self, fails_at: int = -1, dawdles_at: int = -1) -> None:
        config = DatasetConfig(chunk_tokens=TOKENS)
        super().__init__(config, [HOOK], torch.device("cpu"))
        self.begun: list[tuple[int, bool]] = []
        self.threads: set[int] = set()
        self.dawdling = threading.Event()
        self.dropped = threading.Event()
        self._fails_at, self._dawdles_at = fails_at, dawdles_at

    def _compute_chunk(self, c: int) -> dict[Hookpoint, torch.Tensor]:
        ahead = threading.current_thread() is not threading.main_thread()
        self.begun.append((c, ahead))
        self.threads.add(torch.get_num_threads())
        if c == self._fails_at:
            raise ValueError(f"chunk {c} cannot be computed")
        if c == self._dawdles_at:
            self.dawdling.set()
            try:
                end = time.monotonic() + WAIT_S
                while time.monotonic() < end:
                    self._check_wanted()
                    time.sleep(0.005)
            except Abandoned:
                self.dropped.set()
                raise
        x = torch.randn(TOKENS, 4, generator=generator(c))
        return {HOOK: deal_stripes(x, self._permutation(c, TOKENS // STRIPES))}


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("reseed-prefetch")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert workers() == []
    yield
    assert workers() == []


def end(steps: int, size: int = 32) -> Position:
    """Return the position where ``steps`` batches end."""
    last = Counted().position(steps - 1, size)
    return Position(last.chunk, last.row + size // STRIPES)


def read(stream: ChunkStream, steps: int, size: int = 32, start: int = 0) -> list[torch.Tensor]:
    batches = stream.batches(size, start)
    return [next(batches)[HOOK] for _ in range(steps - start)]


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_are_the_same_and_each_chunk_is_computed_once(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, ahead = Counted(), Counted()
        expected = read(plain, 10)
        with ahead.prefetching(end(10), 32, True):
            found = read(ahead, 10)
            assert len(workers()) == 1
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert plain.begun == [(c, False) for c in range(5)]
    # No chunk beyond the end of training, and only the first in the main thread.
    assert ahead.begun == [(0, False)] + [(c, True) for c in range(1, 5)]
    # Torch's thread count is a setting of each calling thread and can change the last bits.
    assert ahead.threads == {threads}


def test_the_thread_starts_only_if_there_is_a_second_chunk() -> None:
    stream = Counted()
    with stream.prefetching(end(2), 32, True):
        assert workers() == []
        read(stream, 2)
        assert workers() == []
    assert stream.begun == [(0, False)]


def test_a_chunk_in_memory_is_not_computed_again() -> None:
    """Training may start with the chunk from which the initial weights were computed."""
    stream = Counted()
    stream.chunk(0)
    with stream.prefetching(end(6), 32, True):
        read(stream, 6)
    assert [c for c, _ in stream.begun] == [0, 1, 2]


def test_resuming_in_the_middle_computes_no_earlier_chunk() -> None:
    stream = Counted()
    with stream.prefetching(end(10), 32, True):
        found = read(stream, 10, start=5)
    assert [c for c, _ in stream.begun] == [2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(found, read(Counted(), 10)[5:], strict=True))


def test_a_group_with_several_batch_sizes_and_budgets_is_prefetched_to_its_end() -> None:
    stream = Counted()
    stop = max(end(3, 64), end(8, 16))
    with stream.prefetching(stop, 16, True):
        for c in range(3):
            stream.chunk(c)
    assert [c for c, _ in stream.begun] == [0, 1, 2], "3 × 64 tokens are three chunks"


def test_chunks_without_a_batch_are_not_computed() -> None:
    """The last chunk of an epoch may be too short for one batch."""

    class Short(Counted):
        def rows(self, c: int) -> int:
            return 3 if c % 3 == 2 else TOKENS // STRIPES

    stream = Short()
    with stream.prefetching(Position(5, 0), 32, True):
        for c in (0, 1, 3, 4):
            stream.chunk(c)
    assert [c for c, _ in stream.begun] == [0, 1, 3, 4]


def test_an_error_is_raised_at_the_step_that_needs_the_chunk_with_its_traceback() -> None:
    stream = Counted(fails_at=2)
    with stream.prefetching(end(10), 32, True):
        batches = stream.batches(32)
        for _ in range(4):  # chunks 0 and 1
            next(batches)
        with pytest.raises(ValueError, match="chunk 2 cannot be computed") as caught:
            next(batches)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "_compute_chunk" in names
    assert "_work" in names


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_training_ends_the_thread_soon(error: type[BaseException]) -> None:
    stream = Counted(dawdles_at=1)
    started = time.monotonic()

    def training() -> None:
        with stream.prefetching(end(10), 32, True):
            stream.chunk(0)
            assert stream.dawdling.wait(WAIT_S)
            raise error

    with pytest.raises(error):
        training()
    assert stream.dropped.is_set()
    assert time.monotonic() - started < WAIT_S / 2
    # The stream is still usable.
    assert torch.equal(stream.chunk(2)[HOOK], Counted().chunk(2)[HOOK])


def test_a_chunk_out_of_order_is_correct() -> None:
    stream = Counted(dawdles_at=1)
    with stream.prefetching(end(20), 32, True):
        stream.chunk(0)
        assert stream.dawdling.wait(WAIT_S)
        assert torch.equal(stream.chunk(4)[HOOK], Counted().chunk(4)[HOOK])
        assert stream.dropped.is_set(), "only one thread at a time may read the source"
        assert torch.equal(stream.chunk(5)[HOOK], Counted().chunk(5)[HOOK])


def test_prefetching_keeps_one_more_chunk_in_memory() -> None:
    """The chunk in use is alive when the thread starts the next one."""
    import weakref

    alive: list[int] = []
    known: list[weakref.ref] = []

    class Watched(Counted):
        def _compute_chunk(self, c: int) -> dict[Hookpoint, torch.Tensor]:
            alive.append(sum(ref() is not None for ref in known))
            found = super()._compute_chunk(c)
            known.append(weakref.ref(found[HOOK]))
            return found

    for wanted, most in ((False, 0), (True, 1)):
        alive.clear()
        known.clear()
        stream = Watched()
        with stream.prefetching(end(12), 32, wanted):
            for _ in stream.batches(32, 0):
                if len(alive) == 6:
                    break
        assert max(alive) == most


def test_without_prefetching_there_is_no_thread() -> None:
    stream = Counted()
    with stream.prefetching(end(10), 32, False):
        read(stream, 10)
    assert stream.begun == [(c, False) for c in range(5)]


def test_prefetching_pays_on_a_gpu_or_with_idle_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4)), raising=False)
    for threads, expected in ((1, True), (2, True), (3, False), (4, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert prefetch_pays(torch.device("cpu")) == expected
    assert prefetch_pays(torch.device("cuda"))
