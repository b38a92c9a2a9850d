"""The activation cache: a chunk read is the chunk computed, or it is computed again."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reseed.activations.cache import ActivationCache, CacheEntry
from reseed.activations.chunk_cache import ChunkCache, DamagedChunkError, read_chunk, write_chunk
from reseed.activations.hookpoints import Hookpoint

HOOK, OTHER = Hookpoint("resid_post", 0), Hookpoint("mlp_out", 2)
CPU = torch.device("cpu")
ROWS, WIDTH = 512, 16
CHUNK = ROWS * WIDTH * 4
FILE = CHUNK + 512
"""Bytes that the cache reserves for a chunk of these tests."""


def activations(c: int, hookpoint: Hookpoint = HOOK, dtype=torch.float32) -> torch.Tensor:
    """Return stand-ins for a model's activations, as a pure function of the chunk."""
    random = torch.Generator().manual_seed(1000 * c + hookpoint.layer)
    return torch.randn(ROWS, WIDTH, generator=random).to(dtype)


class Reader:
    """A reader of chunks through a `ChunkCache` that records computed chunks."""

    def __init__(
        self, folder: Path, budget: int = 1 << 30, key: str = "a", name: str = "m"
    ) -> None:
        self.cache = ActivationCache(folder, budget)
        self.chunk_cache = ChunkCache(self.cache, {"what": key}, f"{name}-{{hookpoint}}")
        self.computed: list[tuple[int, tuple[Hookpoint, ...]]] = []

    def read(self, c: int, *hookpoints: Hookpoint, tokens: str = "t") -> dict:
        hookpoints = hookpoints or (HOOK,)

        def compute(missing):
            self.computed.append((c, tuple(missing)))
            return {h: activations(c, h) for h in missing}

        found = self.chunk_cache.get(c, tokens, hookpoints, compute, CPU)
        for hookpoint, x in found.items():
            assert torch.equal(x, activations(c, hookpoint))
        assert tuple(found) == hookpoints
        return found

    def missed(self, chunks) -> list[int]:
        """Read the chunks in this order, and return those that had to be computed."""
        self.computed.clear()
        for c in chunks:
            self.read(c)
        return [c for c, _ in self.computed]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/[0-9]*.safetensors"))


def forked(job: Callable[[], object]) -> int:
    """Run ``job`` in a forked process and return its pid. It exits with 0 unless ``job`` raises."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    """Wait for a forked process; return its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chunk_comes_back_bit_by_bit_in_its_own_precision(tmp_path: Path, dtype) -> None:
    x = activations(3, dtype=dtype)
    x.view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")]).to(dtype)
    path = tmp_path / "x"
    path.touch()
    write_chunk(path, x, "address")
    found = read_chunk(path, "address")
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), x.view(torch.uint8))
    # The safetensors library reads it too.
    assert torch.equal(load_file(path)["activations"].view(torch.uint8), x.view(torch.uint8))


def test_every_kind_of_damage_is_noticed(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.touch()
    write_chunk(good, activations(0), "address")
    whole = good.read_bytes()
    begin = len(whole) - CHUNK
    bad = tmp_path / "bad"

    def told(content: bytes, address: str = "address") -> str:
        bad.write_bytes(content)
        with pytest.raises(DamagedChunkError) as caught:
            read_chunk(bad, address)
        return str(caught.value)

    for at in (begin, begin + CHUNK // 2, len(whole) - 1):  # one bit of one byte
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        assert told(flipped) == "its checksum is wrong"
    assert told(whole[:-1]) == "its length is wrong"
    assert told(whole[: begin + 10]) == "its length is wrong"
    assert told(whole + b"x") == "its length is wrong"
    assert told(whole, "another") == "it holds other activations than its name says"
    assert told(b"") == told(whole[:5]) == "it has no header"
    assert told(b"\xff" * 4096) == "it has no header"
    assert told(whole[:8] + b"x" * (len(whole) - 8)) == "its header cannot be read"
    # The same bytes under another shape or precision are another tensor.
    assert told(whole.replace(b"[512, 16]", b"[16, 512]")) == "its checksum is wrong"
    assert told(whole.replace(b'"F32"', b'"F64"')) == "its header cannot be read"
    huge = whole.replace(b"[512, 16]", b"[9999999]")
    assert told(huge) == "its header cannot be read"
    assert torch.equal(read_chunk(good, "address"), activations(0))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap", "foreign"])
def test_a_damaged_chunk_is_reported_recomputed_and_replaced(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Reader(tmp_path).missed([0, 1])
    first, second = files(tmp_path)
    content = bytearray(first.read_bytes())
    if damage == "flip":
        content[-100] ^= 64
    first.write_bytes(
        {"flip": bytes(content), "truncate": bytes(content[:-7]), "empty": b"",
         "swap": second.read_bytes(), "foreign": b"notes of mine\n" * 99}[damage]
    )  # fmt: skip
    gc.collect()
    assert Reader(tmp_path).missed([0, 1]) == [0]
    said = capsys.readouterr().out
    assert said.startswith(f"a chunk of the activation cache is computed again: {first}: it")
    assert said.count("\n") == 1
    assert Reader(tmp_path).missed([0, 1]) == []
    assert capsys.readouterr().out == ""


def test_a_cached_chunk_is_not_computed(tmp_path: Path) -> None:
    assert Reader(tmp_path).missed(range(4)) == [0, 1, 2, 3]
    assert Reader(tmp_path).missed([3, 0, 5, 1]) == [5]


def test_each_hookpoint_has_its_own_entry(tmp_path: Path) -> None:
    Reader(tmp_path).read(0, OTHER)
    reader = Reader(tmp_path)
    reader.read(0, HOOK, OTHER)
    assert reader.computed == [(0, (HOOK,))]
    again = Reader(tmp_path)
    again.read(0, HOOK, OTHER)
    again.read(0, HOOK)
    assert again.computed == []


def test_other_tokens_and_other_keys_are_other_chunks(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.read(0)
    reader.read(0, tokens="u")
    assert len(reader.computed) == 2
    assert Reader(tmp_path, key="b").missed([0]) == [0]
    assert len(files(tmp_path)) == 3


def test_one_process_writes_while_another_reads(tmp_path: Path) -> None:
    mine = Reader(tmp_path)
    mine.read(0)

    def other() -> None:
        reader = Reader(tmp_path)
        assert reader.missed([0, 1]) == [1]
        assert len(files(tmp_path)) == 1, "only the other process may write"

    assert ended(forked(other)) == 0
    del mine
    gc.collect()
    assert ended(forked(lambda: Reader(tmp_path).read(1))) == 0
    assert len(files(tmp_path)) == 2


def test_concurrent_processes_read_correct_chunks(tmp_path: Path) -> None:
    def job(order: list[int]) -> None:
        reader = Reader(tmp_path, budget=12 * FILE)
        for c in order * 3:
            reader.read(c)  # compares with the expected chunk

    orders = [list(range(16)), list(range(15, -1, -1)), [c * 5 % 16 for c in range(16)]]
    processes = [forked(lambda order=order: job(order)) for order in orders]
    assert [ended(process) for process in processes] == [0, 0, 0]
    found = files(tmp_path)
    assert 1 <= len(found) <= 12
    assert not list(tmp_path.glob("*/.unfinished-*"))
    assert set(Reader(tmp_path).missed(range(16))) == set(range(16)) - {
        int(path.name[:6]) for path in found
    }


def killed_in_the_middle(folder: Path) -> None:
    """Kill this process after it has written half of chunk 1."""
    cache = ActivationCache(folder, 1 << 30)
    entry = cache.entry({"what": "a", "hookpoint": ["resid_post", 0, None]}, "m-resid_post.0")
    assert entry is not None

    def half(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(b"x" * (CHUNK // 2))
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    entry.write(entry.file(1, "f" * 64), FILE, half)


def test_a_killed_writer_leaves_no_partial_chunk(tmp_path: Path) -> None:
    Reader(tmp_path).read(0)
    gc.collect()
    assert ended(forked(lambda: killed_in_the_middle(tmp_path))) == -signal.SIGKILL
    (entry,) = ActivationCache(tmp_path, 0).stored()
    assert (len(entry.chunks), entry.unfinished) == (1, FILE)
    assert not entry.in_use, "the locks of a dead process are released"
    reader = Reader(tmp_path)
    assert reader.missed([0, 1]) == [1]
    (entry,) = reader.cache.stored()
    assert (len(entry.chunks), entry.unfinished) == (2, 0)


def test_every_file_is_whole_after_kills_at_random_times(tmp_path: Path) -> None:
    chosen = random.Random(time.time_ns())
    reader = Reader(tmp_path)

    def job() -> None:
        for c in range(10_000):
            Reader(tmp_path).read(c % 40)
            if c % 3 == 0:
                for path in files(tmp_path)[:2]:
                    path.unlink(missing_ok=True)

    for _ in range(20):
        process = forked(job)
        time.sleep(chosen.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        for path in files(tmp_path):
            c = int(path.name[:6])
            assert torch.equal(
                read_chunk(path, reader.chunk_cache._address(HOOK, c, "t")), activations(c)
            )
    assert reader.missed(range(40)) != list(range(40)), "something was written"
    assert not list(tmp_path.glob("*/.unfinished-*"))


def test_the_budget_holds_and_sequential_reads_still_hit_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = 3 * FILE + FILE // 2
    reader = Reader(tmp_path, budget)
    assert reader.missed(range(6)) == list(range(6))
    # Evicting the least recently used chunk would always evict the one requested next.
    for _ in range(2):
        assert reader.missed(range(6)) == [3, 4, 5]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= budget
    assert capsys.readouterr().out == (
        f"the activation cache {tmp_path} is full (runtime.activation_cache_gib="
        f"{budget / 2**30:g}): further chunks are not stored\n"
    ), "printed once"


def used(folder: Path, name: str, seconds: int) -> None:
    """Set the last use of an entry ``seconds`` back."""
    (entry,) = folder.glob(f"{name}-*")
    then = entry.stat().st_mtime - seconds
    os.utime(entry / "entry.json", (then, then))


def test_the_least_recently_used_entry_is_evicted_first_from_its_end(tmp_path: Path) -> None:
    for name in ("old", "older", "live"):
        Reader(tmp_path, key=name, name=name).missed(range(3))
    gc.collect()
    used(tmp_path, "old", 1000)
    used(tmp_path, "older", 2000)
    live = Reader(tmp_path, key="live", name="live")
    live.read(0)
    used(tmp_path, "live", 3000)  # in use, so its age does not matter
    reader = Reader(tmp_path, 10 * FILE, key="new", name="new")
    counts = lambda: {e.path.name.split("-")[0]: len(e.chunks) for e in reader.cache.stored()}  # noqa: E731
    assert reader.missed(range(3)) == [0, 1, 2]
    assert counts() == {"new": 3, "old": 3, "older": 1, "live": 3}
    assert [p.name[:6] for p in files(tmp_path) if "older" in str(p)] == ["000000"]
    reader.missed(range(7))
    assert counts() == {"new": 7, "live": 3}, "an entry in use is not removed"
    reader.missed(range(9))
    assert counts() == {"new": 7, "live": 3}
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 10 * FILE


def test_a_smaller_budget_holds_from_the_start(tmp_path: Path) -> None:
    Reader(tmp_path).missed(range(6))
    gc.collect()
    # The new entry is in use by then, but idle entries are evicted.
    Reader(tmp_path, 2 * FILE, key="b", name="b").read(0)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 2 * FILE


def test_a_chunk_larger_than_the_budget_removes_nothing_in_use(tmp_path: Path) -> None:
    reader = Reader(tmp_path, budget=10)
    assert reader.missed([0, 0]) == [0, 0]
    assert files(tmp_path) == []


def test_a_full_disk_ends_the_writing_and_leaves_no_partial_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        reader = Reader(tmp_path)
        reader.read(0)
        # A file-size limit simulates a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK // 2, CHUNK // 2))
        assert reader.missed(range(4)) == [1, 2, 3]

    assert ended(forked(job)) == 0
    assert len(files(tmp_path)) == 1
    assert not list(tmp_path.glob("*/.unfinished-*"))


def test_a_full_disk_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from reseed.activations import chunk_cache

    def full(path: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(chunk_cache, "write_chunk", full)
    assert Reader(tmp_path).missed(range(3)) == [0, 1, 2]
    assert capsys.readouterr().out == (
        f"cannot write to the activation cache {tmp_path} (No space left on device): "
        "further chunks are not stored\n"
    )


def test_an_unusable_folder_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    reader = Reader(tmp_path / "file" / "cache")
    reader.read(0, HOOK, OTHER)
    assert reader.missed([0, 1]) == [0, 1]
    assert capsys.readouterr().out == (
        f"the activation cache {tmp_path / 'file' / 'cache'} cannot be used: Not a directory\n"
    )


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "notes-0123456789abcdef01234567"  # like an entry, but without its record
    mine.mkdir()
    for path in (mine / "000000-0123456789abcdef.safetensors", tmp_path / "thesis.tex"):
        path.write_text("x" * 10_000)
    reader = Reader(tmp_path, budget=FILE)
    reader.missed([0, 1])
    del reader
    gc.collect()
    removed, kept = ActivationCache(tmp_path, 0).clear()
    assert (len(removed), kept) == (1, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", mine.name, "thesis.tex"]
    assert len(list(mine.iterdir())) == 1


def test_clear_by_part_of_the_name_spares_entries_in_use(tmp_path: Path) -> None:
    for name in ("gpt-docs", "gpt-pile", "llama-docs"):
        Reader(tmp_path, key=name, name=name).read(0)
    gc.collect()
    cache = ActivationCache(tmp_path, 0)
    live = Reader(tmp_path, key="gpt-pile", name="gpt-pile")
    live.read(0)
    removed, kept = cache.clear("gpt")
    assert [e.path.name.split("-resid")[0] for e in removed] == ["gpt-docs"]
    assert [e.path.name.split("-resid")[0] for e in kept] == ["gpt-pile"]
    assert live.missed([0]) == []
    assert cache.clear("*pile*order*") == ([], [])
    del live
    gc.collect()
    assert [len(part) for part in cache.clear()] == [2, 0]
    assert cache.stored() == []


def test_entry_json_holds_the_key(tmp_path: Path) -> None:
    Reader(tmp_path, key="all that").read(0)
    (record,) = tmp_path.glob("*/entry.json")
    assert json.loads(record.read_text()) == {
        "what": "all that", "hookpoint": ["resid_post", 0, None],
    }  # fmt: skip


def test_an_unreferenced_entry_is_idle(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, 0)
    entry: CacheEntry | None = cache.entry({}, "x")
    assert [stored.in_use for stored in cache.stored()] == [True]
    del entry
    gc.collect()
    assert [stored.in_use for stored in cache.stored()] == [False]
    handle = os.open(next(tmp_path.glob("x-*")) / ".use", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_SH)
    assert [stored.in_use for stored in cache.stored()] == [True]
    os.close(handle)
