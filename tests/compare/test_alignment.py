"""Maps between the bases of two models: against dense programs, and their laws."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from scipy.stats import ortho_group

from reseed.compare.alignment import Alignment, TooFewTokensError, fit_maps, needed_tokens
from reseed.compare.cell import compare_cell
from reseed.compare.dictionary import DIFFERENT_MODELS, unit_rows
from reseed.compare.nulls import covariance_null
from reseed.compare.pair import WEIGHTS_NOTE, Pair
from reseed.compare.registry import columns
from reseed.study import alignment as study
from reseed.train.config import RuntimeConfig

D, TOKENS = 8, 6_000
FITTED = 4_800


def activations(seed: int) -> np.ndarray:
    """Draw correlated activations with a mean, float32."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((TOKENS, D)) * np.linspace(0.5, 3, D) @ rng.standard_normal((D, D))
    return (mixed + 4 * rng.standard_normal(D)).astype(np.float32)


def chunks(x: np.ndarray, size: int) -> list[torch.Tensor]:
    return list(torch.from_numpy(x).split(size))


def dense_r2(rotation: np.ndarray, fit: tuple, seen: tuple) -> float:
    """Compute R² from residuals of every token, without any sums of products."""
    found = []
    for turn, source, target in ((rotation, 0, 1), (rotation.T, 1, 0)):
        x, y = fit[source].astype(float), fit[target].astype(float)
        mapped = (x - x.mean(0)) @ turn
        scale = (mapped * (y - y.mean(0))).sum() / np.square(mapped).sum()
        u, v = seen[source].astype(float), seen[target].astype(float)
        error = v - (y.mean(0) + scale * (u - x.mean(0)) @ turn)
        found.append(1 - np.square(error).sum() / np.square(v - v.mean(0)).sum())
    return float(np.mean(found))


def dense(x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit with scipy on the kept tokens of the first four fifths, and measure on the others."""
    first = np.arange(TOKENS) < FITTED
    fit, seen = ((x[m], y[m]) for m in (kept & first, kept & ~first))
    a, b = (z.astype(float) - z.astype(float).mean(0) for z in fit)
    rotation = orthogonal_procrustes(a, b)[0]
    return rotation, dense_r2(rotation, fit, seen)


def test_a_map_is_that_of_a_dense_program_without_massive_tokens() -> None:
    x, noise = activations(0), activations(1)
    q = ortho_group.rvs(D, random_state=2)
    y = (2 * x @ q + noise).astype(np.float32)
    x[[10, 5_000]] *= 200  # massive in x: one to fit, one to measure
    y[[10, 77, 5_999]] *= 200
    kept = np.ones(TOKENS, bool)
    kept[[10, 77, 5_000, 5_999]] = False
    norms = [np.linalg.norm(z, axis=1) for z in (x, y)]
    assert ((norms[0] <= 10 * np.median(norms[0])) & (norms[1] <= 10 * np.median(norms[1]))
            == kept).all()  # fmt: skip
    (found,) = fit_maps([chunks(x, 700), chunks(y, 4_096)], [(0, 1)], TOKENS).values()
    rotation, r2 = dense(x, y, kept)
    assert found.rotation == pytest.approx(rotation, abs=1e-9)
    assert found.r2 == pytest.approx(r2, abs=1e-9)
    assert 0.3 < r2 < 0.99
    assert (found.tokens, found.held_out, found.massive) == (FITTED - 2, 1_198, 4)
    assert np.isnan(found.r2_random)


def test_a_rotated_and_shifted_copy_is_recovered() -> None:
    x = activations(3)
    q = ortho_group.rvs(D, random_state=4)
    y = (5 * (x.astype(float) @ q) + 100).astype(np.float32)
    (found,) = fit_maps([chunks(x, 999), chunks(y, 999)], [(0, 1)], TOKENS).values()
    assert found.rotation == pytest.approx(q, abs=1e-5)
    assert found.r2 == pytest.approx(1, abs=1e-6)
    assert abs(found.r2_shuffled) < 0.02
    assert found.shuffled @ found.shuffled.T == pytest.approx(np.eye(D))
    assert np.abs(found.shuffled - q).max() > 0.1
    back = found.reversed()
    (turned,) = fit_maps([chunks(y, 999), chunks(x, 999)], [(0, 1)], TOKENS).values()
    assert back.rotation == pytest.approx(turned.rotation, abs=1e-9)
    assert turned.r2 == pytest.approx(found.r2, abs=1e-9)


def test_unrelated_activations_have_no_map() -> None:
    """A rotation fitted by chance explains at most about D/tokens of independent activations."""
    streams = [chunks(activations(seed), 1_000) for seed in (5, 6)]
    (found,) = fit_maps(streams, [(0, 1)], TOKENS).values()
    assert abs(found.r2) < 0.02
    assert abs(found.r2_shuffled) < 0.02


def test_the_null_of_random_weights_is_the_mean_of_both_replacements() -> None:
    x = activations(7)
    y, x_random, y_random = (x @ ortho_group.rvs(D, random_state=s) + activations(s)
                             for s in (8, 9, 10))  # fmt: skip
    drawn = {1: chunks(y_random, 800), 0: chunks(x_random, 900)}
    found = fit_maps([chunks(x, 700), chunks(y, 600)], [(0, 1)], TOKENS, untrained=drawn)[0, 1]
    kept = np.ones(TOKENS, bool)
    expected = (dense(x, y_random, kept)[1] + dense(x_random, y, kept)[1]) / 2
    assert found.massive == 0
    assert found.r2_random == pytest.approx(expected, abs=1e-9)
    assert found.r2 == pytest.approx(dense(x, y, kept)[1], abs=1e-9)
    one = fit_maps([chunks(x, 700), chunks(y, 600)], [(0, 1)], TOKENS, untrained={
        0: chunks(x_random, 900)})[0, 1]  # fmt: skip
    assert np.isnan(one.r2_random), "the other model has random weights already"


def test_a_map_takes_its_width_and_its_shuffle_from_its_own_streams() -> None:
    """Neither a stream of another width nor the fits of the null change it."""
    x, y, z = (activations(seed) for seed in (11, 12, 13))
    wide = np.concatenate([z, z], axis=1)
    alone = fit_maps([chunks(x, 700), chunks(y, 700)], [(0, 1)], TOKENS)[0, 1]
    streams = [chunks(each, 700) for each in (wide, x, y)]
    drawn = {1: chunks(z, 700), 2: chunks(z, 700)}
    found = fit_maps(streams, [(1, 2)], TOKENS, untrained=drawn)[1, 2]
    assert found.rotation == pytest.approx(alone.rotation, abs=1e-12)
    assert found.shuffled == pytest.approx(alone.shuffled, abs=1e-12)


def test_too_few_tokens_are_refused() -> None:
    assert needed_tokens(8) == 2 * 200
    few = activations(0)[:180]
    told = (
        "a map of 8 dimensions needs at least 160 tokens to fit and others to measure; without 0 "
        "massive ones there are 144 and 36: raise dataset.held_out_tokens"
    )
    with pytest.raises(TooFewTokensError, match=told):
        fit_maps([chunks(few, 50), chunks(few, 50)], [(0, 1)], 180)
    with pytest.raises(ValueError, match="must hold the same tokens; got batches of 180, 179"):
        fit_maps([chunks(few, 50), chunks(few[:-1], 50)], [(0, 1)], 180)


@pytest.fixture
def turned(partly_shared):
    """Three runs, of which the last two are rotated together; and the map of the first."""
    runs = partly_shared(3, 30, d_in=16)
    q, other = ortho_group.rvs(16, size=2, random_state=1)
    moved = [
        dataclasses.replace(
            run,
            encoder=run.encoder @ q,
            decoder=run.decoder @ q,
            covariance=q.T @ run.covariance @ q,
        )
        for run in runs[1:]
    ]
    found = Alignment(q, other, 0.5, -0.25, 0.125, 400, 100, 3)
    return runs, [runs[0], *moved], {(0, 1): found, (0, 2): found}


def test_a_map_gives_a_rotated_pair_the_measures_of_the_pair_itself(turned, settings) -> None:
    runs, moved, maps = turned
    settings = dataclasses.replace(settings, grid={"seed": ["0", "1", "2"]}, align="procrustes")
    expected = compare_cell(runs, runs, settings)
    found = compare_cell(moved, moved, settings, alignments=maps)
    assert WEIGHTS_NOTE not in found.pairs
    of_map = columns("pair", "map")
    assert set(found.pairs) - set(expected.pairs) == set(of_map)
    for name in expected.pairs:
        if name in ("a", "b", "seed_a", "seed_b"):
            continue
        assert found.pairs[name].to_numpy() == pytest.approx(
            expected.pairs[name].to_numpy(),
            abs=0.01 if "covariance" in name else 1e-4,  # the null is drawn from both covariances
            nan_ok=True,
        ), name
    assert found.pairs["shared_fraction"].min() >= 30 / 40
    assert found.pairs["untrained_shared_fraction"].equals(
        expected.pairs["untrained_shared_fraction"]
    )
    assert found.pairs["map_shuffled_shared_fraction"].tolist()[:2] == [0, 0]
    assert found.pairs["map_r2"].tolist()[:2] == [0.5, 0.5]
    assert found.pairs.loc[2, list(of_map)].isna().all(), "both have one basis"
    assert np.isclose(found.p, expected.p).all()
    lost = compare_cell(moved, moved, settings)
    assert lost.pairs["shared_fraction"].tolist()[:2] == [0, 0]


def test_a_map_without_enough_tokens_costs_only_the_pairs_of_two_models(
    partly_shared, settings, monkeypatch, capsys
) -> None:
    """Two fifths of the tokens are massive in one model, and two others in the other."""
    runs, few = partly_shared(3, 30), activations(0)[: needed_tokens(D)]
    place = np.arange(len(few))[:, None] % 5
    x, y = (np.where((place // 2) == k, 1_000 * few, few) for k in (0, 1))
    fit = lambda *_: fit_maps([chunks(x, 50), chunks(y, 50)], [(0, 1)], len(few))  # noqa: E731
    monkeypatch.setattr(study, "_fit", fit)
    records = [SimpleNamespace(record={"identity": {"fingerprints": {"model": m}}}) for m in "aab"]
    settings = dataclasses.replace(settings, align="procrustes")
    made, maps = study.aligned(records, runs, settings, RuntimeConfig())  # type: ignore[arg-type]
    found = compare_cell(made, [], settings, alignments=maps)
    (reason,) = set(found.pairs[WEIGHTS_NOTE]) - {""}
    assert reason.startswith(f"{DIFFERENT_MODELS}, and a map of 8 dimensions needs at least 160 ")
    assert found.pairs["shared_fraction"].isna().tolist() == [False, True, True]
    assert "weights of different models are not compared: a map" in capsys.readouterr().out


def test_the_covariances_of_a_mapped_pair_are_not_averaged(partly_shared) -> None:
    """Activations of A are 1,000 times as long, and vary along other directions than B's."""
    a, b = partly_shared(2, 30, d_in=16)
    low, high = (np.diag([4.0] * 4 + [0.01] * 12), np.diag([0.01] * 12 + [1.0] * 4))
    q, other = ortho_group.rvs(16, size=2, random_state=3)
    turn = {"encoder": a.encoder @ q.T, "decoder": a.decoder @ q.T}
    a = dataclasses.replace(a, **turn, covariance=1e6 * (q @ low @ q.T))
    b = dataclasses.replace(b, covariance=high)
    pair = Pair(a, b, alignment=Alignment(q, other, 0.5, 0, 0, 400, 100, 0))
    assert pair.covariances[0] == pytest.approx(1e6 * low, rel=1e-6, abs=1e-4)
    both = low / np.trace(low) + high / np.trace(high)
    half = np.sqrt(both)
    rows = [x.encoder.astype(float) @ half for x in pair.rows]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
    cosines = unit[0] @ unit[1].T
    matched = cosines[linear_sum_assignment(-cosines)].mean()
    assert pair.value("cosine_correlation") == pytest.approx(matched, abs=1e-5)
    rng = np.random.default_rng(0)
    best = []
    for _ in range(30):
        u = rng.standard_normal((40, 16)) @ np.sqrt(low)
        v = rng.standard_normal((40, 16)) @ np.sqrt(high)
        drawn = unit_rows(u) @ unit_rows(v).T
        best.append(drawn[linear_sum_assignment(-drawn)].mean())
    assert pair.value("null_covariance_cosine") == pytest.approx(np.mean(best), abs=0.01)
    alone = covariance_null(40, 40, low).cosine
    assert pair.value("null_covariance_cosine") < 0.5 * alone


def test_runs_of_two_bases_are_not_compared_by_their_weights(partly_shared, settings) -> None:
    runs = [dataclasses.replace(run, basis=basis)
            for run, basis in zip(partly_shared(3, 30), "aab", strict=True)]  # fmt: skip
    found = compare_cell(runs, runs, settings)
    assert found.pairs[WEIGHTS_NOTE].tolist() == ["", DIFFERENT_MODELS, DIFFERENT_MODELS]
    assert found.pairs["shared_fraction"].isna().tolist() == [False, True, True]
    assert found.estimates["cycle_shared"].reason == DIFFERENT_MODELS
