"""Documents that are messages or token ids, the held-out documents, and the first of a text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from reseed.activations.model_source import PathModelConfig
from reseed.activations.text import TextFilesConfig
from reseed.activations.text_source import ResolvedModelText, resolve_model_text
from reseed.errors import ConfigError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system message') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {{ strftime_now('%Y') }} {% endfor %}"
)


def resolved(
    tiny_model: Path, cache: Path, template: str | None = None, **options: Any
) -> ResolvedModelText:
    model = PathModelConfig(path=str(tiny_model)).resolve(cache)
    model.tokenizer.add_tokens(["user", "assistant", "26"])
    model.tokenizer.chat_template = template
    config = TextFilesConfig(context_length=8, chunk_tokens=8, held_out_tokens=1, **options)
    return resolve_model_text(model, config, cache)


def chats(path: Path, conversations: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    return str(path)


def said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def stored(found: ResolvedModelText) -> list[list[int]]:
    """Return the tokens of all documents."""
    return [part.tokens[a:b].tolist() for part in found.stores(0)
            for a, b in zip(part.starts[:-1], part.starts[1:], strict=True)]  # fmt: skip


def test_messages_are_rendered_by_the_template_with_one_opening_token(
    tiny_model: Path, tmp_path: Path
) -> None:
    conversations = [said("the cat", "a dog"), None, [], said("ran home")]
    path = chats(tmp_path / "a.jsonl", conversations)
    found = resolved(tiny_model, tmp_path, TEMPLATE, path=path, field="messages", chat=True)
    known = found.model.tokenizer.get_vocab()
    # The date of a template is fixed: the documents are the same tomorrow.
    texts = ["user the cat 26 Jul 2024 assistant a dog 26 Jul 2024", "user ran home 26 Jul 2024"]
    expected = [[0, *(known.get(word, 1) for word in text.split())] for text in texts]
    assert sorted(stored(found)) == sorted(expected)
    without = TEMPLATE.removeprefix("{{ bos_token }}")
    other = resolved(tiny_model, tmp_path, without, path=path, field="messages", chat=True)
    assert sorted(stored(other)) == sorted(expected)
    assert other.stores(0) != found.stores(0), "the template is part of the key of the tokens"
    assert other.fingerprints != found.fingerprints
    assert "user the cat" in "\n".join(found.summary)


def test_chats_that_a_template_makes_equal_are_on_one_side(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Templates trim, so that lists of messages that differ are one document."""
    given = [said(f"cat {'mat ' * n}{space}", "ran") for n in range(1, 40) for space in ("", " \n")]
    path = chats(tmp_path / "a.jsonl", [*given, said(" ")])
    template = "{% for m in messages %}{{ m.content | trim }} {% endfor %}"
    options = {"path": path, "field": "messages", "chat": True, "held_out_fraction": 0.5}
    found = resolved(tiny_model, tmp_path, template, **options)
    train, held_out = map(documents, found.stores(0))
    assert not set(train) & set(held_out)
    assert len(set(train)) + len(set(held_out)) == 39
    assert len(train) + len(held_out) == len(given), "a chat that is rendered blank is none"


def test_token_ids_are_read_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    rows = [[0, 5, 6], None, [], [7, 8], [0, 0]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    pq.write_table(pa.table({"ids": pa.array(rows, pa.list_(pa.uint16()))}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        path = str(tmp_path / name)
        found = resolved(tiny_model, tmp_path, path=path, token_field="ids")
        assert sorted(stored(found)) == [[0, 0], [0, 5, 6], [7, 8]]
    size = found.model.transformers_config.vocab_size
    for largest in (size - 1, size):
        path = tmp_path / f"{largest}.jsonl"
        path.write_text(json.dumps({"ids": [5, largest]}))
        found = resolved(tiny_model, tmp_path, path=str(path), token_field="ids")
        if largest < size:
            assert stored(found) == [[5, largest]]
    with pytest.raises(ConfigError, match=f"token id {size} is not in the voc.* 0 to {size - 1}"):
        found.stores(0)


BAD_ROWS = [
    ({"token_field": "messages"}, [5, 10**6], r"line 2: the token id 1000000 is not in the vocab"),
    ({"token_field": "messages"}, [5, 10**30], "line 2: the token id 1000000.* is not in the voc"),
    ({"token_field": "messages"}, [-1], "line 2: `messages` must hold token ids, integers from 0"),
    ({"token_field": "messages"}, [1.0], "line 2: `messages` must hold token ids, integers from 0"),
    ({"token_field": "messages"}, [True], "line 2: `messages` must hold token ids, integers"),
    ({"token_field": "messages"}, "a cat", "must hold a list of token ids; it holds text"),
    ({"chat": True}, "a cat", "line 2: `messages` must hold a list of messages; it holds text"),
    ({"chat": True}, [{"role": "user"}], "must hold messages, each with text under `role` and"),
    ({"chat": True}, ["a cat"], "must hold messages, each with text under `role` and `content`"),
    ({"chat": True}, [{"role": "system", "content": "x"}], "line 2: .*refuses .*no system message"),
]


@pytest.mark.parametrize(("options", "row", "message"), BAD_ROWS)
def test_rows_of_another_kind_are_refused(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], row: Any, message: str
) -> None:
    good: Any = [5, 6] if "token_field" in options else said("the cat")
    path = chats(tmp_path / "a.jsonl", [good, row])
    cache = tmp_path / "cache"
    found = resolved(tiny_model, cache, TEMPLATE, path=path, field="messages", **options)
    with pytest.raises(ConfigError, match=message):
        found.check_budget(1, 8)
    assert [file for file in cache.rglob("*") if not file.is_dir()] == []


def test_held_out_documents_that_repeat_the_training_text_can_be_left_out(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Each document is given twice, the second time with another beginning."""
    texts = tiny_text.read_text().split("\n<|endoftext|>\n")[:300]
    twice = [*texts, *(f"cat {text}" for text in texts)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(twice))
    plain = resolved(tiny_model, tmp_path, path=str(tmp_path / "a.txt"))
    dedup = resolved(tiny_model, tmp_path, path=str(tmp_path / "a.txt"), held_out_dedup=True)
    train, held_out = plain.stores(0)
    same, fewer = dedup.stores(0)
    assert np.array_equal(same.tokens, train.tokens)
    of = {tuple(d) for d in documents(train)}
    windows = {d[i : i + 13] for d in of for i in range(len(d) - 12)}
    alone = [d for d in documents(held_out)
             if not any(d[i : i + 13] in windows for i in range(len(d) - 12))]  # fmt: skip
    assert documents(fewer) == alone
    assert 0 < len(alone) < held_out.num_documents / 2
    left_out = held_out.num_documents - len(alone)
    told = f"  {left_out} held-out documents left out (they repeat training text)"
    assert told in dedup.summary
    record = dedup.open("cpu", 0).record()  # type: ignore[arg-type]
    assert record["held_out_documents_left_out"] == left_out
    # The files record the share, which the counts of windows above give, too.
    counted = [d[i : i + 13] in windows for d in documents(held_out) for i in range(len(d) - 12)]
    record = plain.open("cpu", 0).record()  # type: ignore[arg-type]
    assert record["held_out_windows"] == len(counted)
    assert record["held_out_windows_in_training"] == sum(counted) / len(counted)
    assert plain.open("cpu", 0).record() == record  # type: ignore[arg-type]
    long = [text for text in twice if len(text.split()) > 14]
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(f"{a} {b}" for a in "xy" for b in long))
    none = resolved(tiny_model, tmp_path, path=str(tmp_path / "b.txt"), held_out_dedup=True)
    with pytest.raises(ConfigError, match=r"`dataset\.held_out_dedup`=true leaves no held-out d"):
        none.check_budget(1, 8)


def documents(store: Any) -> list[tuple[int, ...]]:
    each = zip(store.starts[:-1], store.starts[1:], strict=True)
    return [tuple(store.tokens[a:b].tolist()) for a, b in each]


def test_the_first_documents_are_shown_in_lines_of_80_columns(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\nran<|endoftext|>" + "dog " * 50)
    lines = resolved(tiny_model, tmp_path, path=str(tmp_path / "a.txt")).summary
    assert lines[0] == "text a: 2 documents, 55 tokens; the first begin"
    assert lines[1] == '  "the cat ran"'
    assert lines[2] == f'  "{("dog " * 50)[:59]}…"'
    assert lines[3] == "  read a.txt"
    name = "猫" * 50
    (tmp_path / name).mkdir()
    for number in range(3):
        (tmp_path / name / f"{number}{name}.txt").write_text("a 猫 " * 50)
        (tmp_path / name / f"{number}{name}\n.pdf").write_text("a")
    lines += resolved(tiny_model, tmp_path, path=str(tmp_path / name)).summary
    assert max(map(cell_len, lines)) <= 80
    assert re.fullmatch(r"text 猫+ ?…: 3 documents, 303 tokens; the first begin", lines[4])
    assert not any(character < " " for line in lines for character in line)
