"""Analytic denoisers against SciPy's densities (Bayes and Tweedie) and explicit matrix formulas."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from rdmd_fast.errors import InputError
from rdmd_fast.networks.analytic import GaussianMixtureDenoiser, gaussian_denoiser

SIGMAS = [1e-3, 0.05, 0.7, 5.0, 100.0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_covariances(components, dim, generator):
    factors = torch.randn(components, dim, dim, generator=generator, dtype=torch.float64)
    return factors @ factors.mT / dim + 0.05 * torch.eye(dim)


def random_mixture(components, dim, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.1
    if kind == "full":
        return means, random_covariances(components, dim, generator), weights
    variances = torch.rand(components, generator=generator, dtype=torch.float64)
    return means, torch.full_like(variances, 0.04) if kind == "shared" else variances, weights


def noisy_samples(means, sigma, count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(means), (count,), generator=generator)
    noise = torch.randn(count, means.shape[1], generator=generator, dtype=torch.float64)
    return means[rows] + (0.3 + sigma) * noise


def full(covariances, dim):
    return covariances[:, None, None] * torch.eye(dim) if covariances.ndim == 1 else covariances


def posterior_mean(x, sigma, means, covariances, weights):
    """Bayes' rule one sample at a time, with SciPy's log densities."""
    identity = np.eye(means.shape[1])
    rows = []
    for point in x.numpy():
        noisy = [c.numpy() + sigma**2 * identity for c in full(covariances, means.shape[1])]
        parts = zip(weights.tolist(), means.numpy(), noisy, strict=True)
        logs = np.array([np.log(w) + multivariate_normal.logpdf(point, m, s) for w, m, s in parts])
        share = np.exp(logs - logs.max())
        each = [
            m + c.numpy() @ np.linalg.solve(s, point - m)
            for m, c, s in zip(means.numpy(), full(covariances, means.shape[1]), noisy, strict=True)
        ]
        rows.append((share / share.sum()) @ np.array(each))
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    ("components", "dim", "kind"),
    [(8, 2, "shared"), (5, 2, "isotropic"), (4, 2, "full"), (1, 2, "full"), (1, 3, "full"), (3, 4, "full")],
)
def test_mixture_denoiser_is_the_posterior_mean(sigma, components, dim, kind):
    means, covariances, weights = random_mixture(components, dim, kind)
    denoiser = GaussianMixtureDenoiser(means, covariances, weights)
    x = noisy_samples(means, sigma)
    expected = posterior_mean(x, sigma, means, covariances, weights)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-8, atol=1e-8)
    single = x.float()
    expected = posterior_mean(single.double(), sigma, means, covariances, weights)
    actual = denoiser(single, torch.full((len(x),), sigma, dtype=torch.float64))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["shared", "isotropic", "full"])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0])
def test_mixture_denoiser_obeys_tweedie(kind, sigma):
    """sigma^2 times the gradient of SciPy's log density, by central differences, is D(x) - x."""
    means, covariances, weights = random_mixture(3, 2, kind)
    x, step = noisy_samples(means, sigma), 1e-4 * (0.2 + sigma)

    def log_density(points):
        noisy = full(covariances, 2) + sigma**2 * torch.eye(2, dtype=torch.float64)
        parts = [
            np.log(w) + multivariate_normal.logpdf(points.numpy(), m.numpy(), s.numpy())
            for w, m, s in zip((weights / weights.sum()).tolist(), means, noisy, strict=True)
        ]
        return torch.tensor(np.logaddexp.reduce(parts))

    shifts = step * torch.eye(2, dtype=torch.float64)
    score = torch.stack([(log_density(x + s) - log_density(x - s)) / (2 * step) for s in shifts], dim=1)
    denoised = GaussianMixtureDenoiser(means, covariances, weights)(x, sigma)
    torch.testing.assert_close(denoised - x, sigma**2 * score, rtol=1e-4, atol=1e-5)


def test_each_sample_has_its_own_noise_level():
    means, covariances, weights = random_mixture(4, 2, "full")
    denoiser, sigmas = GaussianMixtureDenoiser(means, covariances, weights), torch.tensor(SIGMAS)
    x = noisy_samples(means, 1.0, count=len(SIGMAS))
    rows = [denoiser(x[i : i + 1], sigma) for i, sigma in enumerate(sigmas)]
    torch.testing.assert_close(denoiser(x, sigmas), torch.cat(rows))


def test_far_from_point_masses_at_tiny_noise_the_nearest_wins():
    """Log weights near -1e7 must neither overflow nor lose a gap of a few units."""
    means = torch.tensor([[1.0, 0.0], [1.0, 1e-6], [-3.0, 0.0]], dtype=torch.float64)
    denoised = GaussianMixtureDenoiser(means, torch.zeros(3))(torch.tensor([[4.0, 3.0]]), 1e-3)
    # Masses 1 and 2 differ by 3e-6 in half the squared distance: 3 nats at sigma = 1e-3.
    share = 1 / (1 + np.exp(-(3e-6 - 0.5e-12) / 1e-6))
    torch.testing.assert_close(denoised, torch.tensor([[1.0, share * 1e-6]], dtype=torch.float32), rtol=1e-5, atol=0)


def test_mixture_denoiser_is_differentiable_in_x():
    for kind in ("shared", "isotropic", "full"):
        means, covariances, weights = random_mixture(3, 2, kind)
        denoiser = GaussianMixtureDenoiser(means, covariances, weights)
        x = noisy_samples(means, 0.5).requires_grad_()
        assert torch.autograd.gradcheck(lambda points, d=denoiser: d(points, 0.5), x)


def test_loading_a_state_dict_refreshes_the_whole_denoiser():
    for kind in ("shared", "isotropic", "full"):
        first = GaussianMixtureDenoiser(*random_mixture(3, 2, "isotropic" if kind == "shared" else kind, seed=0))
        second = GaussianMixtureDenoiser(*random_mixture(3, 2, kind, seed=5))
        assert set(first.state_dict()) == {"means", "covariances", "weights"}
        first.load_state_dict(second.state_dict())
        x = torch.randn(4, 2)
        assert torch.equal(first(x, 0.3), second(x, 0.3))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dim", [2, 3])
def test_gaussian_denoiser_equals_matrix_formula(sigma, dim):
    generator = torch.Generator().manual_seed(3)
    covariance, mean = random_covariances(1, dim, generator)[0], torch.arange(dim).double()
    x = torch.randn(5, dim, generator=generator, dtype=torch.float64) + mean
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(dim, dtype=torch.float64))
    expected = mean + (x - mean) @ gain.T
    for wanted in (False, True):  # general dimensions take another path under autograd
        actual = gaussian_denoiser(x, sigma, mean, covariance.requires_grad_(wanted))
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 3])
def test_gaussian_denoiser_is_differentiable_in_every_argument(dim):
    """At A = r I too, where the eigenvalues coincide."""
    mean, x = torch.randn(dim, dtype=torch.float64), torch.randn(4, dim, dtype=torch.float64)
    matrix, sigma = 1.3 * torch.eye(dim, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.2
    arguments = [tensor.requires_grad_() for tensor in (x, sigma, mean, matrix)]
    assert torch.autograd.gradcheck(lambda x, s, m, a: gaussian_denoiser(x, s, m, a @ a.mT), arguments)


def test_rank_one_gaussian_is_projected_without_cancellation():
    """The map of x to the line of a degenerate covariance u u^T is u (u x) / (1 + sigma^2) exactly."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    x = torch.randn(7, 2, dtype=torch.float64)
    denoised = gaussian_denoiser(x, 1e-3, torch.zeros(2), direction.outer(direction))
    torch.testing.assert_close(denoised, (x @ direction)[:, None] * direction / (1 + 1e-6), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("means", "covariances", "weights", "message"), [
    (torch.zeros(3), torch.ones(3), None, "means"),
    (torch.zeros(3, 2), torch.ones(2), None, "covariances"),
    (torch.zeros(3, 2), torch.ones(3), torch.tensor([1.0, -1.0, 1.0]), "weights"),
    (torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), None, "semi-definite"),
    (torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]), None, "symmetric"),
    (torch.zeros(2, 2), torch.tensor([1.0, -1.0]), None, "negative"),
])  # fmt: skip
def test_impossible_mixtures_are_one_line_errors(means, covariances, weights, message):
    with pytest.raises(InputError, match=message) as error:
        GaussianMixtureDenoiser(means, covariances, weights)
    assert "\n" not in str(error.value)
