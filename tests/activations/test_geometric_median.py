"""The geometric median, at which b_dec may start."""

import pytest
import torch

from reseed.activations.moments import geometric_median


def test_at_the_geometric_median_the_unit_vectors_cancel():
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).exp()
    offsets = x.double() - geometric_median(x)
    units = offsets / offsets.norm(dim=1, keepdim=True)
    assert units.mean(0).norm() < 1.1e-6
    # The mean does not have this property.
    offsets = x.double() - x.double().mean(0)
    assert (offsets / offsets.norm(dim=1, keepdim=True)).mean(0).norm() > 0.05


def test_the_geometric_median_of_a_right_triangle_is_its_fermat_point():
    """The triangle is isosceles; its Fermat point sees every side under 120°."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    fermat = (3 - 3**0.5) / 6
    found = geometric_median(corners)
    torch.testing.assert_close(
        found, torch.tensor([fermat, fermat], dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_the_geometric_median_may_be_one_of_the_points_or_start_on_one():
    # The iteration starts at the mean, 0, which is one of the points; on a line the geometric
    # median is the median, 1, another of them.
    line = torch.tensor([[-4.0], [0.0], [1.0], [1.5], [1.5]])
    assert float(line.mean()) == 0
    assert float(geometric_median(line)) == pytest.approx(1.0, abs=1e-5)
    same = torch.full((5, 3), 2.5)
    assert torch.equal(geometric_median(same), same[0].double())
