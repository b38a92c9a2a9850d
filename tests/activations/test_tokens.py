from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from reseed.activations import tokens
from reseed.activations.model_source import PathModelConfig
from reseed.activations.text import (
    DocstringsConfig,
    HubTextConfig,
    ResolvedText,
    TextFilesConfig,
)
from reseed.activations.text_source import resolve_model_text
from reseed.activations.token_store import Packing, TokenStore
from reseed.activations.tokens import _text_options, is_held_out, token_stores
from reseed.config import setting
from reseed.errors import ReseedError

CONFIG = TextFilesConfig(path="unused", context_length=5, chunk_tokens=8)


def store(lengths: list[int], special: tuple[int, ...] = (0,)) -> TokenStore:
    """Return documents of given lengths, each starting with token 0, other tokens distinct."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, starts[-1] + 1, dtype=np.int32)
    tokens[starts[:-1]] = 0
    return TokenStore(tokens, starts, special)


def test_packing_concatenates_documents_in_the_drawn_order() -> None:
    made = store([4, 3, 6, 7])
    packing = Packing(made, CONFIG)
    flat = packing.sequences(0, packing.num_sequences).ravel()
    order = packing._documents  # type: ignore[attr-defined]
    expected = np.concatenate([made.tokens[made.starts[d] : made.starts[d + 1]] for d in order])
    assert sorted(order) == [0, 1, 2, 3]
    assert flat.tolist() == expected[: 5 * packing.num_sequences].tolist()
    # A range of sequences is that range of the whole.
    assert packing.sequences(2, 4).ravel().tolist() == flat[10:20].tolist()


def test_order_seed_and_epoch_only_permute_the_documents() -> None:
    made = store([3] * 40)
    orders = [
        tuple(Packing(made, replace(CONFIG, order_seed=seed), epoch)._documents)  # type: ignore[attr-defined]
        for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_a_streamed_text_is_read_in_stored_order_in_the_first_epoch() -> None:
    made = store([3] * 20)
    natural = TokenStore(made.tokens, made.starts, made.special, natural_order=True)
    assert Packing(natural, CONFIG)._documents.tolist() == list(range(20))  # type: ignore[attr-defined]
    assert Packing(natural, CONFIG, 1)._documents.tolist() != list(range(20))  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_first_positions_and_special_tokens_count_only_if_included(
    first: bool, special: bool
) -> None:
    config = replace(CONFIG, exclude_first_position=first, exclude_special_tokens=special)
    packing = Packing(store([4, 3, 6, 7, 9]), config)
    tokens = packing.sequences(0, packing.num_sequences)
    expected = sum(
        not (first and position == 0) and not (special and token == 0)
        for row in tokens.tolist()
        for position, token in enumerate(row)
    )
    assert packing.num_activations == expected == int(packing.keep(tokens).sum())
    assert packing.guaranteed_activations <= expected


def test_covering_finds_every_range_of_activations() -> None:
    packing = Packing(store([4, 3, 6, 7, 9, 2, 8]), CONFIG)
    every = packing.sequences(0, packing.num_sequences)
    activations = every[packing.keep(every)]
    for low in range(packing.num_activations):
        for high in range(low + 1, packing.num_activations + 1):
            begin, end, skip = packing.covering(low, high)
            part = packing.sequences(begin, end)
            found = part[packing.keep(part)][skip : skip + high - low]
            assert found.tolist() == activations[low:high].tolist()
            assert end - begin <= (high - low) + 2  # nearly the fewest sequences


def test_guaranteed_activations_hold_for_every_order() -> None:
    rng = np.random.default_rng(0)
    made = store(rng.integers(2, 12, 60).tolist())
    bound = Packing(made, CONFIG).guaranteed_activations
    counts = [Packing(made, replace(CONFIG, order_seed=s)).num_activations for s in range(50)]
    assert bound <= min(counts)
    assert max(counts) - bound <= 60  # the bound is tight


def test_stores_hold_every_document_once(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    model = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    text = TextFilesConfig(path=str(tiny_text)).resolve(tmp_path)
    train, held_out = token_stores(text, model.tokenizer, "t", 0)
    documents = list(text.documents())
    expected = Counter(tuple(model.tokenizer(d)["input_ids"]) for d in documents)
    found: Counter[tuple[int, ...]] = Counter()
    for part in (train, held_out):
        for a, b in zip(part.starts[:-1], part.starts[1:], strict=True):
            found[tuple(part.tokens[a:b].tolist())] += 1
    assert found == expected
    assert held_out.num_documents == sum(is_held_out(d, 0.05) for d in documents)
    assert 0.03 < held_out.num_documents / len(documents) < 0.07
    assert all(part.tokens[a] == 0 for part in (train, held_out) for a in part.starts[:-1])


def test_a_text_is_tokenised_once(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    text = TextFilesConfig(path=str(tiny_text)).resolve(tmp_path)
    first = token_stores(text, model.tokenizer, "t", 0)

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr("reseed.activations.tokens._encode", broken)
    assert token_stores(text, model.tokenizer, "t", 0) == first
    # Another tokenizer or split has another store.
    with pytest.raises(AssertionError, match="tokenised twice"):
        token_stores(text, model.tokenizer, "other", 0)
    other = TextFilesConfig(path=str(tiny_text), held_out_fraction=0.1).resolve(tmp_path)
    with pytest.raises(AssertionError, match="tokenised twice"):
        token_stores(other, model.tokenizer, "t", 0)


def test_a_text_that_changes_while_it_is_read_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Its tokens would be stored as those of the text that was hashed."""
    model = PathModelConfig(path=str(tiny_model)).resolve(tmp_path / "fingerprints")
    folder, cache = tmp_path / "texts", tmp_path / "cache"
    folder.mkdir()
    for change in ({"a.txt": "the dog ran"}, {"b.txt": "a mat"}):
        (folder / "a.txt").write_text("the cat ran home")
        text = TextFilesConfig(path=str(folder)).resolve(cache)
        for name, content in change.items():
            (folder / name).write_text(content)
        with pytest.raises(ReseedError, match=r"the files of the text \w+ changed while"):
            token_stores(text, model.tokenizer, "t", 0)
        assert [path for path in cache.rglob("*") if not path.is_dir()] == []
    (folder / "b.txt").unlink()
    again = TextFilesConfig(path=str(folder)).resolve(cache)
    assert again.fingerprint == text.fingerprint
    stores = token_stores(again, model.tokenizer, "t", 0)
    assert (
        np.concatenate([part.tokens for part in stores]).tolist()
        == model.tokenizer("the cat ran home")["input_ids"]
    )


def test_a_text_is_resolved_again_if_its_files_change(tiny_model: Path, tmp_path: Path) -> None:
    model = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    config = TextFilesConfig(path=str(folder), context_length=8)

    def fingerprint(**files: str) -> str:
        for name, content in files.items():
            (folder / f"{name}.txt").write_text(content)
        return resolve_model_text(model, config, tmp_path).text.fingerprint

    found = [fingerprint(a="a cat"), fingerprint(a="the dog"), fingerprint(b="a mat")]
    assert len(set(found)) == 3
    assert fingerprint() == found[-1]
    first, second = (resolve_model_text(model, config, tmp_path).text for _ in range(2))
    assert first is second, "files that do not change are hashed once"


def test_one_of_two_commands_that_need_a_store_waits(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    text = TextFilesConfig(path=str(tiny_text)).resolve(tmp_path)
    begun, waiting = Event(), Event()
    encode, counted = tokens._encode, []

    def slow(tokenizer: Any, documents: list[str], vocabulary: int) -> Any:
        begun.set()
        assert waiting.wait(60)
        counted.extend(documents)
        return encode(tokenizer, documents, vocabulary)

    def heard(message: str) -> None:
        if "waiting for another process, which tokenises words" in message:
            waiting.set()

    monkeypatch.setattr(tokens, "_encode", slow)
    monkeypatch.setattr(tokens, "say", heard)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(token_stores, text, model.tokenizer, "t", 0)
        assert begun.wait(60)
        second = pool.submit(token_stores, text, model.tokenizer, "t", 0)
        stores = [*first.result(), *second.result()]
    assert sorted(counted) == sorted(text.documents())
    assert [len(store) for store in stores[:2]] == [len(store) for store in stores[2:]]
    assert [p.name for p in (tmp_path / "tokens").iterdir() if p.name.startswith(".")] == []


@dataclass(frozen=True, kw_only=True)
class FirstWords(TextFilesConfig, name="first-words"):
    """The first words of the documents of files; the fingerprint is that of the files."""

    words: int = setting(3, at_least=1)

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        for document in super().documents(text, shuffled):
            yield " ".join(document.split()[: self.words])


def test_a_kind_of_text_has_tokens_of_its_own(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    model = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    texts = {
        None: TextFilesConfig(path=str(tiny_text)),
        3: FirstWords(path=str(tiny_text)),
        4: FirstWords(path=str(tiny_text), words=4),
    }
    assert len({config.resolve(tmp_path).fingerprint for config in texts.values()}) == 1
    for words, config in texts.items():
        train, _ = token_stores(config.resolve(tmp_path), model.tokenizer, "t", 0)
        lengths = set(np.diff(train.starts).tolist())
        assert (lengths == {1 + words}) if words else (len(lengths) > 40)  # 1: the BOS token


def test_stored_tokens_of_version_0_1_keep_their_keys() -> None:
    """The options in the key are those that version 0.1 listed by name."""
    assert _text_options(DocstringsConfig()) == {}
    files = {"separator": "<|endoftext|>", "field": "text"}
    assert _text_options(TextFilesConfig(path="x")) == files
    hub = {"subset": None, "split": "train", "field": "text"}
    hub |= {"streaming": True, "shuffle_buffer": 10_000}
    assert _text_options(HubTextConfig(repository="a/b")) == hub


def test_without_a_bos_token_documents_start_with_the_eos_token(tmp_path: Path) -> None:
    from reseed.activations.tokens import _encode

    class GPTLike:
        bos_token_id, eos_token_id = None, 7

        def __call__(self, documents: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(d)] for d in documents]}

    assert [ids.tolist() for ids in _encode(GPTLike(), ["a", "bb"])] == [[7, 1], [7, 2]]
