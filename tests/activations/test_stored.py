"""Stored activations: formats, shards, split and order, memory, and what is refused."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.stored import (
    ResolvedActivations,
    Shards,
    StoredActivationsConfig,
    StoredConfig,
)
from reseed.activations.stored_files import held_out_units, write_tensor
from reseed.activations.text import DocstringsConfig
from reseed.cli import evaluate, run, show, status, train
from reseed.errors import ConfigError, ReseedError
from reseed.store.runs import RunStore

HOOK = Hookpoint("resid_post", 0)
DATA = StoredConfig(chunk_tokens=256, held_out_tokens=64, held_out_fraction=0.25)
WIDTH, ROWS = 6, 2_048
FORMATS = ("npy", "safetensors", "parquet", "pt")


def numbered(rows: int = ROWS) -> torch.Tensor:
    """Return rows whose first number is the row's index, so that each can be recognised."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(rows)
    return x


def write(path: Path, x: torch.Tensor) -> Path:
    """Write a tensor in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix.lower():
        case ".npy":
            np.save(path, x.numpy())
        case ".safetensors":
            save_file({"x": x.contiguous()}, path)
        case ".pt":
            torch.save(x, path)
        case ".parquet":
            values = pa.array(x.reshape(-1).numpy())
            lists = pa.FixedSizeListArray.from_arrays(values, x.shape[-1])
            pq.write_table(pa.table({"x": lists}), path, row_group_size=300)
    return path


def resolve(path: Path, cache: Path | None = None, **options: Any) -> ResolvedActivations:
    config = StoredActivationsConfig(path=str(path), **options)
    return config.resolve(cache or path.parent / "cache")


def stream(found: ResolvedActivations, data: StoredConfig = DATA):
    return opened(found, data).stream([HOOK])


def opened(found: ResolvedActivations, data: StoredConfig = DATA):
    return found.data(data, Path("unused")).open(torch.device("cpu"), needed=0)


def indices(*parts: torch.Tensor) -> list[int]:
    """Return the index of each row of `numbered`."""
    return [int(i) for x in parts for i in x.reshape(-1, x.shape[-1])[:, 0]]


def epoch(found: ResolvedActivations, data: StoredConfig = DATA, number: int = 0) -> list[int]:
    """Return the indices of the rows of one epoch, in order."""
    chunks = stream(found, data)
    each = -(-chunks.num_activations // data.chunk_tokens)
    return indices(*(chunks.chunk(number * each + c)[HOOK] for c in range(each)))


def held_out(found: ResolvedActivations, data: StoredConfig = DATA) -> list[int]:
    source = opened(found, data)
    return indices(*(x[HOOK] for x in source.held_out([HOOK], source.held_out_available)))


def test_formats_and_shards_hold_the_same_activations(tmp_path: Path) -> None:
    x = numbered()
    first = resolve(write(tmp_path / "one.npy", x))
    expected = stream(first).chunk(1)[HOOK]
    for ending in FORMATS:
        for i, shard in enumerate(x.split(430)):
            write(tmp_path / ending / f"part-{i * 3}.{ending}", shard)  # part-12 comes last
        for found in (resolve(tmp_path / ending), resolve(write(tmp_path / f"all.{ending}", x))):
            assert found.fingerprint == first.fingerprint
            assert torch.equal(stream(found).chunk(1)[HOOK], expected)
            assert held_out(found) == held_out(first)
    # Sequences are another data set: their positions are held out together.
    sequences = x.view(-1, 32, WIDTH)
    prints = {resolve(write(tmp_path / f"three.{ending}", sequences)).fingerprint
              for ending in FORMATS if ending != "parquet"}  # fmt: skip
    assert len(prints) == 1
    assert first.fingerprint not in prints
    assert resolve(tmp_path / "npy").label == "npy"
    assert resolve(tmp_path / "one.npy").label == "one"


def test_columns_of_numbers_and_chosen_tensors_are_read(tmp_path: Path) -> None:
    x = numbered(100)
    expected = resolve(write(tmp_path / "one.npy", x)).fingerprint
    columns = {f"c{i}": x[:, i].numpy() for i in range(WIDTH)}
    pq.write_table(pa.table(columns), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"id": range(100), "x": x.tolist()}), tmp_path / "lists.parquet")
    np.save(tmp_path / "columns_first.npy", np.asfortranarray(x.numpy()))
    save_file({"x": x, "y": x[:50].clone()}, tmp_path / "two.safetensors")
    torch.save({"x": torch.nn.Parameter(x), "y": 3}, tmp_path / "two.PT")
    assert resolve(tmp_path / "columns.parquet").fingerprint == expected
    assert resolve(tmp_path / "columns_first.npy").fingerprint == expected
    assert resolve(tmp_path / "two.safetensors", tensor="x").fingerprint == expected
    assert resolve(tmp_path / "two.PT").fingerprint == expected
    lists = resolve(tmp_path / "lists.parquet", field="x")  # Python's floats are float64
    assert lists.shards.tensors[0].dtype == torch.float64
    chunks = (stream(found).chunk(0)[HOOK] for found in (lists, resolve(tmp_path / "one.npy")))
    assert torch.equal(*chunks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_keeps_its_values(dtype: torch.dtype, tmp_path: Path) -> None:
    x = numbered(512).bfloat16().to(dtype)
    for ending in ("pt", "safetensors"):
        chunk = stream(resolve(write(tmp_path / f"x.{ending}", x))).chunk(0)[HOOK]
        assert chunk.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        assert {tuple(row) for row in chunk.reshape(-1, WIDTH).double().tolist()} <= {
            tuple(row) for row in x.double().tolist()
        }


@pytest.mark.parametrize("positions", [None, 16])
def test_an_epoch_reads_each_training_row_once_and_none_that_is_held_out(
    positions: int | None, tmp_path: Path
) -> None:
    x = numbered() if positions is None else numbered().view(-1, positions, WIDTH)
    for i, shard in enumerate(x.split(len(x) // 3)):
        write(tmp_path / f"{i}.npy", shard)
    found, again = resolve(tmp_path), replace(DATA, repeat=True)
    trained, kept = epoch(found), held_out(found)
    assert sorted(trained + kept) == list(range(ROWS))
    unit = positions or 64
    assert {i // unit for i in trained}.isdisjoint({i // unit for i in kept})
    assert len(kept) == unit * int(held_out_units(ROWS // unit, 0.25).sum())
    for other in (epoch(found, again, 1), epoch(found, replace(DATA, order_seed=1))):
        assert sorted(other) == sorted(trained)
        assert set(other[:256]) != set(trained[:256])
    assert held_out(found, replace(DATA, order_seed=1, chunk_tokens=128)) == kept
    # Stripes hold neighbours of the order only: a chunk is shuffled, and no stripe is sorted.
    assert trained[:32] != sorted(trained[:32])


def test_appended_shards_move_no_row_between_the_parts(tmp_path: Path) -> None:
    x = numbered()
    write(tmp_path / "0.npy", x[:1_000])
    before = resolve(tmp_path)
    trained, kept = epoch(before), held_out(before)
    write(tmp_path / "1.npy", x[1_000:])
    after = resolve(tmp_path)
    assert set(trained) <= set(epoch(after))
    assert set(kept) <= set(held_out(after))
    assert before.fingerprint != after.fingerprint


def test_the_held_out_share_is_the_declared_one() -> None:
    for fraction in (0.001, 0.05, 0.5, 0.999):
        share = held_out_units(1_000_000, fraction).mean()
        assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / 1e6) ** 0.5
    mask = held_out_units(100_000, 0.5)  # units that follow each other are independent
    assert abs((mask[1:] == mask[:-1]).mean() - 0.5) < 0.01


def test_batches_can_start_at_any_step_of_any_epoch(tmp_path: Path) -> None:
    found, data = resolve(write(tmp_path / "x.npy", numbered(1_000))), replace(DATA, repeat=True)
    batches = stream(found, data).batches(32)
    first = [next(batches)[HOOK] for _ in range(60)]
    assert stream(found, data).num_batches(32) is None
    for start in (7, 23, 24, 59):
        again = next(stream(found, data).batches(32, start=start))[HOOK]
        assert torch.equal(again, first[start])
    per_epoch = stream(found).num_batches(32)
    assert per_epoch is not None
    assert set(indices(first[0])) != set(indices(first[per_epoch]))
    for number in (0, 1):
        rows = indices(*first[number * per_epoch : (number + 1) * per_epoch])
        assert len(rows) == len(set(rows)) == per_epoch * 32


def test_each_rank_reads_its_stripes(tmp_path: Path) -> None:
    found = resolve(write(tmp_path / "x.npy", numbered()))
    whole = stream(found).chunk(0)[HOOK]
    half = stream(found)
    half.stripes = slice(4, 8)
    assert torch.equal(half.chunk(0)[HOOK], whole[4:])


@contextmanager
def growth_of_memory() -> Iterator[list[float]]:
    """Append the largest growth of this process's own memory in MiB; mapped files do not count."""

    def own() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    seen, done, before = [own()], threading.Event(), own()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(own())

    found: list[float] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(seen) - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_large_files_are_mapped_and_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 128 MB, mostly holes, needs less than half of it."""
    path = tmp_path / "x.npy"
    mapped = np.lib.format.open_memmap(path, "w+", np.float32, (500_000, 64))
    mapped[-1] = 1
    del mapped
    with growth_of_memory() as grown:
        found = resolve(path)
        chunk = stream(found, replace(DATA, chunk_tokens=8_192)).chunk(3)[HOOK]
        assert chunk.shape == (8, 1_024, 64)
    assert grown[0] < 60
    monkeypatch.setattr(Shards, "fingerprint", lambda shards: "read again")
    assert resolve(path).fingerprint == found.fingerprint
    os.utime(path, ns=(0, time.time_ns()))
    assert resolve(path).fingerprint == "read again"


@pytest.mark.parametrize("ending", ["safetensors", "pt", "parquet"])
def test_the_tensors_of_a_large_file_are_told_apart(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reseed.activations.stored._SMALL", 0)
    path, option = tmp_path / f"x.{ending}", "field" if ending == "parquet" else "tensor"
    three = {"a": X, "b": X + 1, "c": with_bad(X, (5, 0), float("nan"))}
    if ending == "safetensors":
        save_file(three, path)
    elif ending == "pt":
        torch.save(three, path)
    else:
        pq.write_table(pa.table({name: x.tolist() for name, x in three.items()}), path)
    prints = [resolve(path, tmp_path, **{option: name}).fingerprint for name in "abab"]
    assert prints[:2] == prints[2:]
    assert prints[0] != prints[1]
    with pytest.raises(ConfigError, match=r"row 5 of .* has nan at index 0"):
        resolve(path, tmp_path, **{option: "c"})


def test_a_parquet_file_has_one_copy_which_is_renewed(tmp_path: Path) -> None:
    copies = tmp_path / "cache" / "activations"
    path = write(tmp_path / "x.parquet", numbered(128))
    before = resolve(path)
    (copy,) = copies.iterdir()
    made = copy.stat().st_mtime_ns
    assert resolve(path).fingerprint == before.fingerprint
    assert copy.stat().st_mtime_ns == made
    with copy.open("r+b") as file:
        file.truncate(200)
    assert resolve(path).fingerprint == before.fingerprint
    kept = resolve(path)
    write(path, numbered(256))
    assert torch.equal(resolve(path).shards.tensors[0], numbered(256))
    assert torch.equal(kept.shards.tensors[0], numbered(128)), "a mapped copy must not change"
    assert [*copies.iterdir()] == [copy]


def test_files_that_change_after_the_check_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy", numbered(128))
    config = StoredActivationsConfig(path=str(path))
    found, stamped = config.resolve(tmp_path / "cache"), config.stamp()
    write(path, numbered(256))
    assert config.stamp() != stamped
    with pytest.raises(ReseedError, match="the files of x have changed, or are gone, since they"):
        opened(found)


def test_a_written_tensor_is_read_back(tmp_path: Path) -> None:
    x = torch.randn(7, 3, 5).bfloat16()
    write_tensor(tmp_path / "x.safetensors", x.shape, x.dtype, x.split(2))
    assert torch.equal(resolve(tmp_path / "x.safetensors").shards.tensors[0], x)


def with_bad(x: torch.Tensor, at: tuple[int, ...], value: float) -> torch.Tensor:
    x = x.clone()
    x[at] = value
    return x


X = numbered(64)
REFUSED = {
    "int.npy": (X.int(), "activations must be one of float32, .*int.npy is int32"),
    "complex.npy": (X.to(torch.complex64), "activations must be one of .* is complex64"),
    "one.npy": (X[0], r"must be \[rows, width\] or \[seq.*one.npy is float32 \[6\]"),
    "four.npy": (X.view(2, 2, 16, 6), r"four.npy is float32 \[2, 2, 16, 6\]"),
    "thin.pt": (X[:, :0], r"thin.pt is float32 \[64, 0\]"),
    "none.npy": (X[:0], "`path` must hold activations; all shards are empty"),
    "nan.npy": (with_bad(X, (17, 3), float("nan")), r"row 17 of .* \(from 0\) has nan at index 3"),
    "inf.pt": (with_bad(X.view(4, 16, 6), (2, 5, 1), -float("inf")), "position 5 of sequence 2 of"),
    "big.pt": (with_bad(X.double(), (3, 0), 1e300), r"finite in float32; row 3 of .* has 1e\+300"),
    "sparse.pt": (X.to_sparse(), "sparse.pt must be a dense tensor"),
    "bool.safetensors": (X > 0, "bool.safetensors is bool"),
    "list.pt": ([X], "list.pt cannot be read: it must hold a tensor or a dict"),
    "code.pt": ({"x": Path}, "code.pt cannot be read: it holds other things than tensors"),
    "two.pt": ({"a": X, "b": X}, r"`tensor` is required: .*two.pt holds several \(a, b\)"),
    "empty.pt": ({}, "empty.pt holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_holds_no_activations_is_refused(name: str, tmp_path: Path) -> None:
    x, message = REFUSED[name]
    path = tmp_path / name
    torch.save(x, path) if name.endswith(".pt") else write(path, x)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        resolve(path)


def test_a_wrong_folder_or_option_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "mixed" / "a.npy", X)
    write(tmp_path / "mixed" / "b.pt", X)
    write(tmp_path / "widths" / "a.npy", X)
    write(tmp_path / "widths" / "b.npy", X[:, :5])
    write(tmp_path / "kinds" / "a.npy", X)
    write(tmp_path / "kinds" / "b.npy", X.double())
    write(tmp_path / "named.safetensors", X)
    for name, link in (("linked", Path.symlink_to), ("hard", Path.hardlink_to)):
        link(tmp_path / name / "b.npy", write(tmp_path / name / "a.npy", X))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.npz").write_bytes(b"x")
    (tmp_path / "none" / ".hidden.npy").write_bytes(b"x")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    (tmp_path / "twice.npy").write_bytes(2 * (tmp_path / "mixed" / "a.npy").read_bytes())
    table = pa.table({"a": [1, 2], "b": [1.0, 2.0], "c": [[1.0], [1.0, 2.0]], "d": [[1.0], None]})
    pq.write_table(table, tmp_path / "t.parquet")
    x, table_file = str(tmp_path / "named.safetensors"), "t.parquet"
    for path, options, message in (
        ("nosuch", {}, "`path` must be an existing file or folder; got .*nosuch"),
        ("none", {}, r"one of .npy, .safetensors, .parquet, .pt; .*none holds x.npz"),
        ("none/x.npz", {}, "`path` must end in one of .npy,"),
        ("mixed", {}, "all shards must have one format; .*mixed holds a.npy and b.pt"),
        ("widths", {}, r"a.npy is float32 \[64, 6\], .*b.npy is float32 \[64, 5\]"),
        ("kinds", {}, r"one dtype.*b.npy is float64 \[64, 6\]"),
        ("linked", {}, "must not hold a file twice, .*: .*linked/a.npy and .*linked/b.npy are the"),
        ("hard", {}, "must not hold a file twice, .*: .*hard/a.npy and .*hard/b.npy are the same"),
        ("objects.npy", {}, "objects.npy cannot be read: Array can't be memory-mapped"),
        ("twice.npy", {}, "twice.npy cannot be read: 1,664 bytes follow the array; a file must"),
        (x, {"tensor": "y"}, r"named.safetensors has no tensor `y`.* It has x"),
        ("widths/a.npy", {"tensor": "y"}, "`tensor` is for .safetensors and .pt; got .*a.npy"),
        (x, {"field": "y"}, "`field` is for .parquet; got"),
        (table_file, {}, "`field` is required: .* has 4 columns, and `a` is int64"),
        (table_file, {"field": "a"}, "the column `a` of .*t.parquet is int64"),
        (table_file, {"field": "e"}, "has no column `e`.* It has a, b, c, d"),
        (table_file, {"field": "c"}, "must have one length; row 1 has 2, those before have 1"),
        (table_file, {"field": "d"}, "a value is missing in row 1 of .*t.parquet"),
        ("gone", {"origin": "memory"}, "the copy of the activations from memory, .* is gone: c"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            resolve(tmp_path / path, tmp_path / "cache", **options)
    assert [p for p in tmp_path.glob("cache/**/*") if p.is_file()] == []
    found = resolve(tmp_path / "named.safetensors")
    with pytest.raises(ConfigError, match="=docstrings is a text, but model=named is a set of"):
        found.data(DocstringsConfig(), tmp_path)
    with pytest.raises(ConfigError, match="`layer` must be 0: named is a set of stored activ"):
        found.check(Hookpoint("resid_post", 1))
    with pytest.raises(ConfigError, match="random_weights needs a language model; named has no w"):
        found.with_random_weights()


def test_budgets_that_the_activations_do_not_hold_are_refused(tmp_path: Path) -> None:
    found = resolve(write(tmp_path / "x.npy", numbered(1_024)))
    trained, kept = len(epoch(found)), len(held_out(found))
    assert trained + kept == 1_024
    data = found.data(DATA, tmp_path)
    data.check_budget(trained // 64, 64)
    with pytest.raises(
        ConfigError, match=re.escape(f"x (1,024 in all): {trained:,}. Lower it")
    ) as error:
        data.check_budget(trained // 64 + 1, 64)
    assert str(error.value).startswith(f"`training.tokens` (={trained + 64:,}) must not exceed")
    found.data(replace(DATA, repeat=True), tmp_path).check_budget(10_000, 64)
    few = found.data(replace(DATA, held_out_tokens=kept + 1), tmp_path)
    with pytest.raises(ConfigError, match=f"held-out activations of x .*: {kept}. Lower it"):
        few.check_budget(1, 64)


FAST = ["sae.num_latents=16", "sae.k=4", "training.tokens=2048", "training.batch_size=64",
        "dataset.chunk_tokens=512", "dataset.held_out_tokens=128", "runtime.threads=1",
        "runtime.progress=false"]  # fmt: skip


def write_study(folder: Path) -> torch.Tensor:
    """Write a folder of three shards and a README; return the activations."""
    x = numbered(4_096) / 64
    for i, shard in enumerate(x.split(1_500)):
        write(folder / "mine" / f"{i}.npy", shard)
    (folder / "mine" / "README.md").write_text("proteins")
    return x


def test_other_formats_and_shards_train_the_same_saes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    x = write_study(tmp_path)
    line = ["model=activations", *FAST]
    assert train.main([*line, "model.path=mine"]) == 0
    assert "mine: 3 shards; passed over: README.md" in capsys.readouterr().out
    write(tmp_path / "other.parquet", x)
    assert train.main([*line, "model.path=other.parquet", "runtime.outputs=again"]) == 0
    (first,), (again,) = RunStore("outputs").runs(), RunStore("again").runs()
    assert first.signature == again.signature
    for name in ("sae.safetensors", "latents.safetensors", "metrics.json"):
        assert (first.path / name).read_bytes() == (again.path / name).read_bytes()
    capsys.readouterr()
    assert evaluate.main([str(first.path), "evaluation=contexts"]) == 1
    assert "mine is a set of stored activations, without tokens" in capsys.readouterr().err
    assert show.main([str(first.path), "1"]) == 1
    assert "its activations are not those of a language model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_of_stored_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    assert run.main(["comparison=seeds", "model=activations", "model.path=mine", "seed=0,1", *FAST,
                     "comparison.null_draws=1", "surrogate=none,gaussian",
                     "evaluation=reconstruction", "evaluation.tokens=128"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("comparing 2 runs on 128 held-out activations") == 2
    assert "mine+gaussian" in said
    assert len(RunStore("outputs").runs()) == 4
    assert list(tmp_path.glob("sweeps/*/report/index.html"))
    assert status.main(["--verify"]) == 0
