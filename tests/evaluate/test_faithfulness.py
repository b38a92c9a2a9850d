"""Faithfulness of an SAE in a model: against equal ablations, and against an independent loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluation_helpers import assert_declared, constant

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.intervention import intervene, logits
from reseed.activations.language_model import LanguageModel
from reseed.activations.text_source import TextSource
from reseed.errors import ConfigError
from reseed.evaluate.base import EvaluationInput, LoadedRun, ModelCache, Result, RunSource
from reseed.evaluate.faithfulness import FaithfulnessConfig, _recovered
from reseed.sae.base import SAE
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

D = 16
HOOKS = [Hookpoint("resid_post", 1), Hookpoint("mlp_out", 0), Hookpoint("attn_out", 2)]


def inputs(source: TextSource, tmp_path: Path) -> EvaluationInput:
    return EvaluationInput(source, ModelCache(tmp_path))


def results(source: TextSource, tmp_path: Path, saes: dict[str, tuple[Hookpoint, SAE]]):
    runs = [LoadedRun(name, sae, hook) for name, (hook, sae) in saes.items()]
    config = FaithfulnessConfig(tokens=300)
    return dict(config.evaluate(runs, inputs(source, tmp_path)))


def identity() -> SAE:
    """Build an SAE that reconstructs exactly: a latent for either sign of every dimension."""
    sae = ReLUConfig(num_latents=2 * D).build(D, torch.Generator())
    with torch.no_grad():
        rows = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def mean_at(source: TextSource, hook: Hookpoint) -> torch.Tensor:
    """Average over the replaced positions, one by one."""
    sequences, kept = source.held_out_sequences(300)
    x = torch.cat([found[hook] for found in source.model.activations(sequences, [hook])])
    return torch.stack([x[s, t] for s, t in kept.nonzero().tolist()]).double().mean(0).float()


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_the_identity_loses_nothing_and_constants_are_ablations(
    source: TextSource, tmp_path: Path, hook: Hookpoint
) -> None:
    found = results(
        source, tmp_path,
        {
            "identity": (hook, identity()),
            "zero": (hook, constant(torch.zeros(D))),
            "mean": (hook, constant(mean_at(source, hook))),
        },
    )  # fmt: skip
    assert_declared(FaithfulnessConfig(), found["identity"])
    exact, zero, mean = (found[name].metrics for name in ("identity", "zero", "mean"))
    assert exact["ce"] == pytest.approx(exact["ce_clean"], abs=1e-6)
    assert exact["kl"] == pytest.approx(0, abs=1e-6)
    assert exact["kl_recovered_zero"] == pytest.approx(1, abs=1e-4)
    for ablation, own in (("zero", zero), ("mean", mean)):
        assert own["ce"] == pytest.approx(own[f"ce_{ablation}"], abs=1e-6)
        assert own["kl"] == pytest.approx(own[f"kl_{ablation}"], abs=1e-6)
        assert own[f"kl_recovered_{ablation}"] == pytest.approx(0, abs=1e-4)
        assert own["kl"] > 1e-4, "the ablation must change something"
    assert zero["ce_zero"] == mean["ce_zero"], "all SAEs see the same tokens"


@torch.no_grad()
def test_losses_equal_those_of_a_loop_in_float64(source: TextSource, tmp_path: Path) -> None:
    """The loop takes one sequence at a time and sums cross-entropy and KL in float64."""
    hook, sae = HOOKS[0], TopKConfig(num_latents=32, k=3).build(D, torch.Generator().manual_seed(1))
    result = results(source, tmp_path, {"a": (hook, sae)})["a"]
    sequences, kept = source.held_out_sequences(300)
    model = source.model.model
    ce_clean, ce, kl = [], [], []
    for tokens, inside in zip(sequences, kept, strict=True):
        clean = model(input_ids=tokens[None]).logits[0].double()

        def swapped(module, inputs, output, inside=inside):
            x = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            for t in range(len(inside)):
                if inside[t]:
                    x[0, t] = sae(x[0, t][None]).reconstruction[0]
            return x if isinstance(output, torch.Tensor) else (x, *output[1:])

        handle = model.model.layers[1].register_forward_hook(swapped)
        edited = model(input_ids=tokens[None]).logits[0].double()
        handle.remove()
        for t in range(len(tokens) - 1):
            if inside[t]:
                p, q = F.log_softmax(clean[t], -1), F.log_softmax(edited[t], -1)
                ce_clean.append(-p[tokens[t + 1]])
                ce.append(-q[tokens[t + 1]])
                kl.append((p.exp() * (p - q)).sum())
    for name, values in (("ce_clean", ce_clean), ("ce", ce), ("kl", kl)):
        assert result.metrics[name] == pytest.approx(float(sum(values)) / len(values), rel=1e-4)
    assert result.tables["sequences"]["predictions"].sum() == len(kl)
    assert not kept[:, 0].any(), "the first position is left out"
    assert result.metrics["tokens"] == int(kept.sum()) >= 300


def test_losses_do_not_depend_on_batches_or_other_saes(source: TextSource, tmp_path: Path) -> None:
    saes: dict[str, tuple[Hookpoint, SAE]] = {
        str(i): (HOOKS[i % 3], TopKConfig(num_latents=8, k=2).build(D, torch.Generator()))
        for i in range(10)  # more SAEs than share a pass
    }
    together = results(source, tmp_path, saes)
    assert list(together) == list(saes)
    source.model.batch_sequences = 1
    try:
        alone: Result = results(source, tmp_path, {"9": saes["9"]})["9"]
    finally:
        source.model.batch_sequences = 4
    known = {name: value for name, value in alone.metrics.items() if value is not None}
    assert len(known) >= 9
    assert known == pytest.approx({n: together["9"].metrics[n] for n in known}, rel=1e-4)


def test_more_tokens_than_there_are_is_refused(source: TextSource, tmp_path: Path) -> None:
    config = FaithfulnessConfig(tokens=10**6)
    with pytest.raises(ConfigError, match=r"`tokens` \(=1,000,000\) must not exceed the held-out"):
        next(iter(config.evaluate([], inputs(source, tmp_path))))


def test_an_ablation_that_does_no_harm_recovers_nothing() -> None:
    assert _recovered(1.0, clean=2.0, worst=2.0) is None
    assert _recovered(3.0, clean=2.0, worst=6.0) == 0.75


def test_an_edit_of_another_shape_is_refused_and_the_hook_is_removed(source: TextSource) -> None:
    tokens = source.held_out_sequences(300)[0][:1]
    with pytest.raises(
        ValueError, match=r"the replacement of the output of model\.layers\.1, a tensor of shape"
    ):
        logits(source.model, tokens, {HOOKS[0]: lambda x: x[:, :1]})
    model: LanguageModel = source.model
    before = logits(model, tokens)
    with intervene(model, {HOOKS[0]: torch.zeros_like}):
        assert not torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), before), "the hook must be removed"


def test_gaussian_draws_and_worlds_are_refused() -> None:
    model: Any = SimpleNamespace(fingerprints={"world": "x"}, kind="a world")
    with pytest.raises(ConfigError, match="evaluation=faithfulness needs a language model; world_"):
        FaithfulnessConfig().check(RunSource(model, "world_easy", "none"))
    model.fingerprints = {"model": "x", "tokenizer": "y"}
    with pytest.raises(
        ConfigError, match="activations of surrogate=gaussian are random draws, without"
    ):
        FaithfulnessConfig().check(RunSource(model, "embedded+gaussian", "gaussian"))


def test_without_exclusions_every_position_is_replaced(source: TextSource) -> None:
    config = replace(source.config, exclude_first_position=False, exclude_special_tokens=False)
    other = TextSource.__new__(TextSource)
    other.__dict__ |= source.__dict__ | {"config": config}
    assert bool(other.held_out_sequences(300)[1].all())
