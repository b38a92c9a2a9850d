"""Contexts of latents: against plain loops, for any blocks and any other SAEs in the pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import assert_declared

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.text_source import TextSource
from reseed.errors import ConfigError, ReseedError
from reseed.evaluate import contexts as contexts_evaluation
from reseed.evaluate.base import EvaluationInput, LoadedRun, ModelCache
from reseed.evaluate.contexts import ContextsConfig
from reseed.sae.base import SAE, SAEConfig
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.store.contexts import EVALUATION, SAMPLED, TOP, Contexts, LatentContexts
from reseed.store.results import FOLDER, StoredEvaluation, result_folder

D, F, CONTEXT = 16, 150, 32
HOOKS = [Hookpoint("resid_post", 1), Hookpoint("mlp_out", 0), Hookpoint("attn_out", 2)]
ARCHITECTURES: dict[str, SAEConfig] = {
    "topk": TopKConfig(num_latents=F, k=3),
    "groupmax": TopKConfig(num_latents=F, k=3, activation="groupmax"),
    "batch_topk": BatchTopKConfig(num_latents=F, k=3),
    "matryoshka": MatryoshkaConfig(num_latents=F, k=3),
    "relu": ReLUConfig(num_latents=F),
    "jumprelu": JumpReLUConfig(num_latents=F),
    "gated": GatedConfig(num_latents=F),
}
SMALL = ContextsConfig(tokens=300, top=3, sampled=4, reservoir=8, window=5, lens=4, neighbours=3)


def sae_of(name: str, seed: int = 0) -> SAE:
    """Build an SAE: latents fire on about a fifth of the tokens, or by k; the first is silent."""
    sae = ARCHITECTURES[name].build(D, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.b_enc.fill_(-0.3)
        sae.b_enc[0] = -1e6
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.5)
    return sae


def evaluated(
    source: TextSource, folder: Path, saes: Mapping[str, tuple[Hookpoint, SAE]],
    config: ContextsConfig = SMALL,
) -> dict[str, Contexts]:  # fmt: skip
    """Evaluate SAEs, write their contexts and read them again."""
    runs = [LoadedRun(name, sae, hook) for name, (hook, sae) in saes.items()]
    found = {}
    for name, result in config.evaluate(runs, EvaluationInput(source, ModelCache(folder))):
        assert_declared(config, result)
        place = result_folder(folder / name, EVALUATION, config.signed())
        StoredEvaluation(
            EVALUATION, config.to_dict(), result.metrics, result.tables, result.latents
        ).write(place)
        found[name] = Contexts.read(place)
    return found


@dataclass
class _Fired:
    """A token that a latent fires on."""

    position: int
    value: float
    tokens: list[int]
    activations: list[float]
    peak: int


def firings_of(source: TextSource, hook: Hookpoint, sae: SAE, reach: int) -> list[list[_Fired]]:
    """Return all firings of each latent, token by token."""
    sequences, kept = source.held_out_sequences(SMALL.tokens)
    found: list[list[_Fired]] = [[] for _ in range(sae.num_latents)]
    whole = torch.cat([x[hook] for x in source.model.activations(sequences, [hook])])
    for s, tokens in enumerate(sequences):
        dense = torch.zeros(CONTEXT, sae.num_latents)
        dense[kept[s]] = sae.encode(whole[s][kept[s]])
        for t in range(CONTEXT):
            low, high = max(0, t - reach), min(CONTEXT, t + reach + 1)
            for j in dense[t].nonzero()[:, 0].tolist():
                found[j].append(
                    _Fired(
                        s * CONTEXT + t,
                        float(dense[t, j]),
                        tokens[low:high].tolist(),
                        dense[low:high, j].tolist(),
                        t - low,
                    )
                )
    return found


def as_values(one: LatentContexts) -> dict[str, Any]:
    """Return all fields as comparable values."""
    contexts = [
        (c.kind, c.quantile, c.tokens.tolist(), c.activations.tolist(), c.peak, c.position)
        for c in one.contexts
    ]
    return {**vars(one), "contexts": contexts}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_contexts_equal_those_of_a_plain_loop(
    source: TextSource, tmp_path: Path, name: str
) -> None:
    hook, sae = HOOKS[0], sae_of(name)
    own = evaluated(source, tmp_path, {"a": (hook, sae)})["a"]
    _, kept = source.held_out_sequences(SMALL.tokens)
    assert own.tokens == int(kept.sum())
    assert own.num_latents == F
    several = 0
    for found, fired in zip(
        own.latents(0, F), firings_of(source, hook, sae, SMALL.window), strict=True
    ):
        assert found.firing == len(fired)
        assert found.density == len(fired) / own.tokens
        values = [f.value for f in fired]
        assert found.largest == pytest.approx(max(values, default=0), rel=1e-5)
        assert found.mean == pytest.approx(sum(values) / max(len(values), 1), rel=1e-5)
        best_of: dict[int, _Fired] = {}
        for f in fired:
            best = best_of.setdefault(f.position // CONTEXT, f)
            if f.value > best.value:
                best_of[f.position // CONTEXT] = f
        several += len(best_of) < len(fired)
        expected = sorted(best_of.values(), key=lambda f: -f.value)[: SMALL.top]
        top = [c for c in found.contexts if c.kind == TOP]
        assert [c.position for c in top] == [f.position for f in expected]
        by_position = {f.position: f for f in fired}
        for c in found.contexts:
            f = by_position[c.position]
            assert (c.tokens.tolist(), c.peak) == (f.tokens, f.peak)
            assert c.activations == pytest.approx(np.array(f.activations), rel=1e-4, abs=1e-6)
        drawn = [c for c in found.contexts if c.kind == SAMPLED]
        assert found.contexts == (*top, *drawn)
        assert len({c.position for c in drawn}) == len(drawn) == min(SMALL.sampled, len(fired))
        shown = [float(c.activations[c.peak]) for c in drawn]
        assert shown == sorted(shown, reverse=True)
        if len(fired) <= SMALL.reservoir:  # all are drawn, so the quantiles are known
            order = sorted(values, reverse=True)
            for c, value in zip(drawn, shown, strict=True):
                assert c.quantile is not None
                rank = (1 - c.quantile) * len(fired) - 0.5
                assert order[round(rank)] == pytest.approx(value, rel=1e-5)
                assert rank == pytest.approx(round(rank), abs=1e-4)
    assert not own.latent(0).contexts, "latent 0 is silent"
    assert several, "some latent must fire twice in a sequence"


def test_contexts_do_not_depend_on_blocks_or_other_saes(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {name: (HOOKS[i % 3], sae_of(name, i)) for i, name in enumerate(ARCHITECTURES)}
    together = evaluated(source, tmp_path / "together", saes)
    monkeypatch.setattr(contexts_evaluation, "_BYTES_PER_PASS", 1)  # a pass for each SAE
    alone = evaluated(source, tmp_path / "alone", saes)
    for name in saes:
        for a, b in zip(together[name].latents(0, F), alone[name].latents(0, F), strict=True):
            assert as_values(a) == as_values(b)
    monkeypatch.setattr(
        contexts_evaluation, "_BLOCK", 1
    )  # one sequence per block rounds differently
    cut = evaluated(source, tmp_path / "cut", saes)
    for name in saes:
        for a, b in zip(together[name].latents(0, F), cut[name].latents(0, F), strict=True):
            assert [c.position for c in a.contexts] == [c.position for c in b.contexts]
            assert a.firing == b.firing
            assert a.largest == pytest.approx(b.largest, rel=1e-5)


def test_more_tokens_never_lower_counts_or_maxima(source: TextSource, tmp_path: Path) -> None:
    saes = {"a": (HOOKS[0], sae_of("relu"))}
    some = evaluated(source, tmp_path / "some", saes)["a"]
    more = evaluated(source, tmp_path / "more", saes, replace(SMALL, tokens=900))["a"]
    assert some.tokens < more.tokens
    for a, b in zip(some.latents(0, F), more.latents(0, F), strict=True):
        assert b.largest >= a.largest * (1 - 1e-5)
        assert b.firing >= a.firing


def test_special_tokens_and_first_positions_are_shown_without_activation(
    source: TextSource, tmp_path: Path
) -> None:
    own = evaluated(source, tmp_path, {"a": (HOOKS[0], sae_of("relu"))})["a"]
    seen = 0
    for latent in own.latents(0, F):
        for c in latent.contexts:
            first = c.position % CONTEXT - c.peak == 0
            seen += first
            assert not first or c.activations[0] == 0
            assert not c.activations[c.tokens == 0].any(), "the SAE never encodes the BOS token"
    assert seen, "some window must begin with its sequence"


def test_reading_one_latent_reads_one_row_group(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluated(source, tmp_path, {"a": (HOOKS[0], sae_of("topk"))})["a"]
    read: list[int] = []
    real = own._file.read_row_group
    monkeypatch.setattr(own._file, "read_row_group", lambda g: read.append(g) or real(g))
    assert own.latent(140).latent == 140
    assert read == [1]
    assert [x.latent for x in own.latents(120, 135)] == list(range(120, 135))
    assert read == [1, 0, 1]
    with pytest.raises(ReseedError, match=r"latent must be from 0 to 149 in .*; got 150"):
        own.latent(150)


def test_texts_are_those_of_the_tokens(source: TextSource, tmp_path: Path) -> None:
    own = evaluated(source, tmp_path, {"a": (HOOKS[0], sae_of("topk"))})["a"]
    tokenizer = source.model.resolved.tokenizer
    for latent in (own.latent(j) for j in (3, 70)):
        for c in latent.contexts:
            assert own.text(c.tokens) == [tokenizer.decode([i]) for i in c.tokens.tolist()]
        assert all(own.text([t]) for t, _ in (*latent.promoted, *latent.suppressed))


def test_the_newest_result_is_read_or_none(source: TextSource, tmp_path: Path) -> None:
    assert Contexts.of(tmp_path / "a") is None
    saes = {"a": (HOOKS[0], sae_of("topk"))}
    evaluated(source, tmp_path, saes)
    evaluated(source, tmp_path, saes, replace(SMALL, top=2))
    newest = Contexts.of(tmp_path / "a")
    assert newest is not None
    assert newest.settings["top"] == 2
    assert len(list((tmp_path / "a" / FOLDER).iterdir())) == 2


def test_only_the_residual_stream_has_a_lens(source: TextSource, tmp_path: Path) -> None:
    saes = {str(hook): (hook, sae_of("topk")) for hook in HOOKS}
    found = evaluated(source, tmp_path, saes)
    assert [bool(own.latent(5).promoted) for own in found.values()] == [True, False, False]
    without = replace(SMALL, lens=0, neighbours=0, sampled=0, window=0)
    bare = list(evaluated(source, tmp_path, saes, without)["resid_post.1"].latents(0, F))
    assert not any((*x.promoted, *x.suppressed, *x.neighbours) for x in bare)
    assert {(c.kind, len(c.tokens), c.peak) for x in bare for c in x.contexts} == {(TOP, 1, 0)}


def test_impossible_settings_are_refused(source: TextSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`sampled` \(=9\) must not exceed `reservoir` \(=8\)"):
        ContextsConfig(sampled=9, reservoir=8)
    many = {"a": (HOOKS[0], sae_of("topk"))}
    with pytest.raises(ConfigError, match="must not exceed the held-out activations"):
        evaluated(source, tmp_path, many, replace(SMALL, tokens=10**7))
