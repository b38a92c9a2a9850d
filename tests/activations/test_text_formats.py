"""Formats of local texts: the same documents in each, every row checked, nothing left half-made."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reseed.activations.model_source import PathModelConfig
from reseed.activations.text import TextFilesConfig
from reseed.activations.text_source import ResolvedModelText, resolve_model_text
from reseed.errors import ConfigError

DOCUMENTS = ["one fish", "two\nfish", 'réd "fish", 魚\tfish', "last, fish"]
Make = Callable[[Path, Sequence[Any]], None]
few = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def jsonl(path: Path, values: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps({"n": 1, "text": v}) + "\n" for v in values))


def table(path: Path, values: Sequence[Any]) -> None:
    cells = io.StringIO(newline="")
    writer = csv.writer(cells)
    writer.writerows([("n", "text"), *((1, "" if v is None else v) for v in values)])
    path.write_text(cells.getvalue(), encoding="utf-8", newline="")


def parquet(path: Path, values: Sequence[Any]) -> None:
    pq.write_table(pa.table({"n": [1] * len(values), "text": pa.array(values)}), path)


def saved(path: Path, values: Sequence[Any]) -> None:
    """Write what `datasets.save_to_disk` writes, in two files (compared with it below)."""
    path.mkdir()
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (values[:1], values[1:]), strict=True):
        made = pa.table({"text": pa.array(part, pa.array(values).type)})
        with pa.ipc.new_stream(path / name, made.schema) as stream:
            stream.write_table(made)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (path / "dataset_info.json").write_text("{}")


def plain(path: Path, values: Sequence[Any]) -> None:
    path.write_text("\n<|endoftext|>\n".join(v or "" for v in values), encoding="utf-8")


def compressed(make: Make, compress: Callable[[bytes], bytes], path: Path, values: Any) -> None:
    make(path, values)
    path.write_bytes(compress(path.read_bytes()))


def frames(data: bytes) -> bytes:
    """Compress into two zstd frames, as parallel compressors do."""
    return b"".join(zstandard.compress(part) for part in (data[:40], data[40:]))


MAKES: dict[str, Make] = {
    "a.txt": plain, "a.MD": plain, "a.jsonl": jsonl, "a.csv": table, "a.Parquet": parquet,
    "saved": saved,
    "a.txt.gz": partial(compressed, plain, gzip.compress),
    "a.JSONL.GZ": partial(compressed, jsonl, gzip.compress),
    "a.jsonl.zst": partial(compressed, jsonl, frames),
    "a.csv.zst": partial(compressed, table, frames),
}  # fmt: skip


def documents(path: Path | tuple[str, ...], **options: Any) -> list[str]:
    given = str(path) if isinstance(path, Path) else path
    return list(TextFilesConfig(path=given, **options).resolve(Path()).documents())


@pytest.mark.parametrize("name", MAKES)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    MAKES[name](tmp_path / name, [*DOCUMENTS[:2], None, "", " \n", *DOCUMENTS[2:]])
    assert documents(tmp_path / name) == DOCUMENTS
    assert documents(tmp_path) == DOCUMENTS
    found = TextFilesConfig(path=str(tmp_path / name)).resolve(tmp_path)
    assert found.label == ("saved" if name == "saved" else "a")


TEXTS = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=9).map(
        lambda text: text.replace("<|", "").replace("\r", "")
    ),
    min_size=1,
    max_size=6,
).filter(lambda texts: any(t.strip() and not t.startswith("\ufeff") for t in texts))


@few(max_examples=30)
@example(texts=["\ud800 cat", "a\udfff", "cat \udc00\ud800"])
@given(texts=TEXTS)
def test_every_text_is_read_as_it_was_written(tmp_path: Path, texts: list[str]) -> None:
    """Only JSON can hold lone surrogates, which become U+FFFD, and pairs, which it joins."""
    expected = ["".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in t) for t in texts]
    jsonl(tmp_path / "a.jsonl", texts)
    found = documents(tmp_path / "a.jsonl")
    if not any(re.search("[\ud800-\udbff][\udc00-\udfff]", text) for text in texts):
        assert found == [t for t in expected if t.strip()]
    for name in ("a.csv", "a.Parquet", "a.csv.zst"):
        MAKES[name](tmp_path / name, expected)
        assert documents(tmp_path / name) == [t for t in expected if t.strip()]


@few(max_examples=40)
@given(text=st.text("ab-\n", max_size=25), separator=st.sampled_from(["-", "--", "\n\n", "\n-\n"]))
def test_a_separator_divides_plain_text_wherever_it_is(
    tmp_path: Path, text: str, separator: str
) -> None:
    (tmp_path / "a.txt").write_text(f"{text}a")
    parts = [part.strip("\n") for part in f"{text}a".split(separator)]
    found = documents(tmp_path / "a.txt", separator=separator)
    assert found == [part for part in parts if part.strip()]


def test_line_ends_of_fields_are_kept_and_those_of_lines_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\r\n"a\r\nb",1\r\n\r\nc,2\r\n')
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n')
    (tmp_path / "a.txt").write_bytes(b"a\r\nb<|endoftext|>\r\nc")
    assert documents(tmp_path / "a.csv") == documents(tmp_path / "a.jsonl") == ["a\r\nb", "c"]
    assert documents(tmp_path / "a.txt") == ["a\nb", "c"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_dropped_and_encodings_are_heeded(tmp_path: Path, name: str) -> None:
    MAKES[name](tmp_path / name, ["naïve fish", "cat"])
    data = (tmp_path / name).read_bytes()
    for encoding in ("utf-8-sig", "utf-16", "latin-1", "UTF8"):
        path = tmp_path / f"other-{name}"
        path.write_bytes(data.decode().encode(encoding))
        assert documents(path, encoding=encoding) == ["naïve fish", "cat"]
    path.write_bytes(data.decode().encode("utf-8-sig"))
    assert documents(path) == ["naïve fish", "cat"]
    config = TextFilesConfig(path="x", encoding="UTF8")
    assert config == TextFilesConfig(path="x")
    assert "encoding" not in config.signed()


def test_a_dropped_mark_changes_the_fingerprint(tmp_path: Path) -> None:
    """Version 0.1 kept the mark in the first document, and its cached tokens have it."""
    from hashlib import sha256

    for name, data in (("a.txt", b"a cat"), ("b.txt", b"\xef\xbb\xbfa cat")):
        (tmp_path / name).write_bytes(data)
        before = sha256(b"_plain" + sha256(data).digest()).hexdigest()[:32]
        found = TextFilesConfig(path=str(tmp_path / name)).resolve(tmp_path).fingerprint
        assert (found == before) == (name == "a.txt")


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    train = datasets.Dataset.from_dict({"text": DOCUMENTS})
    train.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict({"train": train, "test": train}).save_to_disk(tmp_path / "two")
    for name in ("one", "dict", "two/train"):
        assert documents(tmp_path / name) == DOCUMENTS
    assert TextFilesConfig(path=str(tmp_path / "dict")).resolve(tmp_path).label == "dict-train"
    with pytest.raises(ConfigError, match=r"has 2 splits \(test, train\): name the folder of one"):
        documents(tmp_path / "two")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../dict/train/data-00000-of-00001.arrow"
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="names a file that is not in its folder"):
        documents(tmp_path / "one")


def test_a_folder_says_what_is_passed_over(tmp_path: Path) -> None:
    passed_over = ("README.md", "licence.txt", "License.MIT.txt", ".hidden.txt", "notes.pdf",
                   "sub/.git/x.txt")  # fmt: skip
    for name in ("b.txt", "a.JSONL", "empty.txt", "readmes.md", "README.jsonl", "sub/c.txt",
                 "sub/license_texts.txt", *passed_over):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("" if name == "empty.txt" else json.dumps({"text": name}))
    for name in ("y", "z"):
        saved(tmp_path / "sub" / name, ["saved"])
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    found = TextFilesConfig(path=str(tmp_path)).resolve(tmp_path)
    texts = [json.loads(d)["text"] if d.startswith("{") else d for d in found.documents()]
    assert texts == ["README.jsonl", "a.JSONL", "b.txt", "readmes.md", "sub/c.txt",
                     "sub/license_texts.txt", "saved", "saved"]  # fmt: skip
    kinds = "4 .txt, 2 .jsonl, 2 saved data sets, 1 .md"
    assert found.origin[0] == f"read 9 files ({kinds})"
    assert found.origin[1] == "passed over 7 files (3 .txt, 2 folders, 1 .md, 1 .pdf)"
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "README.md").write_text("a")
    with pytest.raises(ConfigError, match=r"has no text \(it has README\.md\).* README and LICEN"):
        documents(tmp_path / "only")
    assert documents((str(tmp_path / "README.md"),)) == ['{"text": "README.md"}']


def test_the_label_is_a_name_wherever_the_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a cat")
    monkeypatch.chdir(tmp_path / "sub")
    for paths, label in (
        (("../a.txt", "../b.txt"), tmp_path.name),
        (("c.txt", "../b.txt"), "sub"),
        (("..",), tmp_path.name),
        ((".",), "c"),
    ):
        assert TextFilesConfig(path=paths).resolve(tmp_path).label == label
    for nothing in ("", ("c.txt", "")):
        with pytest.raises(ConfigError, match=r"`path` must name a file or a folder; got .*''"):
            TextFilesConfig(path=nothing).resolve(tmp_path)


def test_long_rows_of_parquet_are_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "a.parquet", [f"{i} cats" for i in range(1_500)])
    largest, batches = [0], pq.ParquetFile.iter_batches

    def seen(*given: Any, **options: Any) -> Any:
        for batch in batches(*given, **options):
            largest.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", seen)
    assert documents(tmp_path / "a.parquet") == [f"{i} cats" for i in range(1_500)]
    assert 0 < max(largest) <= 512


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").symlink_to("a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "c.txt")
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    for named in ((a, a), (a, b), (c, a), (a, str(tmp_path)), (str(tmp_path),)):
        with pytest.raises(ConfigError, match=r"`path` names a file twice, .* are the same"):
            documents(named)


GOOD = b'{"text": "the cat sat"}\n'
BAD_LINES = {
    b'{"text": "the': r"a\.jsonl: line 600 is not JSON: Invalid control character, column 14",
    b"[" * 50_000: r"a\.jsonl: line 600: its JSON is nested too deeply",
    b'{"text": "a", "n": ' + b"9" * 10_000 + b"}": r"line 600: it has a number of more digits",
    b'{"text": "caf\xe9"}': r"`dataset\.encoding`: .*a\.jsonl, line 600 has bytes that",
    b'{"text": "a\0b"}': r"a\.jsonl: line 600 has a NUL character",
    b'{"text": 3}': r"`dataset\.field`: .*line 600: `text` must hold text; it holds a number",
    b'{"text": ["a"]}': r"`dataset\.field`: .*line 600: `text` must hold text; it holds a list",
    b'{"body": "a"}': r"`dataset\.field`: .*line 600 has no key `text`: its keys are body",
    b'["a"]': r"line 600 has no key `text`: it is a list",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=lambda x: repr(x)[:40])
def test_every_line_is_checked_before_training_and_nothing_is_left(
    tmp_path: Path, tiny_model: Path, line: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 599 + line + b"\n" + GOOD)
    refused(tmp_path, tiny_model, message, path=str(tmp_path / "a.jsonl"))


def refused(tmp_path: Path, tiny_model: Path, message: str, **options: Any) -> None:
    """Assert that a text is refused with a message, and that the cache stays empty."""
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match=message) as caught:
        found(tiny_model, cache, **options).check_budget(1, 8)
    assert "\n" not in str(caught.value)
    assert [path for path in cache.rglob("*") if not path.is_dir()] == []


def found(tiny_model: Path, cache: Path, **options: Any) -> ResolvedModelText:
    config = TextFilesConfig(context_length=8, chunk_tokens=8, held_out_tokens=1, **options)
    model = PathModelConfig(path=str(tiny_model)).resolve(cache)
    return resolve_model_text(model, config, cache)


def wrong_bytes(path: Path, _: Any) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": text}), path)


def cut(make: Make, path: Path, values: Any) -> None:
    make(path, values)
    path.write_bytes(path.read_bytes()[:-20])


def written(data: bytes, path: Path, values: Any) -> None:
    path.write_bytes(data)


MANY = ["the cat sat on a mat"] * 900
BAD_FILES: list[tuple[str, Make, str]] = [
    ("a.parquet", lambda p, _: parquet(p, [1, 2]), "row 1: `text` must hold text; it holds a num"),
    ("a.parquet", lambda p, _: parquet(p, [b"a"]), "row 1: `text` must hold text; it holds bytes"),
    ("a.parquet", lambda p, _: parquet(p, [["a"]]), "row 1: `text` must hold text; it holds a li"),
    ("a.parquet", wrong_bytes, r"a\.parquet: row 2 has bytes that are not UTF-8"),
    ("a.parquet", partial(cut, parquet), r"cannot read .*a\.parquet: "),
    ("a.csv", partial(written, b'text,n\na,1\n"b,2\nc,3\n'), "row that begins in line 3: unexpec"),
    ("a.csv", partial(written, b"text,text\na,b\n"), r"a\.csv has several columns `text`"),
    ("a.csv", partial(written, b"txt,n\na,b\n"), r"must be a column of a\.csv: txt, n; got text"),
    ("a.csv", partial(written, b"text,n\na,b\nc\n"), "line 3: it has 1 cell, and the first row h"),
    ("a.txt", partial(written, b"a cat<|endoftext|>\n" * 999 + b"\xe9"), "line 1000 has bytes"),
    ("a.txt", partial(written, "a cat".encode("utf-16-le")), "NUL character: it is no text, or UT"),
    ("a.txt.gz", partial(cut, MAKES["a.txt.gz"]), "ended before the end-of-stream marker"),
    ("a.jsonl.zst", partial(cut, MAKES["a.jsonl.zst"]), "the compressed data end too early"),
    ("a.txt.gz", partial(written, b"plain"), "Not a gzipped file"),
    ("a.txt.zst", partial(written, b"plain"), "Unknown frame descriptor"),
    ("a.txt", partial(written, b""), r"the text in .*a\.txt is empty"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make", "message"), BAD_FILES, ids=lambda x: "" if callable(x) else str(x)[:30]
)
def test_malformed_files_are_refused_and_nothing_is_left(
    tmp_path: Path, tiny_model: Path, name: str, make: Make, message: str
) -> None:
    make(tmp_path / name, MANY)
    refused(tmp_path, tiny_model, message, path=str(tmp_path / name))


def assert_read_or_refused(path: Path) -> None:
    """Assert that a file has documents in Unicode, or gets an error of one line."""
    message = ""
    try:
        assert all(document.encode() for document in documents(path))
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


@few(max_examples=60)
@given(data=st.binary(max_size=60), name=st.sampled_from(sorted(set(MAKES) - {"saved"})))
def test_random_bytes_are_read_or_refused(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert_read_or_refused(tmp_path / name)


@few(max_examples=60)
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3),
       name=st.sampled_from(sorted(set(MAKES) - {"saved"})))  # fmt: skip
def test_damaged_files_are_read_or_refused(
    tmp_path: Path, flips: list[tuple[float, int]], name: str
) -> None:
    MAKES[name](tmp_path / name, DOCUMENTS)
    data = bytearray((tmp_path / name).read_bytes())
    for place, mask in flips:
        data[int(place * (len(data) - 1))] ^= mask
    (tmp_path / name).write_bytes(data)
    assert_read_or_refused(tmp_path / name)


def test_options_that_do_not_fit_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    plain(tmp_path / "a.txt", DOCUMENTS)
    path = str(tmp_path / "a.txt")
    for options, message in (
        ({"encoding": "utf9"}, r"`encoding` must be a text encoding .*Did you mean `utf-8`\?"),
        ({"encoding": "hex"}, "`encoding` must be a text encoding"),
        ({"encoding": "idna"}, "`encoding` must be a text encoding"),
        ({"encoding": "rot13"}, r"`encoding` must be a text encoding .*got 'rot13'\.$"),
        ({"chat": True, "token_field": "ids"}, r"`token_field` \(=ids\) .* set only one"),
        ({"token_field": "ids"}, "`token_field` needs rows with fields"),
        ({"chat": True}, "`chat`=true needs a chat template, and the model's tokenizer has none"),
        ({"path": str(tmp_path / "nowhere")}, "`path` must be an existing file or folder"),
    ):
        refused(tmp_path, tiny_model, message, **{"path": path, **options})
