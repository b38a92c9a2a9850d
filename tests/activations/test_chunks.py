"""Chunks are a pure function; the other properties of the stream follow from that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reseed.activations.chunks import ActivationStream, TokenWindow, held_out_chunks
from reseed.activations.dataset import STRIPES, batches_available, check_batch_size
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import PathModelConfig
from reseed.activations.text import TextFilesConfig
from reseed.activations.token_store import Packing, TokenStore
from reseed.activations.tokens import token_stores
from reseed.errors import ConfigError

HOOKS = [Hookpoint("resid_post", 0), Hookpoint("mlp_out", 2)]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(
        PathModelConfig(path=str(tiny_model)).resolve(tmp_path_factory.mktemp("c"))
    )


@pytest.fixture(scope="module")
def config(tiny_text: Path) -> TextFilesConfig:
    return TextFilesConfig(path=str(tiny_text), context_length=32, chunk_tokens=1024)


@pytest.fixture(scope="module")
def stores(
    tiny_model: Path, config: TextFilesConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TokenStore, TokenStore]:
    cache = tmp_path_factory.mktemp("tokens")
    found = PathModelConfig(path=str(tiny_model)).resolve(cache)
    return token_stores(config.resolve(cache), found.tokenizer, "t", 0)


def stream(model: LanguageModel, stores, config, hooks=HOOKS) -> ActivationStream:
    return ActivationStream(model, stores[0], config, hooks)


def gather(model, packing, first: int, last: int, hooks) -> dict[Hookpoint, torch.Tensor]:
    """Return activations in reading order."""
    return TokenWindow.of(packing, first, last).read_by(model, hooks)


def test_a_chunk_does_not_depend_on_earlier_requests(model, stores, config) -> None:
    forward, backward = stream(model, stores, config), stream(model, stores, config)
    first = [forward.chunk(c)[HOOKS[0]].clone() for c in (0, 1, 2)]
    second = [backward.chunk(c)[HOOKS[0]].clone() for c in (2, 0, 1)]
    for a, b in zip(first, [second[1], second[2], second[0]], strict=True):
        assert torch.equal(a, b)


def test_a_chunk_does_not_depend_on_the_other_hookpoints(model, stores, config) -> None:
    both = stream(model, stores, config).chunk(1)
    alone = stream(model, stores, config, HOOKS[:1]).chunk(1)
    assert torch.equal(both[HOOKS[0]], alone[HOOKS[0]])


def test_stripes_are_consecutive_parts_each_permuted(model, stores, config) -> None:
    made = stream(model, stores, config)
    packing = Packing(stores[0], config)
    for c in (0, 3):
        chunk = made.chunk(c)[HOOKS[0]]
        plain = gather(model, packing, c * 1024, (c + 1) * 1024, HOOKS[:1])[HOOKS[0]]
        plain = plain.view(STRIPES, 128, -1)
        assert chunk.shape == plain.shape
        for stripe, rows in zip(chunk, plain, strict=True):
            assert not torch.equal(stripe, rows)
            key = lambda t: t[np.lexsort(t.T.numpy())]  # noqa: E731
            assert torch.equal(key(stripe), key(rows))


def test_every_activation_of_the_text_is_seen_once(model, stores, config) -> None:
    made = stream(model, stores, config, HOOKS[:1])
    packing = Packing(stores[0], config)
    assert 0 <= packing.num_activations - made.num_batches(64) * 64 < 64 + STRIPES
    # Only the last chunk, which is partial, may lose some at its end.
    whole = packing.num_activations // 1024 * 1024
    seen = torch.cat([batch[HOOKS[0]] for batch in made.batches(64)])[:whole]
    plain = gather(model, packing, 0, whole, HOOKS[:1])[HOOKS[0]]
    assert torch.allclose(seen.double().sum(0), plain.double().sum(0))
    norms = [torch.linalg.vector_norm(t.double(), dim=1).sort().values for t in (seen, plain)]
    assert torch.equal(*norms)


def test_a_batch_takes_the_same_number_from_every_stripe(model, stores, config) -> None:
    made = stream(model, stores, config, HOOKS[:1])
    chunk = made.chunk(0)[HOOKS[0]]
    batches = made.batches(64)
    for index in range(3):
        expected = chunk[:, index * 8 : (index + 1) * 8].reshape(64, -1)
        assert torch.equal(next(batches)[HOOKS[0]], expected)


@pytest.mark.parametrize("start", [1, 15, 16, 17, 40])
def test_starting_at_a_step_gives_the_same_batch_as_reading_up_to_it(
    model, stores, config, start: int
) -> None:
    made = stream(model, stores, config, HOOKS[:1])
    late = next(stream(model, stores, config, HOOKS[:1]).batches(64, start))
    at = made.position(start, 64)
    assert (at.chunk, at.row) == (start // 16, start % 16 * 64 // STRIPES)
    assert made.steps_before(at.chunk, 64) == start // 16 * 16
    for index, batch in enumerate(made.batches(64)):
        if index == start:
            assert torch.equal(batch[HOOKS[0]], late[HOOKS[0]])
            break


def test_the_order_seed_changes_the_stream(model, stores, config) -> None:
    a = stream(model, stores, config).chunk(0)[HOOKS[0]]
    b = stream(model, stores, replace(config, order_seed=1)).chunk(0)[HOOKS[0]]
    assert not torch.equal(a, b)


def test_a_repeated_text_continues_in_another_order(model, stores, config) -> None:
    repeated = replace(config, repeat=True, chunk_tokens=8192)
    made = stream(model, stores, repeated, HOOKS[:1])
    once = stream(model, stores, replace(config, chunk_tokens=8192), HOOKS[:1])
    per_epoch = batches_available(made.num_activations, repeated, 64)
    assert made.num_batches(64) is None
    assert once.num_batches(64) is not None
    batches = made.batches(64)
    seen = [next(batches)[HOOKS[0]] for _ in range(2 * per_epoch + 1)]
    assert all(batch.shape == (64, 16) for batch in seen)
    assert not torch.equal(seen[0], seen[per_epoch])
    second = made.position(per_epoch, 64)
    assert second.row == 0
    for size in (8, 64, 512):  # batches of every size end at the end of an epoch
        per_epoch = batches_available(made.num_activations, repeated, size)
        assert made.position(per_epoch, size) == second
        assert made.steps_before(second.chunk, size) == per_epoch
    last = made.rows(second.chunk - 1)
    assert 0 <= made.num_activations - (second.chunk - 1) * 8192 - last * STRIPES < STRIPES


def test_held_out_activations_do_not_depend_on_the_chunk_size_or_order_seed(
    model, stores, config
) -> None:
    whole = torch.cat([c[HOOKS[0]] for c in held_out_chunks(model, stores[1], config, HOOKS, 900)])
    small = replace(config, chunk_tokens=128, order_seed=5)
    parts = torch.cat([c[HOOKS[0]] for c in held_out_chunks(model, stores[1], small, HOOKS, 900)])
    assert whole.shape == (900, 16)
    # Another chunk size gives the model other batches, which may round differently.
    assert torch.allclose(whole, parts, atol=1e-5)


def test_batch_sizes_that_do_not_tile_chunks_are_refused() -> None:
    config = TextFilesConfig(path="x", chunk_tokens=1024)
    check_batch_size(config, 64)
    for wrong in (60, 96, 2048):
        with pytest.raises(ConfigError) as caught:
            check_batch_size(config, wrong)
        assert str(caught.value) == (
            "`training.batch_size` must be a multiple of 8 that divides dataset.chunk_tokens "
            f"(=1024); got {wrong}"
        )


def test_reading_past_the_end_of_the_text_is_an_error(model, stores, config) -> None:
    packing = Packing(stores[1], config)
    end = packing.num_activations
    with pytest.raises((ValueError, IndexError)):
        gather(model, packing, end - 5, end + 500, HOOKS)


def test_activations_equal_the_full_models_at_the_kept_positions(model, stores, config) -> None:
    """Compare with transformers' own output, position by position in Python."""
    packing = Packing(stores[0], config)
    begin, end, skip = packing.covering(100, 1000)
    tokens = torch.from_numpy(packing.sequences(begin, end).astype(np.int64))
    with torch.no_grad():
        hidden = model.model(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    kept = [
        hidden[s, p]
        for s in range(len(tokens))
        for p in range(32)
        if p > 0 and int(tokens[s, p]) not in stores[0].special
    ]
    plain = gather(model, packing, 100, 1000, HOOKS[:1])[HOOKS[0]]
    assert torch.allclose(plain, torch.stack(kept)[skip : skip + 900], atol=1e-5)
