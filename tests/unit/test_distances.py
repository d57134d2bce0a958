import numpy as np
import pytest
import torch
from scipy import linalg

from flowrl.evaluation.distances import Inception, RandomConv, frechet, kernel


def test_frechet_distance_by_scipy(normal):
    """|m - n|^2 + tr(A + B - 2 (AB)^(1/2)), with the matrix root of scipy. Mutation: no root, or
    biased covariances.
    """
    a = normal(300, 5) @ normal(5, 5) + 1
    b = normal(200, 5) @ normal(5, 5)
    cov_a, cov_b = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = gap + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_shift(normal):
    """0 to itself, 25 after a shift by (3, 4). Mutation: the distance of the means without its
    square.
    """
    a = normal(100, 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-9)


def test_kernel_distance_by_hand():
    """{1, 2} and {3, 4} in one dimension: 3^3 + 13^3 - 2 (4^3 + 5^3 + 7^3 + 9^3) / 4. Mutation:
    keep the diagonal.
    """
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert kernel(a, b, is_paired=False) == pytest.approx(27 + 2197 - 2 * 315.25, rel=1e-12)


def test_kernel_distance_of_pairs_by_hand(normal):
    """3^3 + 13^3 - (5^3 + 7^3) of {1, 2} and {3, 4}; 0 of a set and itself, of subsets too.

    Mutation: keep the pairs in the cross term, or draw the two subsets apart.
    """
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert kernel(a, b, is_paired=True) == pytest.approx(27 + 2197 - (125 + 343), rel=1e-12)
    many = normal(1100, 4)
    assert kernel(many, many, is_paired=True) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_needs_two_images():
    """Mutation: divide by size - 1 = 0."""
    one = torch.ones(1, 4)
    with pytest.raises(ValueError, match="1 and 1 images: it needs at least 2"):
        kernel(one, one, is_paired=True)


def test_kernel_distance_of_equals_is_about_0(normal):
    """Mutation: a biased estimate, which is above 0."""
    found = [kernel(normal(50, 8), normal(50, 8), is_paired=False) for _ in range(20)]
    assert min(found) < 0 < max(found) and abs(np.mean(found)) < 0.05


def test_random_features_are_fixed_and_tell_sets_apart():
    """Mutation: unseeded weights, or statistics over the batch."""
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = RandomConv()(images)
    assert features.shape == (40, 128)
    torch.testing.assert_close(RandomConv()(images[:7]), features[:7], rtol=1e-5, atol=1e-6)
    near, far = images.roll(1, 3), (images * 0.5)
    assert frechet(features, RandomConv()(far)) > 10 * frechet(features, RandomConv()(near)) > 0


def test_missing_inception_weights_are_named():
    """Mutation: fall back to other features in silence."""
    with pytest.raises(ValueError, match=r"--inception /no/weights.pth: no such file"):
        Inception("/no/weights.pth")
