import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import ortho_group

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.closed_forms import (
    fit_linear_map,
    gaussian_kl,
    linear_loss,
    loss,
    optimal_scales,
    scale_and_rotation,
    sigma_nodes,
)


def lognormal(u):
    return np.exp(-1.2 + 1.2 * ndtri(u))


def uniform_quantile(u):
    return 0.1 + 2.9 * u


WEIGHTINGS = {"uniform": np.ones_like, "sigma2": np.square}
WEIGHTS = [0.05, 0.2, 1.0]


@pytest.mark.parametrize(("weighting", "quantile", "expected"), [
    ("uniform", 0.0, [1.4502, 1.3505, 1.1683]),
    ("uniform", lognormal, [1.4382, 1.3233, 1.1397]),
    ("sigma2", lognormal, [1.2959, 1.1308, 1.0325]),
])  # fmt: skip
def test_optimal_scales_match_the_values_of_the_design(weighting, quantile, expected):
    scales = [optimal_scales(1.5, weight, WEIGHTINGS[weighting], quantile)[0] for weight in WEIGHTS]
    np.testing.assert_allclose(scales, expected, atol=6e-5)


def test_expectations_match_the_moments_of_the_lognormal():
    sigma, weights = sigma_nodes(np.square, lognormal)
    np.testing.assert_allclose(weights.sum(), np.exp(-2.4 + 2 * 1.44), rtol=1e-7)
    np.testing.assert_allclose(weights @ sigma**-4, np.exp(2.4 + 2 * 1.44), rtol=1e-7)


def test_the_quadrature_has_converged_at_its_default_size():
    coarse = optimal_scales([0.4, 1.5, 3.0], 0.2, np.square, lognormal)
    fine = optimal_scales([0.4, 1.5, 3.0], 0.2, np.square, lognormal, nodes=40_000)
    np.testing.assert_allclose(coarse, fine, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("quantile", [lognormal, uniform_quantile, 0.7])
def test_the_loss_is_stationary_at_the_optimal_scales(weighting, quantile):
    stds, step = np.array([0.5, 1.8]), 1e-5
    scales = optimal_scales(stds, 0.2, weighting, quantile)
    assert 0.5 < scales[0] < 1 < scales[1] < 1.8

    def along(axis, shift):
        moved = scales + shift * (np.arange(2) == axis)
        return linear_loss(np.diag(moved), np.diag(stds**2), 0.2, weighting, quantile)

    for axis in range(2):
        slope = (along(axis, step) - along(axis, -step)) / (2 * step)
        curvature = (along(axis, 1e-3) - 2 * along(axis, 0) + along(axis, -1e-3)) / 1e-6
        assert abs(slope) < 1e-8
        assert curvature > 0


def test_without_transport_weight_the_target_scale_is_optimal_at_any_rotation():
    np.testing.assert_array_equal(optimal_scales([0.5, 1.0, 2.0], 0, np.ones_like, lognormal), [0.5, 1, 2])
    assert loss(1.5, 77.0, 1.5, 0.0, np.ones_like, lognormal) == pytest.approx(0, abs=1e-12)
    assert loss(1.4, 0.0, 1.5, 0.0, np.ones_like, lognormal) > 1e-4


def test_a_float_gives_one_axis_and_the_transport_weight_pulls_it_to_one():
    assert optimal_scales(2.0, 1e9, np.ones_like, lognormal) == pytest.approx([1.0], abs=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 180.0])
def test_the_linear_loss_reduces_to_the_loss_of_a_scaled_rotation(degrees):
    a = np.deg2rad(degrees)
    A = 1.3 * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    expected = loss(1.3, degrees, 1.5, 0.2, np.square, lognormal)
    assert linear_loss(A, 1.5**2 * np.eye(2), 0.2, np.square, lognormal) == pytest.approx(expected, rel=1e-10)


def test_the_linear_loss_is_the_kl_divergence_plus_the_transport_cost():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 3, 3))
    target = B @ B.T + np.eye(3)
    noisy = [torch.tensor(cov + 0.49 * np.eye(3)) for cov in (A @ A.T, target)]
    p, q = (torch.distributions.MultivariateNormal(torch.zeros(3).double(), cov) for cov in noisy)
    kl = torch.distributions.kl_divergence(p, q).item()
    x = rng.normal(size=(400_000, 3))
    cost = np.sum((x - x @ A.T) ** 2, axis=1).mean()
    assert linear_loss(A, target, 0.0, lambda s: 3 * np.ones_like(s), 0.7) == pytest.approx(3 * kl, rel=1e-10)
    assert linear_loss(A, target, 0.2, np.ones_like, 0.7) - kl == pytest.approx(0.2 * cost, rel=0.01)


def test_gaussian_kl_matches_torch():
    rng = np.random.default_rng(1)
    means, roots = rng.normal(size=(2, 4)), rng.normal(size=(2, 4, 4))
    covs = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(4)
    p, q = (torch.distributions.MultivariateNormal(*map(torch.tensor, pair)) for pair in zip(means, covs, strict=True))
    expected = torch.distributions.kl_divergence(p, q).item()
    assert gaussian_kl(means[0], covs[0], means[1], covs[1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degrees", [-150.0, 0.0, 25.0])
def test_scale_and_rotation_recover_their_matrix_and_fit_any_other_best(degrees):
    a = np.deg2rad(degrees)
    rotation = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    assert scale_and_rotation(0.7 * rotation) == pytest.approx((0.7, degrees))

    A = rotation @ np.diag([0.5, 1.5]) + 0.1
    r, alpha = scale_and_rotation(A)
    angles = np.deg2rad(np.arange(-180, 180, 0.5))[:, None]
    scales = np.linspace(0, 3, 301)
    first_column, second_column = A[:, 0], A[:, 1]
    fits = sum(
        (column[0] - scales * c) ** 2 + (column[1] - scales * s) ** 2
        for column, c, s in [
            (first_column, np.cos(angles), np.sin(angles)),
            (second_column, -np.sin(angles), np.cos(angles)),
        ]
    )
    best_angle, best_scale = np.unravel_index(fits.argmin(), fits.shape)
    assert scales[best_scale] == pytest.approx(r, abs=0.006)
    assert np.rad2deg(angles[best_angle, 0]) == pytest.approx(alpha, abs=0.3)


def test_a_linear_map_is_recovered_from_tensors():
    rng = np.random.default_rng(2)
    x = torch.tensor(rng.normal(size=(50, 3)), requires_grad=True)
    A, b = torch.tensor(rng.normal(size=(2, 3))), torch.tensor([1.0, -2.0]).double()
    fitted_A, fitted_b = fit_linear_map(x, x @ A.T + b)
    np.testing.assert_allclose(fitted_A, A, atol=1e-12)
    np.testing.assert_allclose(fitted_b, b, atol=1e-12)


def test_the_optimum_over_all_linear_maps_is_axis_aligned():
    stds, scales = np.array([0.6, 1.7]), optimal_scales([0.6, 1.7], 0.2, np.ones_like, lognormal)
    best = linear_loss(np.diag(scales), np.diag(stds**2), 0.2, np.ones_like, lognormal)
    rng = np.random.default_rng(3)
    for _ in range(20):
        A = np.diag(scales) @ ortho_group.rvs(2, random_state=rng) + 0.05 * rng.normal(size=(2, 2))
        assert linear_loss(A, np.diag(stds**2), 0.2, np.ones_like, lognormal) > best


@pytest.mark.parametrize(("std", "weight"), [(0.0, 0.1), ([1.0, -1.0], 0.1), (1.5, -0.1), (1.5, float("nan"))])
def test_impossible_problems_are_refused(std, weight):
    with pytest.raises(InputError):
        optimal_scales(std, weight, np.ones_like, 0.5)
