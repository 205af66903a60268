"""Gradient of the RDMD objective with respect to the generator's output (arXiv 2406.14762, Algorithm 1).

    dL/dy = (g + λ ∂c(x, y)/∂y) / B
    g     = ω (α²/σ²) (D_fake(y_t) - D_real(y_t))

Teacher and fake score share one coefficient table, so that c_skip y_t cancels and
D_fake - D_real = c_out (F_fake - F_real). With ω α²/σ² c_out folded into one number per sample, the table's row
``score_scale``, g = score_scale (F_fake - F_real) for ω = 1 and ω = σ̃².

The ``dmd`` weighting (DMD, arXiv 2311.18828, Equation 8; DMD2, arXiv 2405.14867) divides by mean |y - D_real| over a
sample's elements. Since y - D_real = c_out (F* - F_real) with F* of coefficients.py, it is
g = sign(c_out) (F_fake - F_real) / mean |F* - F_real|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .coefficients import Coefficients
from .noise_forward import CounterNoise

WEIGHTINGS = ("uniform", "sigma2", "dmd")
COSTS = ("squared_l2", "l1", "pseudo_huber")

# A sample that the teacher restores exactly would divide by zero; at this floor its gradient is merely large.
NORMALIZER_FLOOR = 1e-6


class GradientStatistics(NamedTuple):
    """Per-sample sums for telemetry, left on the device: float32 [N] each."""

    score_gradient_square: torch.Tensor  # ‖g‖²
    transport_cost: torch.Tensor  # c(x, y)


def elementwise_cost(displacement: torch.Tensor, cost: str, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cost of each element of y - x, and its derivative with respect to y.

    squared_l2: d²; l1: |d| (derivative 0 at 0); pseudo_huber: δ² (√(1 + (d/δ)²) - 1), d in data units.
    """
    if cost == "squared_l2":
        return displacement.square(), 2 * displacement
    if cost == "l1":
        return displacement.abs(), displacement.sign()
    if cost == "pseudo_huber":
        root = torch.sqrt(1 + (displacement / delta).square())
        return delta**2 * (root - 1), displacement / root
    raise ValueError(f"transport cost {cost!r}: one of {', '.join(COSTS)}")


def rdmd_gradient(
    f_real: torch.Tensor,
    f_fake: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    noise: CounterNoise,
    table: Coefficients,
    transport_weight: float,
    weighting: str = "dmd",
    cost: str = "squared_l2",
    delta: float = 0.1,
) -> tuple[torch.Tensor, GradientStatistics]:
    """dL/dy of one batch, averaged over its N samples.

    Args:
        f_real, f_fake: raw outputs of teacher and fake score at y_t, [N, ...], any floating dtype.
        y, x: generator's outputs and the sources they came from, [N, ...], data units.
        noise: the noise of y_t; read by ``dmd`` only.
        table: coefficients of the N samples.
        transport_weight: λ.
        weighting: one of ``WEIGHTINGS``.
        cost: one of ``COSTS``.
        delta: scale of the pseudo-Huber cost in data units.

    Returns:
        (gradient float32 [N, ...], statistics).
    """
    f_real, clean = f_real.float(), y.float()
    difference = f_fake.float() - f_real
    if weighting == "dmd":
        target = table.row("target_clean", y) * clean + table.row("target_noise", y) * noise.values(y)
        residual = (target - f_real).abs().flatten(1).mean(1).clamp_min(NORMALIZER_FLOOR)
        scale = table.row("c_out").sign() / residual
    elif weighting in WEIGHTINGS:
        scale = table.row("score_scale")
    else:
        raise ValueError(f"weighting {weighting!r}: one of {', '.join(WEIGHTINGS)}")
    score_gradient = difference * scale.view(-1, *(1,) * (y.ndim - 1))
    cost_value, cost_gradient = elementwise_cost(clean - x.float(), cost, delta)
    statistics = GradientStatistics(score_gradient.square().flatten(1).sum(1), cost_value.flatten(1).sum(1))
    return (score_gradient + transport_weight * cost_gradient) / y.shape[0], statistics
