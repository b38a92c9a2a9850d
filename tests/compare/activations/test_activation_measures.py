"""Tests of the measures on activations: one pass, against SAEs run again with a latent changed."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from reseed.compare.activations.measures import (
    WeightMatches,
    measure_same_activations,
    measure_same_tokens,
)
from reseed.compare.activations.tables import (
    NOTE,
    PairOnTokens,
    activation_measures,
    lacks_activations,
    substitution_top,
    weight_matches,
    with_activations,
)
from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.registry import columns, declared, evaluate
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

TOKENS, D = 300, 8
OF_PAIRS = [name for name in columns("pair", "activations") if not name.endswith("_matched")]
ESTIMATES = [name for name in OF_PAIRS if not name.endswith(("_a", "_b"))]


def of_latents(measured, pair):
    """Return column → values of the latents of the first SAE of an ordered pair."""
    return evaluate(declared("latent", "activations"), PairOnTokens(measured, {}, *pair))


def built(config, seed):
    """Build a random SAE with decoder rows short enough to reconstruct something, but so long that
    adding a latent does not always help."""
    sae = config.build(D, torch.Generator().manual_seed(seed)).requires_grad_(False)
    sae.W_dec.mul_(0.6)
    return sae


@pytest.fixture
def x():
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def saes():
    return [
        built(TopKConfig(num_latents=20, k=4), 0),
        built(ReLUConfig(num_latents=16), 1),
        built(JumpReLUConfig(num_latents=20), 2),
    ]


def permuted(sae, order):
    found = copy.deepcopy(sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        getattr(found, name).copy_(getattr(sae, name)[order])
    return found


def cell_of(dictionary, saes, x, settings):
    """Compare the SAEs by their weights."""
    found = []
    for i, sae in enumerate(saes):
        firing = (sae.encode(x) != 0).sum(0).numpy()
        rows = (sae.W_enc.numpy(), sae.W_dec.numpy())
        found.append(dictionary(*rows, seed=str(i), firing=firing, tokens=len(x)))
    return compare_cell(found, [], settings)


@pytest.fixture
def measured(saes, x, dictionary, settings):
    """Return a cell in which some latents are live and some are not, with its measures."""
    cell = cell_of(dictionary, saes, x, replace(settings, live_at_least=60))
    return cell, measure_same_activations(saes, weight_matches(cell), [x])


def test_closed_forms_equal_running_the_sae_with_a_latent_changed(saes, x, measured):
    cell, found = measured
    sides = weight_matches(cell)
    exact = x.double()
    made = [(s.encode(x).double(), s.W_dec.double(), s.b_dec.double()) for s in saes]
    for (s, t), latents in found.latents.items():
        (f, w, bias), (g, v, other_bias) = made[s], made[t]
        before = (exact - f @ w - bias).square().sum()
        error = (exact - g @ v - other_bias).square().sum()
        for i, j in enumerate(sides[s, t].partner):
            # Put into the other's reconstruction.
            after = (exact - g @ v - other_bias - torch.outer(f[:, i], w[i])).square().sum()
            assert latents.insertion[i] == pytest.approx(float((after - error) / error), abs=1e-6)
            if j < 0:
                assert np.isnan(latents.substitution.quality[i])
                continue
            without = f.clone()
            without[:, i] = 0
            out = (exact - without @ w - bias).square().sum() - before
            by = (exact - without @ w - bias - torch.outer(g[:, j], v[j])).square().sum() - before
            substitution = latents.substitution
            assert substitution.damage[i] == pytest.approx(float(out), rel=1e-4, abs=1e-4)
            assert substitution.repaired[i] == pytest.approx(float(out - by), rel=1e-4, abs=1e-3)
            both = ((f[:, i] != 0) & (g[:, j] != 0)).sum()
            either = ((f[:, i] != 0) | (g[:, j] != 0)).sum()
            assert either == 0 or latents.agreement.jaccard[i] == pytest.approx(
                float(both / either)
            )
            if min(f[:, i].std(), g[:, j].std()) > 0:
                pearson = np.corrcoef(f[:, i], g[:, j])[0, 1]
                assert latents.agreement.pearson[i] == pytest.approx(pearson, abs=1e-6)
            rows = [
                torch.cosine_similarity(getattr(saes[s], n)[i], getattr(saes[t], n)[j], dim=0)
                for n in ("W_enc", "W_dec")
            ]
            assert latents.match_cosine[i] == pytest.approx(float(min(rows)), abs=1e-5)


@pytest.mark.parametrize("cuts", [[100] * 3, [1, 298, 1], [17] * 17 + [11]])
def test_the_result_does_not_depend_on_how_chunks_are_cut(saes, x, measured, cuts):
    cell, whole = measured
    again = measure_same_activations(saes, weight_matches(cell), x.split(cuts))
    assert again.tokens == TOKENS
    assert np.array_equal(again.cka_codes, whole.cka_codes)
    for pair in whole.latents:
        values = of_latents(again, pair)
        for name, value in of_latents(whole, pair).items():
            assert np.array_equal(values[name], value, True), name


def test_the_batch_size_changes_only_cka(saes, x, measured, monkeypatch):
    cell, whole = measured
    monkeypatch.setattr("reseed.compare.activations.measures.BATCH", 64)
    again = measure_same_activations(saes, weight_matches(cell), [x])
    for pair in whole.latents:
        values = of_latents(again, pair)
        for name, value in of_latents(whole, pair).items():
            np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    assert not np.array_equal(again.cka_codes, whole.cka_codes)


def test_all_measures_of_a_permuted_copy_are_one(saes, x, dictionary, settings):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    two = [saes[0], permuted(saes[0], order)]
    cell = cell_of(dictionary, two, x, settings)
    measured = measure_same_activations(two, weight_matches(cell), [x])
    row = with_activations(cell, measured).pairs.iloc[0]
    for name in (
        "agreement_pearson_shared", "agreement_jaccard_shared", "cka_codes",
        "cka_reconstructions", "substitution", "substitution_shared",
        "substitution_pooled_shared", "substitution_best_scale", "substitution_area",
    ):  # fmt: skip
        assert row[name] == pytest.approx(1, abs=1e-5), name
    assert np.isnan(row["agreement_pearson_orphan"]), "there are none"
    assert row["substitution_second_best"] < 0.9
    assert row["substitution_random"] < 0.9
    known = measured.latents[0, 1].substitution.quality
    assert known[~np.isnan(known)] == pytest.approx(1, abs=1e-4)


def test_pair_columns_are_means_over_live_matches_of_both_sides(measured):
    cell, found = measured
    sides = weight_matches(cell)
    live = {s: cell.latents.to_pandas().query(f"run == 'run-{s}'")["live"].to_numpy()
            for s in range(3)}  # fmt: skip
    row = activation_measures(PairOnTokens(found, sides, 0, 2))
    values = []
    for s, t in ((0, 2), (2, 0)):
        for i, j in enumerate(sides[s, t].partner):
            quality = found.latents[s, t].substitution.quality[i]
            if j >= 0 and live[s][i] and live[t][j] and not np.isnan(quality):
                values.append((min(max(quality, 0), 1), sides[s, t].shared[i]))
    assert 5 < len(values) < 30
    assert not all(live[0])
    assert row["substitution"] == pytest.approx(np.mean([v for v, _ in values]))
    orphans = [v for v, shared in values if not shared]
    assert row["substitution_orphan"] == pytest.approx(np.mean(orphans))
    two = ((0, 2), (2, 0))
    novel = [np.mean(found.latents[s, t].insertion[live[s]] < 0) for s, t in two]
    assert (row["novel_fraction_a"], row["novel_fraction_b"]) == pytest.approx(tuple(novel))
    assert row["novel_fraction"] == pytest.approx(np.mean(novel))
    assert 0 < row["novel_fraction"] < 1
    assert np.isnan(row["substitution_top_100"]), "there are not that many"


def test_the_coverage_curve_ranks_live_matches_by_their_smaller_cosine(measured):
    cell, found = measured
    sides = weight_matches(cell)
    ranked = []
    for s, t in ((0, 2), (2, 0)):
        latents, partner = found.latents[s, t], sides[s, t].partner
        there = sides[s, t].live & (partner >= 0) & sides[t, s].live[partner]
        rows = [
            (latents.match_cosine[i], min(max(quality, 0), 1))
            for i, quality in enumerate(latents.substitution.quality)
            if there[i] and not np.isnan(quality)
        ]
        ranked.append([quality for _, quality in sorted(rows, reverse=True)])
    areas = [np.mean([np.mean(q[:r]) for r in range(1, len(q) + 1)]) for q in ranked]
    longest = max(map(len, ranked))
    pair = PairOnTokens(found, sides, 0, 2)
    row = activation_measures(pair)
    tops = {top: substitution_top(pair, top) for top in (3, longest, longest + 1)}
    assert row["substitution_area"] == pytest.approx(np.mean(areas))
    assert tops[3] == pytest.approx(np.mean([q[:3] for q in ranked]))
    whole = np.mean([np.mean(q) for q in ranked if len(q) == longest])
    assert tops[longest] == pytest.approx(whole)
    assert np.isnan(tops[longest + 1])


def test_a_pair_is_the_same_from_either_side(measured):
    cell, found = measured
    sides = weight_matches(cell)
    one, other = (activation_measures(PairOnTokens(found, sides, *p)) for p in ((0, 1), (1, 0)))
    assert {n: one[n] for n in ESTIMATES} == pytest.approx(
        {n: other[n] for n in ESTIMATES}, nan_ok=True
    )
    assert one["novel_fraction_a"] == other["novel_fraction_b"]


def test_list_columns_are_in_the_order_of_the_other_runs(measured):
    cell, found = measured
    cell = with_activations(cell, found)
    long = cell.latents.to_pandas().explode(["others", *columns("latent", "activations")])
    for s, t in found.latents:
        rows = long[(long["run"] == f"run-{s}") & (long["others"] == f"run-{t}")]
        for name, value in of_latents(found, (s, t)).items():
            expected = value.astype(np.float32)
            assert np.array_equal(rows[name].to_numpy(dtype=np.float32), expected, True), name


def test_a_cell_with_activations_is_read_as_it_was_written(measured, tmp_path):
    cell = with_activations(*measured)
    cell.write(tmp_path)
    again = CellResult.read(tmp_path)
    pd.testing.assert_frame_equal(again.pairs, cell.pairs)
    assert again.latents.equals(cell.latents)
    assert {n: again.estimates[n].mean for n in ESTIMATES} == pytest.approx(
        {n: cell.estimates[n].mean for n in ESTIMATES}, nan_ok=True
    )
    assert not lacks_activations(again)


def test_missing_measures_are_noted_and_can_be_added_later(measured):
    cell, found = measured
    assert lacks_activations(cell)
    without = with_activations(cell, None, "the model is gone")
    assert lacks_activations(without)
    assert without.pairs[OF_PAIRS].isna().to_numpy().all()
    assert without.pairs[NOTE].tolist() == ["the model is gone"] * 3
    assert without.estimates["cka_codes"].reason == "undefined in at least one pair"
    later, at_once = with_activations(without, found), with_activations(cell, found)
    pd.testing.assert_frame_equal(later.pairs, at_once.pairs)
    assert later.latents.schema == without.latents.schema, "tables of cells are concatenated"
    assert later.latents.equals(at_once.latents)
    assert repr(later.estimates) == repr(at_once.estimates), "repr, as NaN != NaN"
    # The measures on weights are unchanged.
    assert later.pairs.filter(cell.pairs.columns).equals(cell.pairs)
    assert later.latents.select(cell.latents.column_names).equals(cell.latents)


def test_latents_that_are_not_live_do_not_count(saes, x, dictionary, settings):
    """If half of a copy's latents never fire, the other half still agrees completely."""
    half = copy.deepcopy(saes[1])
    half.b_enc[:8] = -100
    cell = cell_of(dictionary, [saes[1], half], x, settings)
    found = measure_same_activations([saes[1], half], weight_matches(cell), [x])
    row = with_activations(cell, found).pairs.iloc[0]
    assert row["agreement_pearson_shared"] == pytest.approx(1)
    quality = found.latents[0, 1].substitution.quality[:8]
    assert (quality[~np.isnan(quality)] == 0).all(), "it repairs nothing"
    assert np.isnan(found.latents[1, 0].substitution.quality[:8]).all(), "there is no damage"


@pytest.fixture
def alike_by_rows():
    """Two SAEs of four latents, and four tokens. Latents 0 to 2 have matches with both cosines at
    least .8: 0 fires on token 0 in A but on token 1 in B, 1 on tokens 0 and 2 in both, and 2 on
    none. Latent 3 has a match of cosine 0 that fires on the same token, 3."""
    rows_a, rows_b = torch.zeros(4, 6), torch.zeros(4, 6)
    rows_a[0, 0], rows_b[0, 0], rows_b[0, 1] = 1, 0.8, 0.6
    rows_a[1, 2] = rows_b[1, 2] = rows_a[2, 3] = rows_b[2, 3] = rows_a[3, 4] = rows_b[3, 5] = 1
    tokens = torch.zeros(4, 6)
    tokens[0, :3] = torch.tensor([1.0, -2.0, 1.0])
    tokens[1, :2] = torch.tensor([-1.0, 3.0])
    tokens[2, 2], tokens[3, 4], tokens[3, 5] = 1, 1, 1
    saes = []
    for rows in (rows_a, rows_b):
        sae = ReLUConfig(num_latents=4).build(6, torch.Generator()).requires_grad_(False)
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
        saes.append(sae)
    return saes, tokens


@pytest.mark.parametrize(
    ("live_at_least", "shared", "alike"),
    [
        (1, {"": 3 / 4, "_live": 2 / 3}, {"": 1 / 4, "_live": 1 / 3}),
        (2, {"": 3 / 4, "_live": 1}, {"": 1 / 4, "_live": 1}),
    ],
)
def test_a_latent_shared_by_weights_that_fires_elsewhere_is_not_alike(
    alike_by_rows, dictionary, settings, live_at_least, shared, alike
):
    """r of latent 0 is (0 − 1/16)/(3/16) = −1/3, that of latent 1 is 1, latent 2 has none."""
    saes, x = alike_by_rows
    cell = cell_of(dictionary, saes, x, replace(settings, live_at_least=live_at_least))
    cell = with_activations(cell, measure_same_activations(saes, weight_matches(cell), [x]))
    (row,) = cell.pairs.to_dict("records")
    assert {k: row[f"shared_fraction{k}"] for k in shared} == pytest.approx(shared)
    assert {k: row[f"shared_and_alike{k}"] for k in alike} == pytest.approx(alike)
    assert cell.estimates["shared_and_alike"].mean == pytest.approx(1 / 4)
    found = np.array(cell.latents["pearson"].to_pylist()[:4], dtype=float)[:, 0]
    np.testing.assert_allclose(found, [-1 / 3, 1, np.nan, 1], atol=1e-6)


def test_aligned_saes_of_two_models_are_as_alike_as_in_one_space(saes, x, dictionary, settings):
    """The second model's activations are those of the first, turned, and so are its SAE's rows. The
    matches are made in the first basis. A third SAE reads the first model."""
    first = saes[1]
    second = permuted(first, torch.randperm(16, generator=torch.Generator().manual_seed(3)))
    second.b_enc[:5] = -100  # shared by weights, but never fires
    second.b_enc[5:9] = -2
    three = [first, second, saes[0]]
    cell = cell_of(dictionary, three, x, replace(settings, live_at_least=60))
    alone = with_activations(cell, measure_same_activations(three, weight_matches(cell), [x]))
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(4)))[0]
    turned = copy.deepcopy(second)
    for name in ("W_enc", "W_dec", "b_dec"):
        getattr(turned, name).copy_(getattr(second, name) @ basis)
    three[1] = turned
    streams = [[x], [x @ basis]]
    found = measure_same_tokens(three, weight_matches(cell), streams, [0, 1, 0], TOKENS)
    across = with_activations(cell, found)
    for name in ("pearson", "jaccard"):
        ours, theirs = (
            np.array([row.as_py() for row in c.latents[name]], dtype=float) for c in (across, alone)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)
    names = [n for n in OF_PAIRS if n.startswith(("shared_and_alike", "agreement_"))]
    ours, theirs = across.pairs[names].to_numpy(), alone.pairs[names].to_numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    of_two = across.pairs.iloc[0]
    assert of_two["shared_fraction"] == 1
    assert 0 < of_two["shared_and_alike"] <= 11 / 16
    # Replacing a latent needs one space.
    spaces = [n for n in OF_PAIRS if n.startswith(("substitution", "novel"))]
    assert across.pairs[spaces].isna().to_numpy().all(1).tolist() == [True, False, True]


def test_without_activations_nothing_is_known_to_be_alike(alike_by_rows, dictionary, settings):
    saes, x = alike_by_rows
    cell = with_activations(cell_of(dictionary, saes, x, settings), None, "the model is gone")
    assert cell.pairs[["shared_and_alike", "shared_and_alike_live"]].isna().to_numpy().all()
    assert np.isnan(cell.estimates["shared_and_alike"].mean)
    assert cell.pairs["shared_fraction"].tolist() == [3 / 4]


def test_measuring_without_tokens_is_refused(saes):
    nothing = WeightMatches(*(np.full(20, value) for value in (-1, False, False, 0)))
    with pytest.raises(ValueError, match="no activations were given: there is nothing to measure"):
        measure_same_activations([saes[0], saes[2]], {(0, 1): nothing, (1, 0): nothing}, [])
