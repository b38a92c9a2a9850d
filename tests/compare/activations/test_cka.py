from itertools import permutations

import numpy as np
import pytest
import torch

from reseed.compare.activations.agreement import CKA, centred_gram, hsic


def gram(x):
    return x.double() @ x.double().T


def cka(xs, batch):
    found = CKA(len(xs))
    for parts in zip(*(x.split(batch) for x in xs), strict=True):
        found.add([centred_gram(part) for part in parts])
    return found.values()


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def test_hsic_is_the_u_statistic_over_all_quadruples_of_tokens(draw):
    """HSIC = E[k_ij l_ij + k_ij l_qr − 2 k_ij l_iq] over distinct tokens i, j, q, r."""
    k, l = (gram(draw(7, 3)) for _ in range(2))  # noqa: E741
    terms = [
        k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
        for i, j, q, r in permutations(range(7), 4)
    ]
    found = hsic([k, l])
    assert float(found[0, 1]) == pytest.approx(float(np.mean(terms)))
    assert torch.equal(found, found.T)


def test_hsic_does_not_depend_on_the_origin(draw):
    x, y = draw(20, 5).double(), draw(20, 4).double()
    moved = hsic([gram(x + 10), gram(y - 3)])
    torch.testing.assert_close(hsic([gram(x), gram(y)]), moved)
    torch.testing.assert_close(hsic([centred_gram(x), centred_gram(y)]), moved)


def test_cka_of_rotated_permuted_and_scaled_copies_is_one(draw):
    x = draw(100, 8) + 2
    turn, _ = torch.linalg.qr(draw(8, 8))
    found = cka([x, x[:, torch.randperm(8)], 5 * x @ turn], batch=25)
    assert found == pytest.approx(np.ones((3, 3)))


def test_cka_of_independent_representations_is_zero_at_any_width(draw):
    """With more dimensions than tokens, the plain estimator from centred Grams is near 1."""
    x, y = draw(640, 400), draw(640, 400)
    found = cka([x, y], batch=64)
    assert abs(found[0, 1]) < 0.05
    k, l = (centred_gram(part[:64]) for part in (x, y))  # noqa: E741
    assert float((k * l).sum() / (k.norm() * l.norm())) > 0.8


def test_the_batch_size_changes_cka_by_noise_alone(draw):
    """For y = c·x + …, both with unit covariance, HSIC is ‖cov‖², and CKA 6c²/√(6·6) = c²."""
    common, own = draw(2000, 6), draw(2000, 6)
    weight = 0.7
    y = weight * common + np.sqrt(1 - weight**2) * own
    for batch in (25, 400, 2000):
        assert cka([common, y], batch)[0, 1] == pytest.approx(weight**2, abs=0.04), batch


def test_a_smaller_last_batch_is_weighted_by_its_tokens(draw):
    x, y = draw(26, 3), draw(26, 3)
    sums = sum(
        n * hsic([centred_gram(x[at : at + n]), centred_gram(y[at : at + n])])
        for at, n in ((0, 20), (20, 6))
    )
    assert isinstance(sums, torch.Tensor)
    expected = sums[0, 1] / torch.sqrt(sums[0, 0] * sums[1, 1])
    assert cka([x, y], 20)[0, 1] == pytest.approx(float(expected))


def test_batches_of_too_few_tokens_are_left_out(draw):
    x = draw(11, 3)
    assert np.array_equal(cka([x, x + 1], 8), cka([x[:8], x[:8] + 1], 8))
    assert np.isnan(cka([x[:3], x[:3]], 8)).all()
    with pytest.raises(ValueError, match="at least 4 tokens in a batch; got 3"):
        hsic([gram(x[:3])])


def test_cka_without_variance_is_nan(draw):
    found = cka([torch.ones(10, 2), draw(10, 2)], 10)
    assert np.isnan(found[0]).all()
    assert found[1, 1] == pytest.approx(1)
