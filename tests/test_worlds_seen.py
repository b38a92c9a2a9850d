"""Reproduction of the papers' toy models: worlds, trained and measured as users would.

Each test trains several seeds. The papers report signs and rough sizes, which set the tolerances.
Every change is tested with few steps, often at a higher learning rate; `make audit` repeats most
tests with the budgets of the papers. Comments give the values of 4 to 12 seeds with few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reseed.activations.synthetic.worlds import Sample, World
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.study.train import train_missing

Learned = Callable[..., tuple[World, list[Run]]]
pytestmark = pytest.mark.slow


def budgets(few: Sequence[str], paper: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrize ``budget``: overrides for few steps, and for about as many as in the papers."""
    audit = pytest.param(list(paper), id="paper", marks=pytest.mark.audit)
    return pytest.mark.parametrize("budget", [pytest.param(list(few), id="few"), audit])


@pytest.fixture
def learned(tmp_path: Path) -> Learned:
    """Return a function that trains SAEs on a world with several seeds, and returns both."""

    def train(*overrides: str, seeds: Sequence[int] = (0, 1, 2)) -> tuple[World, list[Run]]:
        own = [f"runtime.outputs={tmp_path / 'outputs'}", "runtime.progress=false"]
        given = [*overrides, f"seed={','.join(map(str, seeds))}", *own]
        line = CommandLine("train", ["-m", *given])
        jobs, runtime = check_jobs(line, line.overrides, multirun=True)
        found = [job.resolved for job in jobs]
        assert train_missing(found, runtime) == {}
        world = found[0].open().world
        assert world is not None
        return world, [resolved.run(RunStore(runtime.outputs)) for resolved in found]

    return train


def cosines(rows: Tensor, world: World) -> Tensor:
    """Return the cosines of rows and features, [latents, features]."""
    return torch.nn.functional.normalize(rows, dim=1) @ world.dictionary.T


def best(found: Tensor, feature: int) -> int:
    """Return the latent whose decoder is nearest to a feature."""
    return int(found[:, feature].argmax())


def firing(sample: Sample, features: int) -> Tensor:
    """Return a mask of the features that fire, [tokens, features]."""
    fires = torch.zeros(len(sample.x), features, dtype=torch.bool)
    fires[sample.token, sample.feature] = True
    return fires


def recall_on(run: Run, world: World, latent: int, *features: int) -> float:
    """Return how often a latent fires on tokens where all of ``features`` fire."""
    sample = world.sample(20_000, torch.Generator().manual_seed(1))
    there = firing(sample, len(world.dictionary))[:, list(features)].all(1)
    return float((load_sae(run.path).encode(sample.x[there])[:, latent] > 0).double().mean())


def mcc(run: Run) -> float:
    return run.metrics["truth"]["mcc"]


SPARSITY = dict.fromkeys(["topk", "batch_topk", "matryoshka", "jumprelu", "gated"], "target_l0=4")
SPARSITY |= {"relu": "l1_coefficient=2"}  # spare latents fire weakly: L0 is about 6


@pytest.mark.parametrize("sae", SPARSITY)
def test_every_architecture_finds_independent_features(learned: Learned, sae: str) -> None:
    """The world has 64 orthogonal features, 4 per token; the SAE has latents to spare."""
    _, runs = learned(
        "model=world_easy", f"sae={sae}", "sae.num_latents=128", f"sae.{SPARSITY[sae]}",
        "training.lr=3e-3", "training.tokens=128000", "training.batch_size=128", seeds=(0, 1),
    )  # fmt: skip
    for run in runs:
        # Of 4 seeds: at least .992, and 3.97 to 4.06; in batches of 256, JumpReLU has 4.29.
        assert mcc(run) > 0.95, run.id
        assert sae == "relu" or run.metrics["l0"] == pytest.approx(4, rel=0.1)


TOY = ["training=world", "sae=relu", "sae.num_latents=4"]
FAST = ["training.lr=1e-2", "training.tokens=512000"]  # 1,000 steps


@budgets(FAST, ["training.tokens=2048000"])
def test_independent_features_are_found(learned: Learned, budget: list[str]) -> None:
    """T1 (Chanin et al. 2024): four features without a hierarchy.

    With 4 latents for 4 features, one may die at once; those runs are left out, here and below.
    """
    runs = learned("model=world_independent", *TOY, *budget, seeds=range(5))[1]
    alive = [run for run in runs if run.metrics["live_fraction"] == 1]
    assert len(alive) >= 3  # 4 of these 5; 7 of 10
    assert min(map(mcc, alive)) > 0.99  # above .9999


@budgets(FAST, [])
def test_a_child_absorbs_its_parent(learned: Learned, budget: list[str]) -> None:
    """T1: child decoder ∝ u0 + u1, parent encoder ∝ u0 − u1; the parent does not fire with the
    child."""
    world, runs = learned("model=world_absorption", *TOY, *budget, seeds=range(5))
    alive = [run for run in runs if run.metrics["live_fraction"] == 1]
    assert len(alive) >= 3  # 4 of these 5; 9 of 10
    for run in alive:
        sae = load_sae(run.path)
        decoder, encoder = cosines(sae.W_dec, world), cosines(sae.W_enc, world)
        parent, child = best(decoder, 0), best(decoder, 1)
        assert decoder[child, :2].tolist() == pytest.approx([0.71, 0.71], abs=0.1)  # within .01
        assert decoder[parent, 0] > 0.99
        ratio = encoder[parent, 1] / encoder[parent, 0]
        assert ratio == pytest.approx(-1, abs=0.2)  # -1.06 to -.92
        assert recall_on(run, world, parent, 0, 1) < 0.05  # 0
        assert mcc(run) < 0.95  # .927


@budgets(["training.tokens=256000", "training.lr=1e-2"], ["training.tokens=1024000"])
def test_batch_topk_absorbs_too(learned: Learned, budget: list[str]) -> None:
    """T2: f1 fires on 60% of f0's tokens.

    k is slightly above the true L0 of 2.14: below it, any features mix (T6). Training starts at the
    true features, as latents may die from random starts.
    """
    options = ["training=world", "sae=batch_topk", "sae.num_latents=12", "sae.k=2.2"]
    options += ["training.start=truth", *budget]

    def mixed(*more: str) -> list[tuple[float, float]]:
        """Return f0's cosine with the child's decoder, and f1's with the parent's encoder."""
        world, runs = learned("model=world_absorption_topk", *options, *more)
        found = []
        for run in runs:
            decoder, encoder = (
                cosines(rows, world)
                for rows in (load_sae(run.path).W_dec, load_sae(run.path).W_enc)
            )
            parent, child = best(decoder, 0), best(decoder, 1)
            found.append((float(decoder[child, 0]), float(encoder[parent, 1])))
        return found

    for into, away in mixed():
        assert into == pytest.approx(0.71, abs=0.1)  # .707
        assert away < -0.5  # -.66 to -.64
    # If f1 fires as often but independently of f0, neither absorbs the other.
    flat = [0.4, 0.24, *[0.15] * 10]
    for into, away in mixed(f"model.firing={flat}".replace(" ", ""), "model.parents=null"):
        assert abs(into) < 0.05  # below .001
        assert abs(away) < 0.05


@budgets(["training.tokens=256000"], ["training.tokens=1536000"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("independent", 0.0), ("hierarchical", 0.24), ("positive", 0.2), ("negative", -0.2)],
)
def test_a_narrow_sae_hedges(
    learned: Learned, kind: str, expected: float, budget: list[str]
) -> None:
    """T3 (2505.11756): one latent starts at u0; ``expected`` is its decoder's cosine with u1.

    With the usual noise of 0.1 at the start, some seeds of the negative case reach another optimum,
    with a cosine of -.10.
    """
    world, runs = learned(
        f"model=world_hedging_{kind}", "training=world", "sae=relu", "sae.num_latents=1",
        "sae.l1_coefficient=0", "training.start=truth", "training.start_noise=0.03", *budget,
    )  # fmt: skip
    for run in runs:
        decoder = cosines(load_sae(run.path).W_dec, world)[0]
        assert decoder[0] > 0.9  # .97 or more
        # .00, .25, .24 and -.18, with differences below .002 between seeds
        assert decoder[1] == pytest.approx(expected, abs=0.1)


@budgets(
    ["training.tokens=128000", "training.batch_size=256", "training.lr=1e-2"],
    ["training.tokens=1536000"],
)
def test_a_balanced_matryoshka_absorbs_and_hedges_less(learned: Learned, budget: list[str]) -> None:
    """T4: a first prefix of one latent.

    If it is absorbed (inner multiplier 0), its encoder turns away from the children; if it hedges
    (1), its decoder turns towards them; at 0.25 it does less of either.
    """
    away, towards = {}, {}
    for multiplier in (0, 0.25, 1):
        world, runs = learned(
            "model=world_balance", "training=world", "sae=matryoshka", "sae.num_latents=4",
            "sae.k=0.4", "sae.prefixes=[0.25,1.0]", f"sae.multipliers=[{multiplier},1]",
            "sae.aux_alpha=0", "training.start=truth", *budget,
        )  # fmt: skip
        encoder = torch.stack([cosines(load_sae(run.path).W_enc, world)[0] for run in runs])
        decoder = torch.stack([cosines(load_sae(run.path).W_dec, world)[0] for run in runs])
        away[multiplier] = float(encoder[:, 1:].min(1).values.mean())
        towards[multiplier] = float(decoder[:, 1:].mean())
    # For 0, .25 and 1, away is -.62, .04 and .08, towards is .00, .05 and .10; seeds differ by .01
    # at most.
    assert away[0] < -0.2
    assert abs(towards[0]) < 0.03
    assert towards[1] > 0.07
    assert away[1] > 0
    assert away[0] < away[0.25] - 0.1
    assert towards[0.25] < towards[1] - 0.03


@budgets(
    ["training.tokens=128000", "training.batch_size=128", "training.start=truth"],
    ["training.tokens=1536000"],
)
def test_too_small_an_l0_mixes_features(learned: Learned, budget: list[str]) -> None:
    """T6 (2508.16560): five correlated features, two active at a time.

    With few steps, training starts at the true features: too small a k leaves them.
    """
    common = ["model=world_wrong_l0", "training=world", "sae=batch_topk", "sae.num_latents=5"]
    common += budget
    # With few steps: at least .991 for k=2, .94 to .96 for k=1.8.
    found = {k: [mcc(run) for run in learned(*common, f"sae.k={k}")[1]] for k in (2.0, 1.8)}
    assert sorted(found[2.0])[1] > 0.98  # the median: a seed may lose a latent
    assert max(found[1.8]) < 0.98
    assert sorted(found[1.8])[1] < sorted(found[2.0])[1] - 0.02


SMALL = ["sae.num_latents=128", "training.tokens=65536", "dataset.held_out_tokens=16384"]
LARGE = ["sae.num_latents=512", "training.tokens=256000"]
PENALISED = ("relu", "gated", "jumprelu")


@pytest.mark.parametrize(
    ("sae", "sizes"),
    [
        # Cells of one command share the passes of the language model.
        pytest.param(",".join(PENALISED), SMALL, id="small"),
        *(pytest.param(sae, LARGE, id=sae, marks=pytest.mark.audit) for sae in PENALISED),
    ],
)
def test_every_seed_of_a_calibrated_cell_reaches_the_target(
    tmp_path: Path, sae: str, sizes: list[str]
) -> None:
    """On the embedded model, all seeds have one weight and a held-out L0 within 5% of target."""
    line = CommandLine("train", [
        "-m", f"sae={sae}", "sae.target_l0=8", "seed=0,1,2", *sizes,
        f"runtime.outputs={tmp_path}", "runtime.progress=false",
    ])  # fmt: skip
    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    assert train_missing([job.resolved for job in jobs], runtime) == {}
    weights: dict[str, set[float]] = {}
    for run in [job.resolved.run(RunStore(runtime.outputs)) for job in jobs]:
        found = weights.setdefault(run.record["experiment"]["sae"]["type"], set())
        found.add(run.record["penalty_weight"])
        assert run.metrics["l0"] == pytest.approx(8, rel=0.05), run.id  # small: within 1.5%
    assert {name: len(found) for name, found in weights.items()} == dict.fromkeys(sae.split(","), 1)
