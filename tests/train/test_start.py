"""Statistics of the first activations that a start needs: geometric median, k-means."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from reseed.activations.moments import geometric_median
from reseed.errors import ConfigError
from reseed.train.archetypes import assign, kmeans


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


def test_kmeans_equals_scipys():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 4, generator=generator)
    found = kmeans(x, 12, torch.Generator().manual_seed(5), rounds=8)
    start = x[torch.randperm(500, generator=torch.Generator().manual_seed(5))[:12]]
    # scipy's last round moves the centroids after its last assignment, as ours does.
    expected, _ = kmeans2(x.double().numpy(), start.double().numpy(), iter=8, minit="matrix")
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_each_final_centroid_is_the_mean_of_its_nearest_points():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    centroids = kmeans(x, 5, torch.Generator().manual_seed(0), rounds=1000)
    nearest = torch.cdist(x.double(), centroids.double()).argmin(1)
    assert torch.equal(assign(x, centroids)[0], nearest)
    for index in range(5):
        torch.testing.assert_close(centroids[index], x[nearest == index].mean(0))


def test_assignment_in_blocks_equals_that_of_all_distances(monkeypatch):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(x.double(), x[:7].double()).square()
    monkeypatch.setattr("reseed.train.archetypes.BLOCK_DISTANCES", 20)
    nearest, least = assign(x, x[:7])
    assert torch.equal(nearest, distances.argmin(1))
    torch.testing.assert_close(least.double(), distances.min(1).values, rtol=0, atol=1e-5)


def test_an_empty_cluster_restarts_at_the_farthest_point():
    """The centroids start at 0, 0, 0.1. By hand: the second wins no point and moves to 9.5; the
    third moves to 6.2, the mean of 0.1, 9 and 9.5, loses 9 to 9.5 and, being empty, moves to 9. The
    first keeps the rest.
    """
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [9.5, 0.0]])
    seeds = [s for s in range(50) if _starts(s) == {0, 1, 2}]
    assert seeds
    found = kmeans(x, 3, torch.Generator().manual_seed(seeds[0]))
    assert sorted(float(c[0]) for c in found) == pytest.approx([1 / 30, 9.0, 9.5])


def _starts(seed: int) -> set[int]:
    return set(torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3].tolist())


def test_kmeans_depends_only_on_points_and_seed():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    a, b, c = (kmeans(x, 20, torch.Generator().manual_seed(s), rounds=3) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ConfigError, match=r"`training.archetypes` \(=9; null: num_latents\) must"):
        kmeans(torch.zeros(8, 2), 9, torch.Generator())
