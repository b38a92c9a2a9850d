"""Tests of SAEs of different activations on the same tokens, by dense arrays and scipy."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from reseed.compare.activations import agreement
from reseed.compare.activations.agreement import centred_gram, hsic
from reseed.compare.activations.measures import (
    WeightMatches,
    measure_same_activations,
    measure_same_tokens,
)
from reseed.compare.activations.tables import PairOnTokens, activation_measures
from reseed.compare.registry import columns, declared, evaluate
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

TOKENS, D, WIDE = 400, 8, 12
HALF = TOKENS // 2
MATCHED = [f"agreement_{name}_matched" for name in ("pearson", "jaccard", "fraction")]


def of_latents(measured, pair):
    """Return column → values of the latents of the first SAE of an ordered pair."""
    return evaluate(declared("latent", "activations"), PairOnTokens(measured, {}, *pair))


def built(config, seed, d_in=D):
    return config.build(d_in, torch.Generator().manual_seed(seed)).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(7))


def lifted(sae, turn):
    """Return the SAE that encodes x·turn as ``sae`` encodes x, for orthonormal rows ``turn``."""
    found = built(sae.config, 99, turn.shape[1])
    for name in ("W_enc", "W_dec", "b_dec"):
        getattr(found, name).copy_(getattr(sae, name) @ turn)
    found.b_enc.copy_(sae.b_enc)
    return found


@pytest.fixture
def turn():
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.linalg.qr(rng.standard_normal((WIDE, D)))[0].T).float()


def sides_between(saes, live=None):
    """Match latent i with latent i between SAEs of equal width; leave others without partners."""
    found = {}
    for s, a in enumerate(saes):
        for t, b in enumerate(saes):
            if s != t:
                same = a.d_in == b.d_in
                partner = np.arange(a.num_latents) if same else np.full(a.num_latents, -1)
                flags = np.full(a.num_latents, same)
                own = np.ones(a.num_latents, bool) if live is None else live[s]
                found[s, t] = WeightMatches(partner, flags, own, np.full(a.num_latents, 50))
    return found


def test_the_same_sae_in_another_space_agrees_completely(x, turn):
    sae = built(TopKConfig(num_latents=20, k=4), 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    other = lifted(sae, turn)
    for name in ("W_enc", "W_dec", "b_enc"):
        getattr(other, name).copy_(getattr(other, name)[order])
    two = [sae, other]
    sides = sides_between(two)
    found = measure_same_tokens(two, sides, [[x], [x @ turn]], [0, 1], TOKENS)
    row = activation_measures(PairOnTokens(found, sides, 0, 1))
    assert row["cka_codes"] == pytest.approx(1, abs=1e-5)
    assert row["cka_reconstructions"] == pytest.approx(1, abs=1e-5)
    assert [row[name] for name in MATCHED] == pytest.approx([1, 1, 1], abs=1e-4)
    known = {"cka_codes", "cka_reconstructions", *MATCHED}
    unknown = columns("pair", "activations").keys() - known
    assert np.isnan([row[name] for name in unknown]).all()
    for pair in found.latents:
        assert all(np.isnan(values).all() for values in of_latents(found, pair).values())


def test_matched_agreement_and_cka_equal_those_of_dense_activations(x, turn):
    noise = torch.randn(TOKENS, WIDE, generator=torch.Generator().manual_seed(8))
    y = x @ turn + 0.3 * noise
    a, b = built(ReLUConfig(num_latents=16), 1), built(TopKConfig(num_latents=20, k=5), 2, WIDE)
    live = [np.arange(16) % 5 > 0, np.arange(20) % 4 > 0]
    sides = sides_between([a, b], live)
    found = measure_same_tokens(
        [a, b], sides, [x.split(37), y.split(150)], [0, 1], TOKENS, threshold=0.2
    )
    f, g = a.encode(x).double().numpy(), b.encode(y).double().numpy()
    rows = [np.flatnonzero(flags) for flags in live]
    varies = [r[h[:HALF, r].std(0) > 0] for h, r in zip((f, g), rows, strict=True)]
    table = np.corrcoef(f[:HALF, varies[0]].T, g[:HALF, varies[1]].T)
    table = table[: len(varies[0]), len(varies[0]) :]
    i, j = linear_sum_assignment(-table)
    pearson, jaccard = [], []
    for p, q in zip(varies[0][i], varies[1][j], strict=True):
        u, v = f[HALF:, p], g[HALF:, q]
        pearson.append(np.corrcoef(u, v)[0, 1])
        jaccard.append(((u != 0) & (v != 0)).sum() / ((u != 0) | (v != 0)).sum())
    near = sum(r >= 0.2 for r in pearson)
    assert 0 < near < len(pearson)
    matched = found.matched[0, 1]
    assert matched.pearson == pytest.approx(np.nanmean(pearson), abs=1e-5)
    assert matched.jaccard == pytest.approx(np.nanmean(jaccard), abs=1e-5)
    assert matched.fraction == pytest.approx(2 * near / (live[0].sum() + live[1].sum()))
    size = TOKENS // 4
    sums = np.zeros((2, 2))
    for start in range(0, TOKENS, size):
        part = slice(start, start + size)
        grams = [centred_gram(torch.from_numpy(h[part])) for h in (f, g)]
        sums += hsic(grams).numpy()
    assert found.cka_codes[0, 1] == pytest.approx(sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1]))


def test_saes_of_one_space_are_measured_as_without_others(x, turn):
    """A third SAE of another space changes none of their numbers."""
    a, c = (built(ReLUConfig(num_latents=16), s) for s in (1, 2))
    two = [a, c]
    alone = measure_same_activations(two, sides_between(two), [x])
    three = [a, lifted(a, turn), c]
    found = measure_same_tokens(three, sides_between(three), [[x], [x @ turn]], [0, 1, 0], TOKENS)
    for pair, own in (((0, 2), (0, 1)), ((2, 0), (1, 0))):
        expected = of_latents(alone, own)
        for name, values in of_latents(found, pair).items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert set(found.matched) == {(0, 1), (0, 2), (1, 2)}


def test_unrelated_saes_do_not_agree(x):
    """A matching picks the best of many; measured on its own tokens it would look good."""
    other = torch.randn(TOKENS, WIDE, generator=torch.Generator().manual_seed(9))
    two = [
        built(TopKConfig(num_latents=64, k=8), 0),
        built(TopKConfig(num_latents=64, k=8), 1, WIDE),
    ]
    found = measure_same_tokens(two, sides_between(two), [[x], [other]], [0, 1], TOKENS)
    # The mean of 64 correlations over 200 tokens has a standard error of about .01.
    assert abs(found.matched[0, 1].pearson) < 0.04
    assert found.matched[0, 1].fraction == 0


def test_a_wide_sae_is_matched_on_fewer_tokens(monkeypatch):
    live = [np.ones(100, bool), np.ones(30, bool)]
    assert agreement.ActivationMatcher(live, 100_000, 0.7).first == 4096
    assert agreement.ActivationMatcher(live, 1000, 0.7).first == 500
    monkeypatch.setattr(agreement, "MOST_BYTES", 4 * 100 * 300)
    assert agreement.ActivationMatcher(live, 100_000, 0.7).first == 300


def test_other_measures_survive_latents_too_many_to_match(x, turn, monkeypatch):
    def refuse(*_):
        raise MemoryError("too many")

    monkeypatch.setattr(agreement, "match", refuse)
    sae = built(TopKConfig(num_latents=20, k=4), 0)
    two = [sae, lifted(sae, turn)]
    found = measure_same_tokens(two, sides_between(two), [[x], [x @ turn]], [0, 1], TOKENS)
    assert np.isnan(found.matched[0, 1]).all()
    assert found.cka_codes[0, 1] == pytest.approx(1, abs=1e-5)


def test_streams_of_different_length_are_refused(x, turn):
    sae = built(TopKConfig(num_latents=20, k=4), 0)
    two = [sae, copy.deepcopy(lifted(sae, turn))]
    with pytest.raises(ValueError, match="must hold the same tokens; got batches of 100, 90"):
        measure_same_tokens(two, sides_between(two), [[x], [x[:390] @ turn]], [0, 1], TOKENS)
