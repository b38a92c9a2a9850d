"""Duplicates and antipodal pairs within a dictionary."""

import numpy as np
import pytest

from reseed.compare import nearest
from reseed.compare.cell import compare_cell
from reseed.compare.dictionary import Rows
from reseed.compare.nearest import find_duplicates


@pytest.mark.parametrize("entries", [1, 60, 1 << 22])
def test_duplicates_agree_with_dense_matrices_at_any_block_size(
    dictionary, monkeypatch, entries, unit
):
    monkeypatch.setattr(nearest, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(nearest, "_MOST_COLUMNS", 17)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 20, 10))
    signs = rng.choice([-1, 1], (1, 20, 1))
    noise = rng.uniform(0, 1, (1, 20, 1)) * rng.standard_normal((2, 20, 10))
    x = dictionary(*np.concatenate([rows, signs * rows + noise], axis=1))
    encoder = unit(x.encoder) @ unit(x.encoder).T
    product = encoder * (unit(x.decoder) @ unit(x.decoder).T)
    np.fill_diagonal(product, 0)
    positive = np.where(encoder > 0, product, 0).max(axis=1)
    negative = np.where(encoder < 0, product, 0).max(axis=1)
    found = find_duplicates(Rows.of(x), 0.7)
    assert found.duplicate_product == pytest.approx(positive, abs=1e-7)
    assert found.antipodal_product == pytest.approx(negative, abs=1e-7)
    assert found.duplicate.tolist() == (positive >= 0.49).tolist()
    assert found.antipodal.tolist() == (negative >= 0.49).tolist()
    assert 5 < found.duplicate.sum() < 35
    assert 5 < found.antipodal.sum() < 35


def test_duplicates_and_antipodal_latents_agree_with_a_hand_computed_case(dictionary):
    e = np.eye(5)
    encoder = [e[0], e[0], e[1], -e[1], e[2], -e[2], e[3], e[4] * 0]
    decoder = [e[0], 3 * e[0], e[1], -e[1], e[2], e[2], e[4], e[4]]
    found = find_duplicates(Rows.of(dictionary(encoder, decoder)), 0.7)
    yes, no = True, False
    assert found.duplicate.tolist() == [yes, yes, no, no, no, no, no, no]
    # Opposite encoders with the same decoder are neither.
    assert found.antipodal.tolist() == [no, no, yes, yes, no, no, no, no]
    assert found.duplicate_product.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_repeats_of_tied_rows_and_of_a_single_latent(dictionary):
    rows = np.array([[1.0, 0], [0.6, 0.8], [-1, 0]])
    found = find_duplicates(Rows.of(dictionary(rows)), 0.7)
    assert found.duplicate_product == pytest.approx([0.36, 0.36, 0])
    assert found.antipodal_product == pytest.approx([1, 0.36, 1])
    assert find_duplicates(Rows.of(dictionary(rows[:1])), 0.7).duplicate_product.tolist() == [0]


def test_a_cell_has_the_fractions_of_repeated_latents(partly_shared, settings, dictionary):
    runs = []
    for x in partly_shared(3, 12):
        # Repeat the last latent of each run as a duplicate and as an antipodal latent.
        encoder, decoder = (np.concatenate([y, y[-1:], -y[-1:]]) for y in (x.encoder, x.decoder))
        runs.append(dictionary(encoder, decoder, seed=x.seed))
    cell = compare_cell(runs, [], settings)
    assert cell.runs["duplicate_fraction"].tolist() == [2 / 42] * 3
    assert cell.runs["antipodal_fraction"].tolist() == [3 / 42] * 3
    table = cell.latents.to_pandas()
    for word, number in (("duplicate", 2), ("antipodal", 3)):
        for _, row in cell.pairs.iterrows():
            shared = 0
            for run, other in ((row.a, row.b), (row.b, row.a)):
                own = table[(table["run"] == run) & table[word]]
                assert len(own) == number
                long = own.explode(["others", "shared"])
                shared += long.loc[long["others"] == other, "shared"].sum()
            assert row[f"shared_fraction_{word}"] == shared / (2 * number)
