"""The loss of G = r R(α) over (r, α): the closed form, Monte Carlo beside it, and where the optimum lies."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.config import Config
from rdmd_fast.diffusion import omega
from rdmd_fast.metrics import closed_forms
from rdmd_fast.metrics.monte_carlo import sample_loss
from rdmd_fast.metrics.tables import mean_and_error
from rdmd_fast.randomness import Philox

EXACT = 1e-12  # rounding of terms that are equal


class SurfaceSize(NamedTuple):
    """How fine the figure is: ``grid`` radii and angles of the drawn surface, ``radii`` and ``angles`` of the Monte
    Carlo points, ``draws`` of (x, ε, σ) in each, ``steps`` of a training and iterations ``every`` which it is drawn.
    """

    grid: tuple[int, int] = (81, 145)
    radii: tuple[float, ...] = tuple(np.linspace(0.25, 2.25, 9).tolist())
    angles: tuple[float, ...] = tuple(range(-135, 181, 45))
    draws: int = 20_000
    starts: tuple[tuple[float, float], ...] = ((0.4, 150.0), (0.6, -80.0), (2.1, -140.0), (2.0, 75.0))
    steps: int = 600
    every: int = 10


def closed_form(config: Config, weight: float, radius, angle) -> float:
    """Compute the loss at G = radius R(angle in degrees), by quadrature over σ."""
    return closed_forms.loss(radius, angle, _target_std(config), weight, *_noise_levels(config))


def compare(config: Config, weights: Sequence[float], size: SurfaceSize) -> list[dict]:
    """Make a row for each (λ, r, α): the closed form, the Monte Carlo estimate and its standard error.

    Each (r, α) has draws of its own, so that its error is independent of the others'; every λ shares them.
    """
    philox, covariance = Philox(config.seed), _target_std(config) ** 2 * torch.eye(2, dtype=torch.float64)
    rows = []
    for radius in size.radii:
        for angle in size.angles:
            turn = np.deg2rad(angle)
            matrix = radius * torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            first = len(rows) // len(weights) * size.draws
            samples = sample_loss(
                matrix, covariance, lambda sigma: omega(sigma, config.rdmd.weighting), config.rdmd.sigma.quantile,
                philox, torch.arange(first, first + size.draws),
            )  # fmt: skip
            for weight in weights:
                exact, (estimate, error) = closed_form(config, weight, radius, angle), samples.estimate(weight)
                row = {"transport_weight": weight, "r": radius, "alpha_degrees": angle, "closed_form": exact}
                row |= {"monte_carlo": estimate, "standard_error": error, "draws": size.draws}
                rows.append(row | {"difference_in_standard_errors": _in_errors(estimate - exact, error)})
    return rows


def _in_errors(difference: float, error: float) -> float | None:
    """Count the errors; None where there is none: at r = s both densities are one function, and each term is 0."""
    if error > EXACT:
        return difference / error
    if abs(difference) > EXACT:
        raise ArithmeticError(f"the Monte Carlo estimate differs by {difference:g} though its terms do not vary")
    return None


def optimum(config: Config, weight: float, rows: list[dict], paths: list[dict]) -> dict:
    """Find the optimum of one λ, how well Monte Carlo agrees, and where the trainings ended."""
    radius = float(closed_forms.optimal_scales(_target_std(config), weight, *_noise_levels(config))[0])
    apart = [row["difference_in_standard_errors"] for row in rows if row["transport_weight"] == weight]
    apart = np.array([difference for difference in apart if difference is not None])
    last = {path["run"]: path for path in paths if path["transport_weight"] == weight}.values()
    # Starts of one seed share every draw: they are one sample of where trainings end.
    seeds = sorted({end["seed"] for end in last})
    mean, error = mean_and_error([np.mean([end["r"] for end in last if end["seed"] == seed]) for seed in seeds])
    return {
        "transport_weight": weight,
        "r": radius,
        "alpha_degrees": None if weight == 0 else 0.0,
        "loss": closed_form(config, weight, radius, 0.0),
        "monte_carlo_points": len(apart),
        "largest_difference": float(np.abs(apart).max()),
        "mean_square_difference": float(np.mean(apart**2)),
        "trainings": len(last),
        "trained_r": mean,
        "trained_r_error": error,
        "trained_largest_alpha": None if weight == 0 else max(abs(end["alpha_degrees"]) for end in last),
    }


def _target_std(config: Config) -> float:
    return float(config.data.target.std)


def _noise_levels(config: Config):
    """Give (ω, quantile of σ) of the run as metrics.closed_forms takes them, on fp64 arrays."""
    return (
        lambda sigma: omega(torch.as_tensor(sigma), config.rdmd.weighting).numpy(),
        lambda u: config.rdmd.sigma.quantile(torch.as_tensor(u)).numpy(),
    )
