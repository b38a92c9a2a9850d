"""A world as a source of activations: chunks, held-out tokens, compatible options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reseed.activations.dataset import STRIPES, Position
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.source import ActivationSource
from reseed.activations.synthetic.world_source import GeneratedConfig, WorldConfig, WorldSource
from reseed.activations.text import DocstringsConfig
from reseed.errors import ConfigError

HOOK = Hookpoint("resid_post", 0)
WORLD = WorldConfig(
    d_in=8, num_features=6, firing=(0.3,) * 6, groups=1, group_rank=2, group_probability=0.2
)
DATA = GeneratedConfig(chunk_tokens=128)


def source(data: GeneratedConfig = DATA, world: WorldConfig = WORLD) -> ActivationSource:
    found = world.resolve(Path("unused")).data(data, Path("unused"))
    return found.open(torch.device("cpu"), needed=0)


def chunks(order: list[int], data: GeneratedConfig = DATA, world: WorldConfig = WORLD) -> dict:
    stream = source(data, world).stream([HOOK])
    return {c: stream.chunk(c)[HOOK].clone() for c in order}


def held_out(tokens: int, data: GeneratedConfig = DATA) -> torch.Tensor:
    return torch.cat([x[HOOK] for x in source(data).held_out([HOOK], tokens)])


def test_a_chunk_does_not_depend_on_earlier_requests() -> None:
    forward, backward = chunks([0, 1, 2]), chunks([2, 0, 1])
    for c in (0, 1, 2):
        assert torch.equal(forward[c], backward[c])
        assert forward[c].shape == (8, 16, 8)
    assert not torch.equal(forward[0], forward[1])


def test_batches_can_start_at_any_step() -> None:
    stream = source().stream([HOOK])
    batches = stream.batches(32)
    first = [next(batches)[HOOK] for _ in range(6)]
    assert stream.position(5, 32) == Position(1, 32 // STRIPES)
    assert stream.num_batches(32) is None
    again = source().stream([HOOK]).batches(32, start=5)
    assert torch.equal(next(again)[HOOK], first[5])
    assert first[0].shape == (32, 8)
    # A chunk's four batches hold each of its tokens once.
    whole = torch.cat(first[:4])
    expected = chunks([0])[0].flatten(0, 1)
    assert torch.equal(torch.sort(whole.sum(1)).values, torch.sort(expected.sum(1)).values)


def test_the_order_seed_changes_training_but_not_held_out_activations() -> None:
    moved = replace(DATA, order_seed=1)
    rows = [set(map(tuple, chunks([0], d)[0].flatten(0, 1).tolist())) for d in (DATA, moved)]
    assert len(rows[0] - rows[1]) > 10  # other draws, not only another order
    assert torch.equal(held_out(300), held_out(300, moved))
    assert torch.equal(held_out(300), held_out(300, replace(DATA, chunk_tokens=64)))


def test_fewer_held_out_tokens_are_a_prefix_and_none_are_trained_on() -> None:
    few, many = held_out(100), held_out(5_000)
    assert many.shape == (5_000, 8)
    assert torch.equal(few, many[:100])
    seen = {tuple(row) for row in chunks([0])[0].flatten(0, 1).tolist()}
    # A firing group adds a continuous direction, so that no two tokens are equal by chance.
    active = torch.cat([s.group_active[:, 0] for s in source().held_out_samples(5_000)])
    apart = [tuple(row) for row in many[active].tolist()]
    assert len(apart) > 500
    assert not seen & set(apart)


def test_held_out_samples_match_the_held_out_activations() -> None:
    opened = source()
    assert isinstance(opened, WorldSource)
    found = list(opened.held_out_samples(5_000))
    assert torch.equal(torch.cat([s.x for s in found]), held_out(5_000))
    assert int(found[-1].token.max()) < len(found[-1].x)
    assert opened.world.config == WORLD
    assert opened.held_out_available is None


def test_the_worlds_seed_changes_its_features() -> None:
    other = replace(WORLD, seed=1)
    assert not torch.equal(chunks([0])[0], chunks([0], world=other)[0])
    opened, again = source().world, source(world=other).world
    assert opened is not None
    assert again is not None
    assert not torch.equal(opened.dictionary, again.dictionary)


def test_a_world_has_one_hookpoint() -> None:
    found = replace(WORLD, label="mine").resolve(Path("unused"))
    found.check(HOOK)
    assert found.d_in(HOOK) == 8
    with pytest.raises(ConfigError, match="`layer` must be 0: mine is a world and has one layer"):
        found.check(Hookpoint("resid_post", 1))
    with pytest.raises(ConfigError, match=r"`hookpoint.site` must be resid_post.*got mlp_out"):
        found.check(Hookpoint("mlp_out", 0))


def test_a_world_refuses_a_text() -> None:
    with pytest.raises(
        ConfigError, match="=docstrings is a text, but model=mine is a world"
    ) as error:
        replace(WORLD, label="mine").resolve(Path("unused")).data(DocstringsConfig(), Path("x"))
    assert "dataset=generated" in str(error.value)


def test_a_language_model_refuses_generated_data(tiny_model: Path, tmp_path: Path) -> None:
    from reseed.activations.model_source import PathModelConfig

    found = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    with pytest.raises(ConfigError, match=r"=generated is for model=world_.*model=tiny-llama is a"):
        found.data(DATA, tmp_path)
