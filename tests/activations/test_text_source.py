"""A text's activations through the cache: the same bits, keyed by everything that decides them."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reseed.activations import chunks, text_source
from reseed.activations.cache import ActivationCache
from reseed.activations.chunk_cache import ChunkCache
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import PathModelConfig
from reseed.activations.synthetic.surrogate import open_source
from reseed.activations.text import TextFilesConfig
from reseed.activations.text_source import (
    ResolvedModelText,
    TextSource,
    chunk_key,
    resolve_model_text,
)
from reseed.config import digest
from reseed.errors import ConfigError

HOOKS = [Hookpoint("resid_post", 0), Hookpoint("mlp_out", 1)]
CPU = torch.device("cpu")


@pytest.fixture
def found(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> ResolvedModelText:
    config = TextFilesConfig(path=str(tiny_text), context_length=32, chunk_tokens=1024)
    return resolve_model_text(
        PathModelConfig(path=str(tiny_model)).resolve(tmp_path), config, tmp_path
    )


def cache_in(tmp_path: Path) -> ActivationCache:
    return ActivationCache(tmp_path / "activations", 1 << 30)


def everything(source: Any, hooks=HOOKS) -> list[torch.Tensor]:
    """Return some training chunks, one of a later epoch, and the held-out activations."""
    stream = source.stream(hooks)
    chosen = [stream.chunk(c) for c in (0, 2, 1)]
    return [c[h] for c in [*chosen, *source.held_out(hooks, 1500)] for h in hooks]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes every later loading of weights fail."""

    def forbid() -> None:
        def refused(self: LanguageModel) -> None:
            raise AssertionError("the weights were loaded")

        monkeypatch.setattr(LanguageModel, "model", property(refused))

    return forbid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("repeat", [False, True])
def test_cached_activations_equal_uncached_ones_and_need_no_weights(
    found: ResolvedModelText, tmp_path: Path, no_model, dtype: str, repeat: bool
) -> None:
    model = replace(found.model, config=replace(found.model.config, dtype=dtype))
    config = replace(found.config, repeat=repeat)
    found = replace(found, model=model, text=replace(found.text, config=config))
    plain = everything(found.open(CPU, 0))
    written = everything(found.open(CPU, 0, cache_in(tmp_path)))
    gc.collect()
    no_model()
    again = found.open(CPU, 0, cache_in(tmp_path))
    for other in (written, everything(again)):
        for a, b in zip(plain, other, strict=True):
            assert a.dtype == b.dtype == getattr(torch, dtype)
            assert torch.equal(a, b)
    assert found.flops_per_token(HOOKS) > 0


def test_epochs_of_a_repeated_text_are_not_mixed_up(
    found: ResolvedModelText, tmp_path: Path
) -> None:
    config = replace(found.config, repeat=True, chunk_tokens=8192)
    found = replace(found, text=replace(found.text, config=config))
    for cache in (None, cache_in(tmp_path), cache_in(tmp_path)):
        stream = found.open(CPU, 0, cache).stream(HOOKS)
        per_epoch = stream.position(stream._batches_per_epoch(64), 64).chunk
        got = [stream.chunk(c)[HOOKS[0]] for c in (0, per_epoch - 1, per_epoch, 2 * per_epoch - 1)]
        if cache is None:
            expected = got
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_hookpoint_cached_together_with_another_is_found_alone(
    found: ResolvedModelText, tmp_path: Path, no_model
) -> None:
    plain = everything(found.open(CPU, 0), HOOKS[1:])
    everything(found.open(CPU, 0, cache_in(tmp_path)))
    no_model()
    alone = everything(found.open(CPU, 0, cache_in(tmp_path)), HOOKS[1:])
    assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))


def test_gaussian_draws_take_their_moments_from_the_cache(
    found: ResolvedModelText, tmp_path: Path, no_model
) -> None:
    draws = [
        open_source(found, "gaussian", CPU, 0, cache).stream(HOOKS).chunk(1)[HOOKS[1]]
        for cache in (None, cache_in(tmp_path))
    ]
    no_model()
    again = open_source(found, "gaussian", CPU, 0, cache_in(tmp_path)).stream(HOOKS)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(again.chunk(1)[HOOKS[1]], draws[0])


def named(found: ResolvedModelText, part: str = "train") -> str:
    return digest(chunk_key(found, part, CPU))


def with_text(found: ResolvedModelText, **changes: Any) -> ResolvedModelText:
    return replace(found, text=replace(found.text, config=replace(found.config, **changes)))


def test_a_text_without_any_activations_gets_advice_that_helps(found: ResolvedModelText) -> None:
    """dataset.repeat=true would not help."""
    few, batch = "Give more text, or lower ", 1 << 20
    for options, key, advice in (
        ({"held_out_fraction": 1 - 1e-9}, "training.tokens", few + "dataset.context_length"),
        ({"chunk_tokens": batch}, "training.tokens", few + "training.batch_size"),
        ({"held_out_fraction": 1e-9}, "dataset.held_out_tokens",
         "Give more text, lower dataset.context_length, or raise dataset.held_out_fraction"),
    ):  # fmt: skip
        size = options.get("chunk_tokens", 64)
        with pytest.raises(ConfigError, match=rf"`{key}` .*: 0\. {advice}\.$"):
            with_text(found, **options).check_budget(1, int(size))


OTHER_TEXT = {
    "order_seed": 1, "chunk_tokens": 2048, "context_length": 16, "held_out_fraction": 0.5,
    "exclude_first_position": False, "exclude_special_tokens": False, "repeat": True,
    "separator": "\n\n", "field": "body", "subset_seed": 0, "encoding": "latin-1", "chat": True,
    "token_field": "ids",
}  # fmt: skip
OTHER_MODEL = {"dtype": "bfloat16", "batch_sequences": 4, "attention": "eager"}
NO_MATTER = {"path", "held_out_tokens", "held_out_dedup"}


def test_the_key_changes_with_every_declared_setting(found: ResolvedModelText) -> None:
    names = {f.name for f in dataclasses.fields(found.config)}
    assert names == set(OTHER_TEXT) | NO_MATTER, "a new option: does it change activations?"
    assert {f.name for f in dataclasses.fields(found.model.config)} == set(OTHER_MODEL) | {"path"}
    found.model.tokenizer.chat_template = "{{ messages }}"
    seen = [named(found)]
    seen += [named(with_text(found, **{name: value})) for name, value in OTHER_TEXT.items()]
    for name, value in OTHER_MODEL.items():
        config = replace(found.model.config, **{name: value})
        seen.append(named(replace(found, model=replace(found.model, config=config))))
    seen.append(named(found, "held_out"))
    assert len(set(seen)) == len(seen)
    assert named(with_text(found, held_out_tokens=5, held_out_dedup=True)) == seen[0]
    assert named(with_text(found, held_out_dedup=True), "held_out") not in seen
    # Held-out documents have no order.
    for name in ("order_seed", "subset_seed", "repeat", "held_out_tokens"):
        other = with_text(found, **{name: {**OTHER_TEXT, "held_out_tokens": 5}[name]})
        assert named(other, "held_out") == seen[-1]


def test_the_key_changes_with_the_content_of_the_files(
    found: ResolvedModelText, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def changed(what: str) -> str:
        folder, text = tmp_path / what / tiny_model.name, tmp_path / what / tiny_text.name
        shutil.copytree(tiny_model, folder)
        shutil.copy(tiny_text, text)
        if what == "weights":
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"][0] += 1e-6
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        elif what == "architecture":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        elif what == "tokenizer":
            tokenizer = (folder / "tokenizer.json").read_text()
            (folder / "tokenizer.json").write_text(tokenizer.replace('"cat"', '"cow"'))
        elif what == "text":
            text.write_text(text.read_text() + " cat")
        model = PathModelConfig(path=str(folder)).resolve(tmp_path)
        config = replace(found.config, path=str(text))
        return named(resolve_model_text(model, config, tmp_path))

    assert changed("nothing but the place") == named(found)
    seen = [named(found), *map(changed, ("weights", "architecture", "tokenizer", "text"))]
    random = resolve_model_text(found.model.with_random_weights(), found.config, tmp_path)
    seen.append(named(random))
    assert len(set(seen)) == 6


def test_the_key_changes_with_the_software_and_the_machine(
    found: ResolvedModelText, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [named(found)]
    for target, name, value in (
        (torch, "get_num_threads", lambda: 7),
        (torch, "__version__", "0.0"),
        (text_source.metadata, "version", lambda package: "0.0"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        (torch, "get_float32_matmul_precision", lambda: "medium"),
        (text_source, "VERSION", chunks.VERSION + 1),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, value)
            seen.append(named(found))
    assert len(set(seen)) == len(seen)
    assert named(found) == seen[0]


def test_the_address_changes_with_hookpoint_chunk_and_tokens(tmp_path: Path) -> None:
    chunk_cache = ChunkCache(cache_in(tmp_path), {"a": 1}, "{hookpoint}")
    hooks = [*HOOKS, Hookpoint("module", 0, "model.layers.*.mlp"), Hookpoint("resid_post", 1)]
    seen = {chunk_cache._address(h, c, t) for h in hooks for c in (0, 1) for t in ("x", "y")}
    assert len(seen) == 16


def test_entries_have_readable_names(found: ResolvedModelText, tmp_path: Path) -> None:
    everything(found.open(CPU, 0, cache_in(tmp_path)))
    names = sorted(e.path.name[:-25] for e in cache_in(tmp_path).stored())
    assert names == sorted(
        f"tiny-llama-{hook}-words-{part}" for hook in HOOKS for part in ("order0", "held_out")
    )


def test_weights_are_loaded_on_first_use(found: ResolvedModelText) -> None:
    source = found.open(CPU, 0)
    assert isinstance(source, TextSource)
    assert "model" not in vars(source.model)
    weights = source.model.model.parameters()
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in weights)
