import numpy as np
import pytest
import torch

from rdmd_fast.metrics.closed_forms import linear_loss
from rdmd_fast.metrics.monte_carlo import sample_loss
from rdmd_fast.randomness import Philox

COUNT = 50_000
A = torch.tensor([[1.2, -0.7], [0.3, 0.9]], dtype=torch.float64)
TARGET = torch.tensor([[2.0, 0.6], [0.6, 1.0]])


def quantile(u):
    return torch.exp(-0.5 + 0.8 * torch.special.ndtri(u))


@pytest.mark.parametrize("power", [0, 2])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_estimate_is_within_four_standard_errors_of_the_closed_form(power, weight):
    samples = sample_loss(A, TARGET, lambda sigma: sigma**power, quantile, Philox(0), torch.arange(COUNT))
    estimate, error = samples.estimate(weight)
    exact = linear_loss(A, TARGET, weight, lambda sigma: sigma**power, lambda u: quantile(torch.as_tensor(u)).numpy())
    assert abs(estimate - exact) < 4 * error
    assert error < 0.05 * exact  # the bound above says something


def test_standard_error_is_the_spread_of_independent_estimates():
    estimates, errors = [], []
    for part in torch.arange(COUNT).split(COUNT // 50):
        samples = sample_loss(A, TARGET, torch.ones_like, quantile, Philox(1), part)
        estimate, error = samples.estimate(0.3)
        estimates.append(estimate)
        errors.append(error)
    # The spread of 50 estimates has a relative error of 10 %.
    assert np.std(estimates, ddof=1) == pytest.approx(np.mean(errors), rel=0.4)


def test_equal_densities_have_no_divergence():
    samples = sample_loss(A, A @ A.t(), torch.ones_like, quantile, Philox(0), torch.arange(100))
    assert samples.divergence.abs().max() < 1e-12
    assert samples.transport_cost.min() > 0
