"""The RDMD loss between Gaussians from samples: an estimate that shares no formula with metrics.theory's.

For G(x) = A x, x ~ N(0, I), and y_t = G(x) + sigma eps, both log densities at y_t are known, so

    L(A) = E[omega(sigma) (log p_theta,t(y_t) - log p_T,t(y_t))] + lambda E|x - G(x)|^2

is a mean over independent draws of (x, eps, sigma) (arXiv 2406.14762, Section 3.1).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rdmd_fast.randomness import Philox, Stream


class LossSamples(NamedTuple):
    """fp64 [n] each: terms of the KL part, already weighted by omega, and transport costs of the same draws."""

    divergence: Tensor
    transport_cost: Tensor

    def estimate(self, transport_weight: float) -> tuple[float, float]:
        """(loss, its standard error)."""
        terms = self.divergence + transport_weight * self.transport_cost
        return float(terms.mean()), float(terms.std() / len(terms) ** 0.5)


def sample_loss(
    A: Tensor,
    target_cov: Tensor,
    omega: Callable[[Tensor], Tensor],
    sigma_quantile: Callable[[Tensor], Tensor],
    philox: Philox,
    positions: Tensor,
) -> LossSamples:
    """Draw the loss's terms for G(x) = A x, A [d, d], and target N(0, target_cov), target_cov [d, d].

    ``omega`` and ``sigma_quantile`` take and return fp64 [n]; ``positions`` int64 [n] choose the draws.
    """
    A, target_cov = torch.as_tensor(A).double(), torch.as_tensor(target_cov).double()
    shape = (len(A),)
    x = philox.normal(Stream.EVALUATION, positions, shape).double()
    noise = philox.normal(Stream.VALIDATION_NOISE, positions, shape).double()
    sigma = sigma_quantile(philox.uniform(Stream.VALIDATION_SIGMA, positions)[:, 0])
    y = x @ A.t()
    y_t = y + sigma[:, None] * noise
    log_ratio = _log_density(y_t, A @ A.t(), sigma) - _log_density(y_t, target_cov, sigma)
    return LossSamples(omega(sigma) * log_ratio, (x - y).square().sum(1))


def _log_density(y_t: Tensor, covariance: Tensor, sigma: Tensor) -> Tensor:
    """log N(y_t; 0, covariance + sigma^2 I), [n], by the covariance's eigenbasis."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    variances = eigenvalues + sigma[:, None] ** 2
    squares = (y_t @ eigenvectors).square() / variances
    return -0.5 * (squares + variances.log() + torch.log(torch.tensor(2 * torch.pi))).sum(1)
