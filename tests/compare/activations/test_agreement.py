import numpy as np
import pytest
import torch
from scipy import stats

from reseed.compare.activations.agreement import FiringSums, PairSums, agreement
from reseed.compare.activations.batch_codes import BatchCodes


def sparse(dense):
    token, latent = dense.nonzero(as_tuple=True)
    return BatchCodes(token, latent, dense[token, latent], *dense.shape)


def measured(a, b, partner, cuts=None):
    """Return the agreement of dense latents, added a batch of tokens at a time."""
    sums = [FiringSums.empty(x.shape[1], x.device) for x in (a, b)]
    pairs = PairSums.empty(torch.tensor(partner))
    for part_a, part_b in zip(a.split(cuts or len(a)), b.split(cuts or len(b)), strict=True):
        codes = sparse(part_a), sparse(part_b)
        for total, code in zip(sums, codes, strict=True):
            total.add(code)
        pairs.add(codes[0], codes[1])
    return agreement(sums[0], sums[1], pairs)


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)

    def draw(num_latents):
        values = torch.rand(200, num_latents, generator=generator) + 3
        return torch.where(torch.rand(values.shape, generator=generator) < 0.2, values, 0.0)

    return draw(9), draw(6)


PARTNER = [3, -1, 0, 5, 3, 1, 2, 4, -1]  # an arbitrary list of pairs; 3 occurs twice


@pytest.mark.parametrize("cuts", [None, 64, 1])
def test_sparse_agreement_equals_that_of_dense_latents(latents, cuts):
    a, b = latents
    found = measured(a, b, PARTNER, cuts)
    for i, j in enumerate(PARTNER):
        if j < 0:
            assert np.isnan([found.pearson[i], found.jaccard[i]]).all()
            continue
        x, y = a[:, i].double().numpy(), b[:, j].double().numpy()
        assert found.pearson[i] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-10)
        fires = set(np.flatnonzero(x)), set(np.flatnonzero(y))
        assert found.jaccard[i] == len(fires[0] & fires[1]) / len(fires[0] | fires[1])


def test_agreement_equals_a_hand_computed_example():
    a = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    b = torch.tensor([[3.0], [0.0], [0.0], [5.0]])
    found = measured(a, b, [0])
    # Both fire at token 0, at least one at 0, 1 and 3. Σxy = 3, means 3/4 and 2, Σx² 5, Σy² 34.
    assert found.jaccard.tolist() == [1 / 3]
    assert found.pearson[0] == pytest.approx((3 - 4 * 0.75 * 2) / np.sqrt(2.75 * 18))


def test_the_same_latents_agree_completely_at_any_scale(latents):
    a, _ = latents
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    found = measured(a, 3 * a[:, order], order.argsort().tolist())
    assert found.pearson == pytest.approx(np.ones(9))
    assert found.jaccard.tolist() == [1.0] * 9


def test_a_latent_that_never_fires_has_no_correlation():
    a, b = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    found = measured(a, b, [0, 1])
    assert np.isnan(found.pearson).all()
    assert found.jaccard[0] == 0
    assert np.isnan(found.jaccard[1]), "neither fires"


def test_a_constant_latent_has_no_correlation():
    a = torch.full((6, 1), 2.0)
    assert np.isnan(measured(a, torch.rand(6, 1), [0]).pearson).all()
