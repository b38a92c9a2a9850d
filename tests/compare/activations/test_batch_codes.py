import numpy as np
import pytest
import torch

from reseed.compare.activations import batch_codes
from reseed.compare.activations.batch_codes import (
    BatchCodes,
    encode_batch,
    project_on_rows,
    rebatch,
)
from reseed.sae.relu import ReLUConfig


def sparse(dense):
    token, latent = dense.nonzero(as_tuple=True)
    return BatchCodes(token, latent, dense[token, latent], *dense.shape)


@pytest.fixture
def dense():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 12, generator=generator)
    return torch.where(torch.rand(30, 12, generator=generator) < 0.3, values, 0.0)


def test_sparse_codes_equal_the_dense_latents(dense):
    found = sparse(dense)
    assert torch.equal(found.gram(), dense.double() @ dense.double().T)
    torch.testing.assert_close(found.sum_by_latent(found.value), dense.double().sum(0))
    token = torch.arange(30).repeat_interleave(12)
    latent = torch.arange(12).repeat(30)
    assert torch.equal(found.values_at(token, latent), dense.flatten())


def test_codes_may_have_no_active_latent():
    found = sparse(torch.zeros(5, 3))
    assert torch.equal(found.values_at(torch.tensor([4]), torch.tensor([2])), torch.zeros(1))
    assert not found.gram().any()
    assert project_on_rows([torch.ones(5, 2)], found, torch.ones(3, 2))[0].tolist() == [0, 0, 0]


def test_projections_on_rows_are_the_dense_product(dense, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(30, 7, generator=generator) for _ in range(2)]
    W = torch.randn(12, 7, generator=generator)
    monkeypatch.setattr(batch_codes, "_ROW_ENTRIES", 21)  # several blocks, the last smaller
    for target, found in zip(targets, project_on_rows(targets, sparse(dense), W), strict=True):
        expected = (dense.double() * (target.double() @ W.double().T)).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_encoding_in_blocks_equals_encoding_at_once(monkeypatch):
    sae = ReLUConfig(num_latents=20).build(8, torch.Generator().manual_seed(0))
    x = torch.randn(31, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(batch_codes, "_DENSE_ENTRIES", 100)
    made = encode_batch(sae, x)
    latents = sae.encode(x).detach()
    token, latent = torch.meshgrid(torch.arange(31), torch.arange(20), indexing="ij")
    found = made.codes.values_at(token.flatten(), latent.flatten()).view(31, 20)
    torch.testing.assert_close(found, latents)
    torch.testing.assert_close(made.reconstruction, sae.decode(latents).detach())
    assert np.all(np.diff(made.codes.token.numpy() * 20 + made.codes.latent.numpy()) > 0)


@pytest.mark.parametrize("cuts", [[30], [1] * 30, [7, 0, 8, 15], [0, 29, 1]])
def test_batches_do_not_depend_on_how_chunks_are_cut(cuts):
    x = torch.arange(60.0).view(30, 2)
    found = list(rebatch(x.split(cuts), 8))
    assert [len(batch) for batch in found] == [8, 8, 8, 6]
    assert torch.equal(torch.cat(found), x)


def test_no_chunks_give_no_batches():
    assert list(rebatch([], 8)) == []
    assert list(rebatch([torch.zeros(0, 2)], 8)) == []
