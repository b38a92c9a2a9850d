"""Streamed texts: read no further than needed, with the same held-out documents for all runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reseed.activations import text as text_module
from reseed.activations.text import HubTextConfig, ResolvedText
from reseed.activations.token_store import Packing, TokenStore
from reseed.activations.tokens import token_stores
from reseed.errors import ConfigError

CONFIG = HubTextConfig(
    repository="none",
    context_length=16,
    chunk_tokens=64,
    held_out_tokens=200,
    held_out_fraction=0.2,
)


class OneTokenAWord:
    """A tokenizer: word n is token n; 0 opens a document."""

    bos_token_id, eos_token_id, all_special_ids = 0, None, (0,)

    def __call__(self, documents: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(w) for w in d.split()] for d in documents]}


@pytest.fixture(autouse=True)
def _a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 documents of ten words, shuffled by the order seed alone."""

    def documents(config: HubTextConfig, fingerprint: str, shuffled: bool) -> Iterator[str]:
        order = np.arange(30_000)
        if shuffled:
            np.random.default_rng(config.order_seed).shuffle(order)
        for d in order:
            yield " ".join(str(10 * d + i + 1) for i in range(10))

    monkeypatch.setattr(text_module, "_hub_documents", documents)


def stores(config: HubTextConfig, cache: Path, needed: int) -> tuple[TokenStore, TokenStore]:
    return token_stores(ResolvedText(config, "f", "fake", cache), OneTokenAWord(), "t", needed)


def test_a_shorter_budget_reads_a_prefix_of_a_longer_one(tmp_path: Path) -> None:
    short, _ = stores(CONFIG, tmp_path, 1_000)
    long, _ = stores(CONFIG, tmp_path, 5_000)
    assert 1_000 < len(short) < 2_500 < 5_000 < len(long) < 8_000
    assert long.tokens[: len(short)].tolist() == short.tokens.tolist()
    assert short.natural_order


def test_held_out_documents_are_the_same_for_every_budget_and_order(tmp_path: Path) -> None:
    held_out = [
        stores(config, tmp_path, needed)[1].tokens.tolist()
        for config, needed in (
            (CONFIG, 1_000), (CONFIG, 20_000), (replace(CONFIG, order_seed=7), 1_000),
        )
    ]  # fmt: skip
    assert held_out[0] == held_out[1] == held_out[2]
    assert 200 < len(held_out[0]) < 400


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    train, held_out = stores(CONFIG, tmp_path, 50_000)
    words = [set(part.tokens.tolist()) - {0} for part in (train, held_out)]
    assert not words[0] & words[1]


def test_asking_for_more_held_out_tokens_reads_more(tmp_path: Path) -> None:
    few = stores(CONFIG, tmp_path, 1_000)[1]
    more = stores(replace(CONFIG, held_out_tokens=2_000), tmp_path, 1_000)[1]
    assert len(more) > 2_000 > len(few)
    assert more.tokens[: len(few)].tolist() == few.tokens.tolist()


def test_a_subset_seed_decides_alone_which_documents_are_read(tmp_path: Path) -> None:
    """They are those that an order seed of the same value reads."""
    first, other, same = (
        stores(replace(CONFIG, subset_seed=subset, order_seed=order), tmp_path, 1_000)
        for subset, order in ((3, 0), (3, 1), (None, 3))
    )
    assert first == other == same
    packings = [
        Packing(first[0], replace(CONFIG, subset_seed=3, order_seed=order), 0, 1_000)
        for order in (0, 1)
    ]
    a, b = (p.sequences(0, p.num_sequences) for p in packings)
    assert not np.array_equal(a, b)
    assert sorted(a.tolist()) == sorted(b.tolist())
    with pytest.raises(ConfigError, match="`held_out_dedup`=true needs the whole text"):
        replace(CONFIG, held_out_dedup=True)


def test_the_order_seed_changes_the_training_text(tmp_path: Path) -> None:
    a = stores(CONFIG, tmp_path, 1_000)[0]
    b = stores(replace(CONFIG, order_seed=1), tmp_path, 1_000)[0]
    assert a.tokens[:100].tolist() != b.tokens[:100].tolist()
