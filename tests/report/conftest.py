"""Fixtures: cells of dictionaries that share a known part."""

import dataclasses

import numpy as np
import pytest

from reseed.compare.activations.tables import weight_matches, with_activations
from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary

NUM_LATENTS, D_IN = 48, 32


def run(sae, seed, shared, trained=True):
    """Return a run whose first ``shared`` latents are in every seed; latent i fires i times."""
    rng = np.random.default_rng([len(sae), seed, trained])
    rows = rng.standard_normal((2, NUM_LATENTS, D_IN))
    rows[:, :shared] = np.random.default_rng(0).standard_normal((2, shared, D_IN))
    return Dictionary(
        id=f"{sae}-{seed}",
        seed=str(seed),
        encoder=rows[0],
        decoder=rows[1] if trained else rows[0],
        firing=np.arange(NUM_LATENTS),
        held_out_tokens=5000,
        dead=np.arange(NUM_LATENTS) < 2,
        metrics={"fvu": 0.2 + 0.01 * seed, "l0": 8.25, "dead_fraction": 2 / NUM_LATENTS},
    )


@pytest.fixture(scope="session")
def make_run():
    return run


@pytest.fixture(scope="session")
def make_cell():
    def make(sae="topk", n=3, shared=24, **knobs):
        seeds = range(n)
        cell = compare_cell(
            [run(sae, s, shared) for s in seeds],
            [run(sae, s, 0, trained=False) for s in seeds],
            ComparisonConfig(name="trial", grid={"seed": list(range(max(2, n)))}),
        )
        return {"model": "embedded", "layer": 2, "sae": sae} | knobs, cell

    return make


def with_spread(cell, by):
    """Return a cell whose shared fraction has an interval of ± ``by``; those of `run` share equally
    often in every pair and have none."""
    found = cell.estimates["shared_fraction"]
    other = dataclasses.replace(
        found, low=found.mean - by, high=found.mean + by, standard_error=by / 2, reason=""
    )
    return dataclasses.replace(cell, estimates=cell.estimates | {"shared_fraction": other})


@pytest.fixture(scope="session")
def spread():
    return with_spread


@pytest.fixture(scope="session")
def cells(make_cell):
    """Return a cell that shares half, one that shares nothing, and one of two seeds."""
    return [make_cell(), make_cell("relu", shared=0), make_cell("batch_topk", n=2, shared=12)]


@pytest.fixture(scope="session")
def budgets(make_cell):
    """Return two architectures at four budgets in two arms; initial weights are alike in the
    second arm."""
    found = []
    for sae in ("topk", "relu"):
        for tokens, shared in ((800, 4), (1600, 12), (3200, 20), (12800, 30)):
            knobs, cell = make_cell(sae, shared=shared)
            cell = with_spread(cell, 0.05)
            cell.runs["steps"] = tokens / 8
            alike = dataclasses.replace(
                cell, pairs=cell.pairs.assign(untrained_shared_fraction=1.0)
            )
            for arm, made in (("other init", cell), ("same init", alike)):
                found.append(({"arm": arm} | knobs | {"tokens": tokens}, made))
    return found


@pytest.fixture
def acting(make_cell):
    """Return a cell of three runs with known R: i/48 for latent i."""

    class Found:
        def __init__(self, side):
            size = len(side.partner)
            self.both_live = side.live & (side.partner >= 0)
            nothing = np.zeros(size)
            self.agreement = type("A", (), {"pearson": nothing, "jaccard": nothing + 0.25})()
            self.match_cosine = np.linspace(1, 0, size)
            values = np.arange(size) / size
            made = {"quality": values, "quality_best": values}
            pooled = {"pooled": lambda self, kept: (float(values[kept].sum()), float(kept.sum()))}
            one = type("S", (), made | pooled)()
            self.substitution = self.second_best = self.random = one
            self.insertion = np.where(np.arange(size) < 24, -1.0, 1.0)

    knobs, cell = make_cell()
    measured = type("M", (), {})()
    measured.tokens, measured.matched = 100, {}
    measured.latents = {pair: Found(side) for pair, side in weight_matches(cell).items()}
    measured.cka_codes = measured.cka_reconstructions = np.full((3, 3), 0.9)
    return knobs, with_activations(cell, measured)
