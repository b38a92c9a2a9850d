from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reseed.activations.text import TextFilesConfig
from reseed.errors import ConfigError

DOCUMENTS = ["one fish", "two\nfish", "red fish"]


def written(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"documents.{kind}"
    if kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(DOCUMENTS) + "\n<|endoftext|>\n")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": d, "n": 1}) for d in DOCUMENTS) + "\n\n")
    else:
        pq.write_table(pa.table({"n": [1, 2, 3], "text": DOCUMENTS}), path)
    return path


def documents(path: Path | tuple[str, ...], cache: Path, **options: object) -> list[str]:
    given = str(path) if isinstance(path, Path) else path
    config = TextFilesConfig(path=given, **options)  # type: ignore[arg-type]
    return list(config.resolve(cache).documents())


def test_the_separator_splits_plain_text_into_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x<|endoftext|>y\n---\nz")
    assert documents(path, tmp_path) == ["x", "y\n---\nz"]
    assert documents(path, tmp_path, separator="---") == ["x<|endoftext|>y", "z"]
    assert documents(path, tmp_path, separator=None) == ["x<|endoftext|>y\n---\nz"]


def test_folders_and_lists_have_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.log"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path, tmp_path) == ["a.txt", "b.txt"]
    both = (str(tmp_path / "b.txt"), str(tmp_path / "a.txt"))
    assert documents(both, tmp_path) == ["b.txt", "a.txt"]


def test_the_fingerprint_depends_on_the_content_only(tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{n}.txt" for n in "abc")
    one.write_text("same")
    two.write_text("same")
    three.write_text("other")
    prints = [TextFilesConfig(path=str(p)).resolve(tmp_path).fingerprint
              for p in (one, two, three)]  # fmt: skip
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"`path`: the text in .*a\.txt is empty"),
        ("a.txt", b"\n<|endoftext|>\n  \n", r"`path`: the text in .*a\.txt is empty"),
        ("a.txt", b"\xff\xfe\x00", r"`encoding`: .*a\.txt, line 1 has bytes that are not"),
        ("a.pdf", b"x", r"`path`: cannot read a\.pdf; the formats are \.csv, \.jsonl, \.md"),
        ("a.jsonl", b"{broken", r"`path`: cannot read .*a\.jsonl: line 1 is not JSON: Exp"),
        ("a.jsonl", b'{"body": "x"}', r"`field`: .*a\.jsonl, line 1 has no key `text`: its keys"),
        ("a.parquet", b"not parquet", r"`path`: cannot read .*a\.parquet"),
    ],
)
def test_unreadable_files_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        documents(tmp_path / name, tmp_path)


def test_missing_files_and_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`path` must be an existing file or folder"):
        documents(tmp_path / "nowhere", tmp_path)
    with pytest.raises(
        ConfigError, match=r"`path`: the folder .* has no text; the formats are \.csv"
    ):
        documents(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="`field` must be a column of"):
        documents(written(tmp_path, "parquet"), tmp_path, field="body")


def test_the_fingerprint_depends_on_the_file_format(tmp_path: Path) -> None:
    """The same bytes are other documents in another format."""
    line = json.dumps({"text": "one"})
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(line)
    a, b = (TextFilesConfig(path=str(tmp_path / n)).resolve(tmp_path) for n in ("a.jsonl", "a.txt"))
    assert a.fingerprint != b.fingerprint
