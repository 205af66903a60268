import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.frechet import frechet_distance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def with_exact_moments(rng, n, mean, covariance):
    """Samples [n, d] whose sample mean and unbiased covariance are exactly those given."""
    white = rng.normal(size=(n, len(mean)))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def test_it_matches_the_formula_with_a_matrix_square_root(rng):
    a = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    b = rng.exponential(size=(250, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, torch.tensor(b)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_it_matches_the_closed_form_of_commuting_gaussians(rng):
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    stds_a, stds_b = np.array([1.0, 2.0, 0.5]), np.array([0.3, 4.0, 0.5])
    a, b = (
        with_exact_moments(rng, 50, mean, rotation @ np.diag(stds**2) @ rotation.T)
        for mean, stds in [(np.zeros(3), stds_a), (np.array([1.0, -2.0, 0.0]), stds_b)]
    )
    assert frechet_distance(a, b) == pytest.approx(5 + np.sum((stds_a - stds_b) ** 2), rel=1e-10)


def test_singular_covariances_lose_no_digits(rng):
    # Fewer samples than dimensions: a matrix square root fails here or is off by 1e-4.
    a = rng.normal(size=(10, 32))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + 1e-3) == pytest.approx(32e-6, rel=1e-6)
    constant = np.zeros((5, 32))
    assert frechet_distance(constant, a) == pytest.approx(np.sum(a.mean(0) ** 2) + np.trace(np.cov(a.T)), rel=1e-12)


def test_bad_features_are_refused(rng):
    a = rng.normal(size=(10, 4))
    with pytest.raises(InputError, match="dimensions"):
        frechet_distance(a, a[:, :3])
    with pytest.raises(InputError, match="two"):
        frechet_distance(a, a[:1])
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(a, np.full((10, 4), np.inf))
