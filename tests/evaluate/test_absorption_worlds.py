"""Absorption on worlds whose absorbed tokens are known, with the true direction as the probe.

T1 and T2 of Chanin et al. 2024 (docs/worlds.md). A "word" is a token of the world on which the
parent fires; the parent is the class, and its main latent is found as for first letters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import words_of
from torch import Tensor

from reseed.activations.synthetic.worlds import World
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.evaluate.absorption.projection import Absorption, Alignment, Thresholds, absorption
from reseed.evaluate.sparse_latents import encode
from reseed.evaluate.splitting import find_splits
from reseed.evaluate.word_split import make_folds, split_words
from reseed.sae.base import SAE
from reseed.sae.checkpoint import load_sae
from reseed.sae.relu import ReLUConfig
from reseed.store.runs import Run, RunStore
from reseed.study.train import train_missing

TOKENS = 8_000
FAST = ["training.lr=1e-2", "training.tokens=512000"]  # as in tests/test_worlds_seen.py


def trained(folder: Path, *overrides: str) -> tuple[World, list[Run]]:
    own = [f"runtime.outputs={folder}", "runtime.progress=false", "training=world"]
    line = CommandLine("train", ["-m", *overrides, *own])
    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    found = [job.resolved for job in jobs]
    assert train_missing(found, runtime) == {}
    world = found[0].open().world
    assert world is not None
    return world, [resolved.run(RunStore(runtime.outputs)) for resolved in found]


def measured(sae: SAE, world: World) -> tuple[Absorption, Tensor]:
    """Measure the tokens where f0 fires; also return a mask of those where f1 fires too."""
    sample = world.sample(TOKENS, torch.Generator().manual_seed(1))
    fires = torch.zeros(TOKENS, len(world.dictionary), dtype=torch.bool)
    fires[sample.token, sample.feature] = True
    member = torch.stack([fires[:, 0], ~fires[:, 0]], dim=1)
    words = words_of(np.where(fires[:, 0], 0, 1).tolist())
    fold = make_folds(words, split_words(words, 1, 0), 1, 0)[0]
    codes = encode(sae, sample.x)
    # The parent is one concept: its first latent represents it.
    split = find_splits(codes, member, fold, most=1, random=torch.Generator().manual_seed(0))[0]
    assert split is not None
    there = torch.from_numpy(fold.test[fires[fold.test, 0].numpy()])
    direction = world.dictionary[:1]
    found = absorption(
        codes.rows(there), sample.x[there], torch.zeros(len(there), dtype=torch.long), direction,
        Alignment.of(sae.W_dec, direction), [split.main], Thresholds(),
    )  # fmt: skip
    return found, fires[there, 1]


def test_the_true_dictionary_absorbs_nothing_and_an_absorbing_one_every_child() -> None:
    """Weights by hand: the true dictionary, and one whose child latent includes the parent."""
    line = CommandLine("train", ["model=world_absorption"])
    jobs, _ = check_jobs(line, line.overrides, multirun=False)
    world = jobs[0].resolved.open().world
    assert world is not None
    u = world.dictionary
    for absorbing in (False, True):
        sae = ReLUConfig(num_latents=4).build(u.shape[1], torch.Generator())
        with torch.no_grad():
            sae.W_enc.copy_(u)
            sae.W_dec.copy_(u)
            if absorbing:
                sae.W_enc[0] -= 1.1 * u[1]  # silent, and not by rounding alone
                sae.W_dec[1] += u[0]
        found, child = measured(sae, world)
        assert 0 < child.sum() < len(child)
        wanted = child.double() if absorbing else torch.zeros(len(child))
        assert found.fraction.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
        assert found.full.tolist() == wanted.bool().tolist()
        if absorbing:
            assert (found.absorbers[child, 0] == 1).all()


@pytest.mark.slow
def test_a_child_absorbs_its_parent(tmp_path: Path) -> None:
    world, runs = trained(
        tmp_path, "model=world_absorption", "sae=relu", "sae.num_latents=4", "seed=1,2", *FAST
    )
    alive = [run for run in runs if run.metrics["live_fraction"] == 1]
    assert alive
    for run in alive:
        found, child = measured(load_sae(run.path), world)
        assert found.fraction[child].mean() > 0.9
        assert found.full[child].double().mean() > 0.9
        assert found.fraction[~child].max() < 0.05
        assert not found.full[~child].any()


@pytest.mark.slow
def test_independent_features_absorb_nothing(tmp_path: Path) -> None:
    world, runs = trained(
        tmp_path, "model=world_independent", "sae=relu", "sae.num_latents=4", "seed=0,1", *FAST
    )  # fmt: skip
    alive = [run for run in runs if run.metrics["live_fraction"] == 1]
    assert alive
    for run in alive:
        found, _ = measured(load_sae(run.path), world)
        assert found.fraction.mean() < 0.02
        assert found.full.double().mean() < 0.02


@pytest.mark.slow
def test_batch_topk_absorbs_too(tmp_path: Path) -> None:
    """f1 fires on 60% of f0's tokens as its child, or equally often but independently."""
    options = ["model=world_absorption_topk", "sae=batch_topk", "sae.num_latents=12", "sae.k=2.2",
               "training.lr=1e-2", "training.tokens=256000", "training.start=truth"]  # fmt: skip
    world, runs = trained(tmp_path, *options)
    for run in runs:
        found, child = measured(load_sae(run.path), world)
        assert found.fraction[child].mean() > 0.7
        assert found.fraction[~child].mean() < 0.05
    flat = [0.4, 0.24, *[0.15] * 10]
    world, runs = trained(
        tmp_path, *options, f"model.firing={flat}".replace(" ", ""), "model.parents=null"
    )
    for run in runs:
        found, _ = measured(load_sae(run.path), world)
        assert found.fraction.mean() < 0.05
