"""Tests of named latents: reading their list, and the columns of their replication."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import unit_rows
from reseed.compare.registry import NOT_ASKED, NOTE, TOKENS
from reseed.compare.replication import (
    Named,
    firing_decile,
    parse_index,
    read_named,
    replication_table,
)
from reseed.compare.sharing_profile import JEFFREYS, posterior
from reseed.errors import ReseedError
from reseed.report.replication import check_table

N, D = 40, 64


@pytest.fixture
def runs(partly_shared):
    """Return three runs that have 12 latents in common, in different orders."""
    return partly_shared(3, 12)


@pytest.fixture
def result(runs):
    return compare_cell(runs, [], ComparisonConfig(name="t", grid={"seed": [0, 1, 2]}))


def looked_up(result, runs, *latents):
    by_id = {x.id: (x.encoder, x.decoder) for x in runs}
    return replication_table(
        result, [Named(i, "--latents", run="run-0") for i in latents], by_id.get
    )


def test_a_list_with_bom_spaces_and_quotes_is_read(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text('\ufefflatent, label ,seed\n 3 ,"a, b",0\n17,,1\n', encoding="utf-8")
    assert read_named(path) == [
        Named(3, f"{path}, line 2", "a, b", "", "0"),
        Named(17, f"{path}, line 3", "", "", "1"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{} is empty: it must have a column `latent`"),
        ("latent\n", "{} names no latents: there is nothing below its header"),
        ("latent,lable\n3,x\n", "{} has an unknown column `lable`. Did you mean `label`? "
         "Columns: latent, label, run, seed."),
        ("label,seed\nx,0\n", "{} must have a column `latent`; its columns are label, seed"),
        ("latent\n3\n-1\n", "{}, line 3: `latent` must be an integer, at least 0; got '-1'"),
        ("latent\n3.0\n", "{}, line 2: `latent` must be an integer, at least 0; got '3.0'"),
        ("latent,label\n,x\n", "{}, line 2: `latent` must be an integer, at least 0; got ''"),
        ("latent\n3,4\n", "{}, line 2 has more entries than there are columns: ['4']"),
    ],
)  # fmt: skip
def test_a_malformed_list_is_refused(text, message, tmp_path):
    path = tmp_path / "l.csv"
    path.write_text(text)
    with pytest.raises(ReseedError) as caught:
        read_named(path)
    assert str(caught.value) == message.format(path)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(ReseedError, match=r"there is no file nowhere\.csv"):
        read_named("nowhere.csv")
    (tmp_path / "b.csv").write_bytes(b"latent\n\xff\xfe")
    with pytest.raises(ReseedError, match="is not a csv file"):
        read_named(tmp_path / "b.csv")
    with pytest.raises(ReseedError, match="--latents: `latent` must be an integer"):
        parse_index("1e3", "--latents")


def test_shared_and_best_latents_equal_those_of_a_plain_loop(result, runs):
    frame = looked_up(result, runs, *range(N))
    assert frame["latent"].tolist() == list(range(N))
    a = runs[0]
    for other in runs[1:]:
        encoder = unit_rows(a.encoder) @ unit_rows(other.encoder).T
        decoder = unit_rows(a.decoder) @ unit_rows(other.decoder).T
        v = other.seed
        for i in range(N):
            row = frame.iloc[i]
            best = max(range(N), key=lambda j, i=i: min(encoder[i, j], decoder[i, j]))
            assert row[f"best_{v}"] == best
            cosines = row[f"best_cosine_encoder_{v}"], row[f"best_cosine_decoder_{v}"]
            assert cosines == pytest.approx((encoder[i, best], decoder[i, best]), abs=1e-6)
            j = row[f"partner_{v}"]
            cosines = row[f"cosine_encoder_{v}"], row[f"cosine_decoder_{v}"]
            assert cosines == pytest.approx((encoder[i, j], decoder[i, j]), abs=1e-6)
            common = min(encoder[i, best], decoder[i, best]) > 0.999
            assert row[f"shared_{v}"] == common
            if common:
                assert j == row[f"partner_encoder_{v}"] == best
    assert (frame["shared_with"] == 2).sum() == 12
    assert (frame["shared_with"] == 0).sum() == 28
    assert frame["dictionary_shared"].to_numpy() == pytest.approx(12 / 40)
    assert "partner_0" not in list(frame), "there are no columns for the run itself"


def test_latents_may_be_of_several_runs_and_one_may_be_zero(result, runs):
    encoder = runs[1].encoder.copy()
    encoder[5] = 0
    runs = [runs[0], replace(runs[1], encoder=encoder), runs[2]]
    result = compare_cell(runs, [], result.settings)
    by_id = {x.id: (x.encoder, x.decoder) for x in runs}
    named = [Named(5, "", run="run-1"), Named(3, "", "x", "run-0"), Named(5, "", run="run-2")]
    frame = replication_table(result, named, by_id.get)
    assert frame["run"].tolist() == ["run-1", "run-0", "run-2"], "in the given order"
    assert frame["seed"].tolist() == ["1", "0", "2"]
    assert frame["partner_0"].isna().tolist() == [False, True, False]
    assert frame["zero"].tolist() == [True, False, False]
    silent = frame.iloc[0]
    assert (silent["partner_0"], silent["best_0"], silent["shared_with"]) == (-1, -1, 0)
    assert np.isnan(silent["cosine_decoder_0"])


def test_an_index_out_of_range_is_refused_with_the_range(result, runs):
    with pytest.raises(ReseedError) as caught:
        looked_up(result, runs, 3, 40)
    assert str(caught.value) == (
        "--latents: `latent` must be from 0 to 39: run-0 has 40 latents; got 40"
    )


def test_firing_deciles_are_among_live_latents():
    firing = np.array([0, 3, *range(10, 30), 500])
    live = firing >= 10
    found = firing_decile(firing, live)
    assert found[:2].tolist() == [0, 0], "latents that are not live have decile 0"
    # 21 live latents: two per decile, three in one.
    assert np.bincount(found)[1:].sum() == 21
    assert set(np.bincount(found)[1:]) == {2, 3}
    assert (np.diff(found[2:]) >= 0).all()
    assert found[-1] == 10
    assert firing_decile(np.full(5, 50), np.ones(5, bool)).tolist() == [1] * 5, "all equal"
    assert firing_decile(np.zeros(3, int), np.zeros(3, bool)).tolist() == [0] * 3


def test_the_decile_baseline_is_that_of_latents_that_fire_as_often(runs):
    """Shared latents fire rarely here, the others often."""
    base = compare_cell(runs, [], ComparisonConfig(name="t", grid={"seed": [0, 1, 2]}))
    table = base.latents.to_pandas()
    shared = {x.id: table[table["run"] == x.id]["shared_with"].to_numpy() == 2 for x in runs}
    runs = [replace(x, firing=np.where(shared[x.id], 20, 90)) for x in runs]
    result = compare_cell(runs, [], base.settings)
    frame = looked_up(result, runs, *range(N))
    own = shared["run-0"]
    assert frame["decile_shared"].to_numpy()[own] == pytest.approx(1)
    assert frame["decile_shared"].to_numpy()[~own] == pytest.approx(0)
    assert (frame["null_shared_fraction"] < 0.01).all()
    assert (frame["null_cosine"] > 0.1).all()


@pytest.mark.parametrize(("m", "n"), [(0, 2), (1, 2), (2, 2), (5, 8)])
def test_reproducibility_is_jeffreys(m, n):
    mean, low, high = posterior(m, n, JEFFREYS, 0.9)
    wanted = stats.beta(m + 0.5, n - m + 0.5)
    assert (mean, low, high) == pytest.approx((wanted.mean(), *wanted.ppf([0.05, 0.95])))


def test_reproducibility_in_the_table_of_latents_is_used(result, runs):
    """Without it, the table gets Jeffreys' estimate."""
    import pyarrow as pa

    table = result.latents
    for name, value in (("reproducibility", 0.4), ("reproducibility_low", 0.3),
                        ("reproducibility_high", 0.5)):  # fmt: skip
        table = table.append_column(name, pa.array([value] * len(table)))
    frame = looked_up(replace(result, latents=table), runs, 3)
    names = ["reproducibility", "reproducibility_low", "reproducibility_high"]
    assert frame[names].to_numpy().tolist() == [[0.4, 0.3, 0.5]]
    assert looked_up(result, runs, 3)["reproducibility"].item() in (2.5 / 3, 1.5 / 3, 0.5 / 3)


def with_lists(result, tokens, **values):
    """Return a cell whose latents have these values with every other run."""
    latents = result.latents
    for name, value in values.items():
        both = value if isinstance(value, list) else [value] * 2
        column = pa.array([both] * len(latents), type=pa.list_(pa.float32()))
        latents = latents.append_column(name, column)
    return replace(result, latents=latents, pairs=result.pairs.assign(**{TOKENS: tokens, NOTE: ""}))


@pytest.mark.parametrize(
    ("r", "words"),
    [
        ([0.25, 0.25], "**0 of 24 shared matches whose r is defined fire alike** (r at least"),
        ([0.25, 0.75], "**12 of 24 shared matches whose r is defined fire alike** (r at least"),
        ([0.75, None], "**12 of 12 shared matches whose r is defined fire alike** (r at least 0.5, "
         "12 undefined);"),
        ([None, None], ""),
    ],
)  # fmt: skip
def test_the_agreement_of_activations_stands_beside_the_cosines(result, runs, r, words):
    """12 latents are shared with both other runs: 24 matches."""
    compared = with_lists(result, 4096, pearson=r, jaccard=0.5)
    frame = looked_up(compared, runs, *range(N))
    np.testing.assert_array_equal(frame["pearson_1"], np.full(N, np.array(r[0], dtype=float)))
    assert frame["jaccard_2"].tolist() == [0.5] * N
    table = check_table(frame, compared, {})
    assert words in table.footnotes[0]
    assert ("fire alike" in table.footnotes[0]) == bool(words)
    assert "on 4,096 held-out tokens" in table.footnotes[2]
    number = "–" if r[1] is None else f"{r[1]:.2f}"
    assert all(f"; r={number}, J=0.50)" in row[-1] for row in table.rows)


@pytest.mark.parametrize(
    ("columns", "reason"), [({}, NOT_ASKED), ({NOTE: "the model is gone", TOKENS: 0}, "the model")]
)
def test_activations_that_were_not_compared_are_dashes_with_the_reason(
    result, runs, columns, reason
):
    result = replace(result, pairs=result.pairs.assign(**columns))
    table = check_table(looked_up(result, runs, 0, 1), result, {})
    assert all("; r=–, J=–)" in row[-1] for row in table.rows)
    assert f"of activations are –: they were not compared: {reason}" in table.footnotes[2]
    assert "fire alike" not in table.footnotes[0]
