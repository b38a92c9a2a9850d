"""The subset that a seed chooses, and the windows that two texts share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from reseed.activations import token_store
from reseed.activations.chunks import ActivationStream, TokenWindow, held_out_packing
from reseed.activations.dataset import STRIPES
from reseed.activations.text import TextFilesConfig
from reseed.activations.token_store import (
    WINDOW,
    Packing,
    TokenStore,
    overlap,
    overlap_of_sample,
)

CONFIG = TextFilesConfig(path="unused", context_length=5, chunk_tokens=64)


def store(seed: int, documents: int, tokens: int = 10**6, shortest: int = 2) -> TokenStore:
    """Return documents of random tokens; each begins with the special token 0."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(rng.integers(shortest, 30, documents))])
    ids = rng.integers(1, tokens, starts[-1]).astype(np.int32)
    ids[starts[:-1]] = 0
    return TokenStore(ids, starts.astype(np.int64), (0,))


def chosen(config: TextFilesConfig, needed: int | None, epoch: int = 0) -> list[tuple]:
    """Return the activations of an epoch in reading order: each token, and what stands before it
    in its sequence."""
    packing = Packing(store(0, 60), config, epoch, needed)
    window = TokenWindow.of(packing, 0, packing.num_activations)
    each = zip(window.sequences.tolist(), window.kept, strict=True)
    found = [tuple(s[: p + 1]) for s, kept in each for p in np.flatnonzero(kept)]
    return found[window.skip : window.skip + window.num_activations]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("needed", [1, 64, 203, 10**6, None])
def test_with_a_subset_seed_the_order_seed_moves_nothing_but_the_order(
    needed: int | None, special: bool
) -> None:
    config = replace(CONFIG, subset_seed=2, exclude_special_tokens=special)
    first, *others = [chosen(replace(config, order_seed=seed), needed) for seed in range(5)]
    assert len(first) == min(needed or 10**6, len(chosen(config, None)))
    assert all(Counter(other) == Counter(first) for other in others)
    if needed != 1:
        assert all(other != first for other in others)
    # They are what an order seed of this value reads first.
    plain = chosen(replace(CONFIG, order_seed=2, exclude_special_tokens=special), None)
    assert Counter(first) == Counter(plain[: len(first)])
    if needed == 203:
        assert Counter(first) != Counter(chosen(replace(config, subset_seed=3), needed))


def test_each_epoch_has_its_own_order_of_the_whole_text() -> None:
    config = replace(CONFIG, subset_seed=2, repeat=True)
    epochs = [chosen(config, 10**6, epoch) for epoch in range(3)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    packing = Packing(store(0, 60), config, 1, 10**6)
    assert packing.guaranteed_activations == packing.num_activations == len(epochs[0])


def test_a_streams_chunks_hold_the_chosen_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoModel:
        device = None

    read = []
    for order_seed in (0, 1):
        config = replace(CONFIG, subset_seed=2, order_seed=order_seed)
        stream = ActivationStream(NoModel(), store(0, 60), config, [], None, 208)  # type: ignore[arg-type]
        assert stream.num_batches(16) == 208 // 16
        tokens: Counter[int] = Counter()
        for c in range(stream._chunks_per_epoch):
            epoch, first, rows = stream.extent(c)
            window = TokenWindow.of(stream._epoch(epoch), first, first + rows * STRIPES)
            flat = window.sequences[window.kept].tolist()
            tokens.update(flat[window.skip : window.skip + window.num_activations])
        read.append(tokens)
    assert read[0] == read[1]
    assert read[0].total() == 208


def test_the_order_of_held_out_documents_has_no_seed() -> None:
    orders = [
        held_out_packing(store(0, 60), replace(CONFIG, order_seed=a, subset_seed=b)).sequences(0, 9)
        for a, b in ((0, None), (3, None), (0, 4), (3, 5))
    ]
    assert all(np.array_equal(orders[0], other) for other in orders)


def windows(made: TokenStore) -> list[list[tuple[int, ...]]]:
    """Return the windows of each document."""
    each = zip(made.starts[:-1], made.starts[1:], strict=True)
    flat = made.tokens.tolist()
    return [[tuple(flat[i : i + WINDOW]) for i in range(a, b - WINDOW + 1)] for a, b in each]


@pytest.mark.parametrize("at_once", [50, 2**16])
@pytest.mark.parametrize("tokens", [2, 10**6])
def test_shared_windows_are_those_of_two_sets(
    tokens: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two tokens, many windows are shared by chance; with a million, those that are copied."""
    monkeypatch.setattr(token_store, "_BLOCK", at_once)
    monkeypatch.setattr(token_store, "_MOST", at_once)
    train, held_out = store(1, 80, tokens), store(2, 20, tokens, shortest=0)
    copied = train.tokens[40:90]  # across the ends of documents, too
    both = np.concatenate([held_out.tokens, copied])
    held_out = TokenStore(both, np.append(held_out.starts, len(both)), (0,))
    there = {window for document in windows(train) for window in document}
    expected = [[window in there for window in document] for document in windows(held_out)]
    told: list[str] = []
    monkeypatch.setattr(token_store, "throttled_say", lambda: told.append)
    found = overlap(train, held_out)
    assert told[0] == "looking for held-out text in the training text: 0%"
    assert found.windows == sum(map(len, expected))
    assert found.shared == sum(map(sum, expected)) > 0
    assert found.documents.tolist() == [any(each) for each in expected]


def joined(documents: list[np.ndarray]) -> TokenStore:
    starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in documents])])
    return TokenStore(np.concatenate(documents), starts.astype(np.int64), (0,))


@pytest.mark.parametrize("size", [1, 40, 10**6])
def test_the_sample_is_the_same_whatever_the_order_and_the_training_text(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "SAMPLE", size)
    monkeypatch.setattr(token_store, "_BLOCK", 50)
    made = store(2, 60, 10)
    each = np.split(made.tokens, made.starts[1:-1]) * 3  # with repeated windows
    held_out = joined(each)
    shuffled = joined([each[d] for d in np.random.default_rng(0).permutation(len(each))])
    asked: list[list[int]] = []
    looked_for = token_store._are_in
    monkeypatch.setattr(
        token_store, "_are_in", lambda hashes, train: asked.append(sorted(hashes.tolist()))
        or looked_for(hashes, train),
    )  # fmt: skip
    total = sum(map(len, windows(held_out)))
    every = sorted(token_store._windows(held_out, 0, len(held_out))[0].tolist())
    for given in (held_out, shuffled):
        for train, share in ((held_out, 1), (store(5, 30), 0)):
            sampled = min(size, total)
            assert overlap_of_sample(train, given) == (total, sampled, sampled * share)
    assert all(each == every[:size] for each in asked)


def test_texts_without_windows_share_none() -> None:
    empty = TokenStore(np.zeros(0, np.int32), np.zeros(1, np.int64), ())
    for train, held_out in ((empty, empty), (store(1, 5), empty), (empty, store(1, 5))):
        assert overlap(train, held_out).shared == 0
        assert overlap_of_sample(train, held_out)[2] == 0
