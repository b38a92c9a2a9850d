"""Checksums: a record of which any bit changes, and files that change after they were recorded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reseed.errors import ReseedError
from reseed.system import integrity
from reseed.system.files import atomic_write_json
from reseed.system.integrity import (
    DamagedFileError,
    check_files,
    describe_files,
    find_damaged,
    is_damaged,
    is_intact,
    read_record,
    recorded_files,
    remove_checked,
    seal,
    sha256_of,
    unseal,
    write_checked,
    write_record,
)

VALUE = {"status": "finished", "numbers": [1, 2.5, None], "text": 'é "quoted"', "empty": {}}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("indent", [None, 2])
def test_no_flipped_bit_of_a_record_changes_its_value(indent: int | None) -> None:
    data = seal(json.dumps(VALUE, indent=indent, ensure_ascii=False)).encode()
    assert unseal(data, Path("record.json")) == VALUE
    harmless = 0
    for bit in range(8 * len(data)):
        try:
            found = unseal(flipped(data, bit), Path("record.json"))
        except DamagedFileError:
            continue
        assert found == VALUE, f"bit {bit}"
        harmless += 1  # a blank between the entries, which became another blank
    assert harmless <= 16


@pytest.mark.parametrize("value", [{}, {"a": 1}, {"a": {}}, {"a": "}"}, {"checksums": []}])
def test_every_object_is_read_as_it_was_written(tmp_path: Path, value: dict[str, object]) -> None:
    write_record(tmp_path / "record.json", value)
    assert json.loads((tmp_path / "record.json").read_text()).keys() == {*value, "checksum"}
    assert read_record(tmp_path / "record.json") == value
    assert unseal(seal(json.dumps(value)).encode(), tmp_path) == value


@pytest.mark.parametrize("length", [0, 1, 40, -2])
def test_a_truncated_record_is_noticed(tmp_path: Path, length: int) -> None:
    path = tmp_path / "record.json"
    write_record(path, VALUE)
    data = path.read_bytes()
    path.write_bytes(data[: length if length >= 0 else len(data) - 3])
    with pytest.raises(DamagedFileError, match=r"record\.json is damaged: it is (empty|not JSON)"):
        read_record(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1, 2]", "it must hold a JSON object; it holds a list"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
    ],
)
def test_something_else_than_a_record_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=reason):
        read_record(tmp_path / "record.json")


def test_blanks_at_the_end_do_not_hide_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, VALUE)
    path.write_bytes(path.read_bytes() + b" " * 500)
    with pytest.raises(DamagedFileError, match="its checksum cannot be read"):
        read_record(path)


@pytest.mark.parametrize("files", [[], {"a": {}}, {"a": {"size": 1}}, "a"])
def test_a_list_of_files_of_another_shape_is_damage(tmp_path: Path, files: object) -> None:
    write_record(tmp_path / "record.json", {"files": files, "more": 1})
    if files:
        with pytest.raises(DamagedFileError, match="its list of files cannot be read"):
            recorded_files(tmp_path / "record.json")
    else:
        assert recorded_files(tmp_path / "record.json") == {}


def test_a_record_without_a_checksum_is_read(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "record.json", VALUE)
    assert read_record(tmp_path / "record.json") == VALUE


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: path.write_bytes(flipped(path.read_bytes(), 9)), "its content has"),
    "truncated": (lambda path: os.truncate(path, 3), "it has 3 bytes instead of 5"),
    "emptied": (lambda path: path.write_bytes(b""), "it has 0 bytes instead of 5"),
    "missing": (lambda path: path.unlink(), "it is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "it is not a file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("quick", [True, False])
def test_a_file_that_is_not_as_recorded_is_named(tmp_path: Path, damage: str, quick: bool) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"12345")
    recorded = describe_files(tmp_path, ["data.bin", "absent"], times=True)
    assert {*recorded} == {"data.bin"}
    check_files(tmp_path, recorded, quick=quick)
    change, reason = DAMAGES[damage]
    os.utime(path, ns=(0, 0))
    change(path)
    with pytest.raises(DamagedFileError, match=rf"data\.bin is damaged: {reason}"):
        check_files(tmp_path, recorded, quick=quick)


def test_a_quick_check_reads_only_files_of_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"12345")
    recorded = describe_files(tmp_path, ["data.bin"], times=True)
    read: list[Path] = []
    hashed = sha256_of
    monkeypatch.setattr(integrity, "sha256_of", lambda path: read.append(path) or hashed(path))
    check_files(tmp_path, recorded, quick=True)
    assert read == []
    os.utime(path)  # a copy, for example
    check_files(tmp_path, recorded, quick=True)
    assert read == [path]
    check_files(tmp_path, recorded, quick=True)
    assert read == [path], "the recorded time is back"


def test_damage_that_keeps_size_and_time_is_put_in_doubt_once_found(tmp_path: Path) -> None:
    """A full check finds it, and changes the file's time so that quick checks find it too."""
    path = tmp_path / "data.bin"
    path.write_bytes(b"12345")
    recorded = describe_files(tmp_path, ["data.bin"], times=True)
    time = path.stat().st_mtime_ns
    path.write_bytes(b"12346")
    os.utime(path, ns=(time, time))
    check_files(tmp_path, recorded, quick=True)
    with pytest.raises(DamagedFileError, match="its content has changed"):
        check_files(tmp_path, recorded)
    with pytest.raises(DamagedFileError, match="its content has changed"):
        check_files(tmp_path, recorded, quick=True)


def test_this_process_remembers_damage_where_it_cannot_change_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other users' files, for example."""
    path = tmp_path / "data.bin"
    path.write_bytes(b"12345")
    recorded = describe_files(tmp_path, ["data.bin"], times=True)
    time = path.stat().st_mtime_ns
    path.write_bytes(b"12346")
    os.utime(path, ns=(time, time))

    def refused(*given: object, **named: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    for quick in (False, True):
        with pytest.raises(DamagedFileError, match="its content has changed"):
            check_files(tmp_path, recorded, quick=quick)


def test_a_checked_file_is_intact_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert not is_intact(path)
    assert not is_damaged(path)
    for content in (b"first", b"second"):
        write_checked(path, lambda part, content=content: part.write_bytes(content))
        assert is_intact(path)
        assert not is_damaged(path)
    path.write_bytes(b"secone")
    assert is_damaged(path)
    assert not is_intact(path)
    assert [str(error) for error in find_damaged(tmp_path)] == [
        f"{path} is damaged: it does not have its SHA-256"
    ]
    remove_checked(path)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_killed_before_the_rename_leaves_the_earlier_file_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checked(path, lambda part: part.write_bytes(b"first"))
    shutil.copy(path, tmp_path / "earlier")
    write_checked(path, lambda part: part.write_bytes(b"second"))
    # The hashes are those of the second write, the file that of the first.
    os.replace(tmp_path / "earlier", path)
    assert is_intact(path)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(ReseedError, match=r"record\.json must be a file; it is a folder"):
        write_record(tmp_path / "record.json", VALUE)
    with pytest.raises(DamagedFileError, match=r"record\.json is damaged: it cannot be read"):
        read_record(tmp_path / "record.json")


def test_nothing_is_at_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert integrity.is_there(tmp_path / "file")
    assert not integrity.is_there(tmp_path / "file" / "inside")
    assert not integrity.is_there(tmp_path / "a\0b")
