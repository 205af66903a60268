"""Closed forms of the RDMD loss between Gaussians (arXiv 2406.14762, Section 3.1).

The source is N(0, I), the target N(0, diag(s^2)) or N(0, S), the generator linear: G(x) = A x. The loss

    L(A) = E_sigma[omega(sigma) KL(N(0, A A^T + sigma^2 I) || N(0, S + sigma^2 I))] + lambda ||A - I||_F^2

is the RDMD objective with the squared L2 cost, since E|x - A x|^2 = ||A - I||_F^2. Every sigma is sigma /
alpha in data units, so one formula serves all parameterisations. ``omega`` maps an fp64 array of sigmas to
weights; ``sigma_quantile`` maps u in (0, 1), fp64, to sigmas, or is a number for a constant sigma.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.metrics.checks import fp64_rows

Omega = Callable[[np.ndarray], np.ndarray]
SigmaQuantile = Callable[[np.ndarray], np.ndarray] | float
NODES = 2000
# Beyond 8 standard deviations lies 1e-15 of the mass, about the spacing of fp64 below u = 1.
Z_RANGE = 8.0


def sigma_nodes(omega: Omega, sigma_quantile: SigmaQuantile, nodes: int = NODES) -> tuple[np.ndarray, np.ndarray]:
    """fp64 nodes sigma [nodes] and weights [nodes]: sum(weights * f(sigma)) = E_sigma[omega(sigma) f(sigma)].

    Midpoint rule in z with u = Phi(z): the normal density removes the end points of u, where the quantile of
    a lognormal is steep, and makes the rule converge exponentially for smooth quantiles.
    """
    if callable(sigma_quantile):
        ndtr = require("scipy.special", "eval").ndtr
        z = Z_RANGE * (2 * (np.arange(nodes) + 0.5) / nodes - 1)
        sigma = np.asarray(sigma_quantile(ndtr(z)), dtype=np.float64)
        density = np.exp(-0.5 * z * z)
        probability = density / density.sum()
    else:
        sigma, probability = np.array([float(sigma_quantile)]), np.ones(1)
    return sigma, probability * np.broadcast_to(omega(sigma), sigma.shape)


def gaussian_kl(mean_p, cov_p, mean_q, cov_q) -> float:
    """KL(N(mean_p, cov_p) || N(mean_q, cov_q)) in nats; means [d], covariances [d, d], positive definite."""
    cov_q = np.asarray(cov_q, dtype=np.float64)
    shift = np.asarray(mean_q, dtype=np.float64) - np.asarray(mean_p, dtype=np.float64)
    ratio = np.linalg.solve(cov_q, np.asarray(cov_p, dtype=np.float64))
    excess = np.trace(ratio) - len(cov_q) - np.linalg.slogdet(ratio)[1]
    return float(0.5 * (excess + shift @ np.linalg.solve(cov_q, shift)))


def optimal_scales(
    target_std: float | Sequence[float],
    transport_weight: float,
    omega: Omega,
    sigma_quantile: SigmaQuantile,
    nodes: int = NODES,
) -> np.ndarray:
    """Scales r* [d] of the optimal generator G(x) = r* x (per axis) for target N(0, diag(target_std^2)).

    Each axis minimises 1/2 E[omega (rho - 1 - ln rho)] + transport_weight (r - 1)^2 with
    rho = (r^2 + sigma^2) / (s^2 + sigma^2). A float ``target_std`` counts as one axis. At transport weight 0
    the result is ``target_std``; above, r* lies between 1 and s and tends to 1 as the weight grows.
    Raises InputError for a target_std that is not positive and for a negative weight.
    """
    stds = np.atleast_1d(np.asarray(target_std, dtype=np.float64))
    if stds.ndim != 1 or not (stds > 0).all():
        raise InputError(f"target_std {target_std} is not positive: give one standard deviation per axis")
    if not transport_weight >= 0:
        raise InputError(f"transport_weight {transport_weight} is not a weight: give 0 or more")
    sigma, weights = sigma_nodes(omega, sigma_quantile, nodes)
    return np.array([_optimal_scale(std, transport_weight, sigma**2, weights) for std in stds])


def _optimal_scale(std: float, transport_weight: float, variance: np.ndarray, weights: np.ndarray) -> float:
    if transport_weight == 0 or std == 1:
        return float(std)

    def slope(r: float) -> float:
        pull = weights / ((std**2 + variance) * (r**2 + variance))
        return r * (r**2 - std**2) * pull.sum() + 2 * transport_weight * (r - 1)

    # The ratio of the two terms is monotone between 1 and s for every sigma: the root there is the only one.
    brentq = require("scipy.optimize", "eval").brentq
    return brentq(slope, min(1.0, std), max(1.0, std), xtol=1e-14, rtol=1e-14)


def loss(
    r: float,
    alpha_degrees: float,
    target_std: float,
    transport_weight: float,
    omega: Omega,
    sigma_quantile: SigmaQuantile,
    nodes: int = NODES,
) -> float:
    """The RDMD loss in two dimensions of G = r R(alpha) for target N(0, target_std^2 I).

    L = E[omega (rho - 1 - ln rho)] + 2 lambda (1 + r^2 - 2 r cos alpha): without a transport weight every
    rotation of r = target_std is optimal, with one only alpha = 0.
    """
    sigma, weights = sigma_nodes(omega, sigma_quantile, nodes)
    rho = (r**2 + sigma**2) / (target_std**2 + sigma**2)
    transport_cost = 2 * (1 + r**2 - 2 * r * np.cos(np.deg2rad(alpha_degrees)))
    return float(weights @ (rho - 1 - np.log(rho)) + transport_weight * transport_cost)


def linear_loss(
    A,
    target_cov,
    transport_weight: float,
    omega: Omega,
    sigma_quantile: SigmaQuantile,
    nodes: int = NODES,
) -> float:
    """The RDMD loss of G(x) = A x, A [d, d], for target N(0, target_cov), target_cov [d, d]."""
    A, target_cov = fp64_rows(A, "A"), fp64_rows(target_cov, "target_cov")
    eye = np.eye(len(A))
    sigma, weights = sigma_nodes(omega, sigma_quantile, nodes)
    noise = sigma[:, None, None] ** 2 * eye
    ratio = np.linalg.solve(target_cov + noise, A @ A.T + noise)
    excess = np.trace(ratio, axis1=1, axis2=2) - len(A) - np.linalg.slogdet(ratio)[1]
    return float(0.5 * weights @ excess + transport_weight * np.sum((A - eye) ** 2))


def scale_and_rotation(A) -> tuple[float, float]:
    """(r, alpha in degrees) of the r R(alpha) nearest to the 2x2 matrix A in Frobenius norm."""
    A = fp64_rows(A, "A")
    if A.shape != (2, 2):
        raise InputError(f"A has shape {list(A.shape)}: a scale and rotation is fitted to a 2x2 matrix")
    cosine, sine = (A[0, 0] + A[1, 1]) / 2, (A[1, 0] - A[0, 1]) / 2
    return float(np.hypot(cosine, sine)), float(np.rad2deg(np.arctan2(sine, cosine)))


def fit_linear_map(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares (A [e, d], b [e]) with y = A x + b, for samples x [n, d] and y [n, e]."""
    x, y = fp64_rows(x, "x"), fp64_rows(y, "y")
    if len(x) != len(y):
        raise InputError(f"x has {len(x)} samples and y {len(y)}: give pairs")
    solution = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    return solution[:-1].T, solution[-1]
