"""``reseed cache``, and training with the activation cache that it lists."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from reseed.activations.cache import ActivationCache
from reseed.activations.language_model import LanguageModel
from reseed.cli import cache, train
from reseed.store.runs import Run

FOLDER = "runtime.activation_cache=kept"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def results(outputs: str) -> list[tuple[bytes, str]]:
    """Return the weights and held-out metrics of every run, in the order of names."""
    runs = [Run(path) for path in sorted(Path(outputs).iterdir())]
    return [((r.path / "sae.safetensors").read_bytes(), str(r.metrics)) for r in runs]


@pytest.fixture
def entries(tmp_path: Path) -> list[str]:
    """Create two entries, of which the first was used an hour after the second."""
    made = ActivationCache(tmp_path / "kept", 1 << 30)
    names = []
    for i, name in enumerate(["gpt2-resid_post.6-pile-order0", "llama-mlp_out.1-docs-held_out"]):
        entry = made.entry({"number": i}, name)
        assert entry is not None
        for c in range(2 - i):
            entry.write(entry.file(c, "a" * 64), 3 << 19, lambda path: None)
        then = 1_700_000_000 - 3600 * i
        os.utime(entry.path / "entry.json", (then, then))
        names.append(entry.path.name)
    del entry
    gc.collect()
    return names


def test_cached_prefetched_and_plain_training_give_the_same_results(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", *tiny_overrides, "layer=0,2", "training.tokens=6144"]
    ways = {
        "plain": ["runtime.prefetch=false"],
        "ahead": ["runtime.prefetch=true"],
        "first": ["runtime.prefetch=true", FOLDER],
    }
    for name, own in ways.items():
        assert train.main([*sweep, *own, f"runtime.outputs={name}"]) == 0
    gc.collect()

    def refused(self: LanguageModel) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(LanguageModel, "model", property(refused))
    for name, prefetch in (("read ahead", "true"), ("read", "false")):
        ways[name] = [FOLDER, f"runtime.prefetch={prefetch}"]
        assert train.main([*sweep, *ways[name], f"runtime.outputs='{name}'"]) == 0
    gc.collect()
    assert len(results("plain")) == 2
    for name in ways:
        assert results(name) == results("plain"), name
    capsys.readouterr()
    assert cache.main([FOLDER]) == 0
    said = capsys.readouterr().out.splitlines()
    # 3 chunks of 2,048 × 16 and half a held-out chunk, at two layers, in float32.
    assert said[0] == "4 sets of activations in kept/: 0.9 MiB of 50 GiB"
    assert said[1].split() == ["activations", "used", "chunks", "size"]
    assert len(said) == 6


def test_a_damaged_chunk_does_not_change_a_run(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for outputs in ("one", "two", "three"):
        gc.collect()
        assert train.main([*tiny_overrides, FOLDER, f"runtime.outputs={outputs}"]) == 0
        said = capsys.readouterr().out
        assert ("is computed again" in said) == (outputs == "two")
        chunk = next(Path("kept").glob("*order0*/000002-*"))
        if outputs == "one":
            chunk.write_bytes(chunk.read_bytes()[:-1] + b"\x7f")
    assert results("one") == results("two") == results("three")


def test_entries_are_listed_with_chunks_and_sizes(
    entries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache.main([FOLDER]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 sets of activations in kept/: 4.5 MiB of 50 GiB\n")
    first, second = (line.split() for line in said.splitlines()[2:])
    assert (first[0], first[-3:]) == (entries[0], ["2", "3.0", "MiB"])
    assert (second[0], second[-3:]) == (entries[1], ["1", "1.5", "MiB"])
    assert first[1].startswith("2023-11-1")


def test_entries_in_use_are_listed_and_not_removed(
    entries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    held = ActivationCache("kept", 1 << 30).entry({"number": 1}, "llama-mlp_out.1-docs-held_out")
    assert cache.main([FOLDER]) == 0
    said = capsys.readouterr().out
    assert said.count("in use") == 1
    assert cache.main([FOLDER, cache.CLEAR]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"removed {entries[0]} (2 chunks, 3.0 MiB)", f"kept {entries[1]}: in use",
    ]  # fmt: skip
    del held
    gc.collect()
    assert cache.main([FOLDER, "--clear"]) == 0
    assert capsys.readouterr().out == f"removed {entries[1]} (1 chunk, 1.5 MiB)\n"
    assert cache.main([FOLDER]) == 0
    assert cache.main([FOLDER, "--clear"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no activations in kept/", "nothing to remove: no activations in kept/",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [["--clear", "gpt2"], ["--clear=gpt2*pile"], ["--clear", "resid_post", "layer=1"]],
)
def test_clear_removes_entries_by_name(
    words: list[str], entries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache.main([*words, FOLDER]) == 0
    assert capsys.readouterr().out == f"removed {entries[0]} (2 chunks, 3.0 MiB)\n"
    assert cache.main([*words, FOLDER]) == 0
    said = capsys.readouterr().out
    pattern = words[0].partition("=")[2] or words[1]
    assert said == f"nothing to remove: no activations in kept/ have `{pattern}` in their name\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no activation cache: set its folder with runtime.activation_cache=FOLDER"),
        ([FOLDER], "`runtime.activation_cache`: there is no folder kept"),
        ([FOLDER, "--clear="], "--clear= needs a pattern; --clear alone removes everything"),
        (["--clear", "a", "--clear", "b"], "give --clear only once; got 2"),
    ],
)
def test_errors_name_the_key_or_flag(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache.main(words) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_file_as_cache_folder_is_refused(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("kept").touch()
    assert train.main([*tiny_overrides, FOLDER]) == 1
    assert capsys.readouterr().err == (
        "error: `runtime.activation_cache` must be a folder; got kept, which is a file\n"
    )


@pytest.mark.parametrize("name", ["notes.txt", ".git", "gpt2", "link", f"link-{'0' * 24}"])
def test_clear_refuses_a_folder_that_holds_anything_else(
    name: str, entries: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / f"other-{'0' * 24}"
    other.mkdir()
    (other / "entry.json").write_text("{}")
    if name.startswith("link"):
        (tmp_path / "kept" / name).symlink_to(other)
    else:
        (tmp_path / "kept" / name).touch()
    assert cache.main([FOLDER, "--clear"]) == 1
    assert capsys.readouterr().err == (
        "error: `runtime.activation_cache` (=kept) is not a cache of activations alone: it holds "
        f"{name}. Nothing was removed\n"
    )
    assert sorted(os.listdir("kept")) == sorted([*entries, name, ".lock"])
    assert [path.name for path in other.iterdir()] == ["entry.json"]


def test_eviction_and_removal_do_not_follow_links(entries: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "entry.json").write_text("{}")
    (mine / "000000-0123456789abcdef.safetensors").write_bytes(b"mine")
    (tmp_path / "kept" / f"link-{'0' * 24}").symlink_to(mine)
    (tmp_path / "kept" / entries[0] / "within").symlink_to(mine)
    full = ActivationCache(tmp_path / "kept", 1)
    assert len(full.stored()) == 2
    assert full.entry({"number": 3}, "new") is not None  # evicts everything else
    gc.collect()
    removed, kept = full.clear()
    assert (len(removed), kept) == (1, [])
    assert sorted(path.name for path in mine.iterdir()) == [
        "000000-0123456789abcdef.safetensors", "entry.json",
    ]  # fmt: skip


def test_an_empty_folder_is_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").mkdir()
    assert cache.main([FOLDER, "--clear"]) == 0
    assert capsys.readouterr().out == "nothing to remove: no activations in kept/\n"
