"""2-D toy distributions, each an exact Gaussian mixture.

A mixture Σ_k w_k N(m_k, C_k) under noise of standard deviation sigma is Σ_k w_k N(m_k, C_k + sigma² I), so
the score and the denoiser of every toy are known exactly at every noise level. A curve is a mixture of narrow
Gaussians spaced by at most their own standard deviation, too close for beads to show: along a straight line
the density ripples by 2 exp(-2 pi²) = 5e-9 of itself (Poisson summation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, model_validator

from rdmd_fast.options import Options
from rdmd_fast.randomness import Philox, Stream

MAX_COMPONENTS = 4096

# Published figures: the ring of radius 5 is that of Tong et al. (arXiv 2302.00482), with standard deviation
# 0.5 for their 0.56; the curves are scikit-learn's swiss roll, moons and circles (factor 0.5) at like size.
DEFAULT_STD = {"gaussian": 1.0, "8gaussians": 0.5, "swiss_roll": 0.2, "two_moons": 0.2, "circles": 0.2}
DEFAULT_SCALE = {"8gaussians": 5.0, "swiss_roll": 5.0, "two_moons": 3.0, "circles": 4.0}


class ToyDistribution(Options):
    """A 2-D Gaussian mixture. Lengths are in data units; the mean of the distribution is exactly ``mean``."""

    toy: Literal["gaussian", "8gaussians", "swiss_roll", "two_moons", "circles"] = Field(
        description="a Gaussian, 8 Gaussians on a ring, a spiral, two half circles or two concentric circles"
    )
    std: PositiveFloat | Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] | None = Field(
        None,
        description="standard deviation of each component, data units; gaussian takes one per axis too "
        "(defaults: gaussian 1, 8gaussians 0.5, curves 0.2)",
    )
    mean: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.0, 0.0), description="mean of the distribution, data units"
    )
    rotation: float = Field(0.0, description="degrees, counter-clockwise, of the whole distribution about its mean")
    scale: PositiveFloat | None = Field(
        None,
        description="size of the figure, data units: radius of the ring (5), of the spiral's outer end (5), "
        "of a moon (3), of the outer circle (4); gaussian has none",
    )

    @model_validator(mode="after")
    def _check(self) -> ToyDistribution:
        if self.toy == "gaussian":
            if self.scale is not None:
                raise ValueError("toy gaussian has no scale: set std instead")
        elif isinstance(self.std, tuple):
            raise ValueError(f"toy {self.toy} takes one std, not one per axis: give a single number")
        if not all(map(math.isfinite, (*self.mean, self.rotation, *self._stds(), self._scale()))):
            raise ValueError("mean, rotation, std and scale must be finite")
        _mixture(self)
        return self

    def _stds(self) -> tuple[float, float]:
        std = DEFAULT_STD[self.toy] if self.std is None else self.std
        return std if isinstance(std, tuple) else (std, std)

    def _scale(self) -> float:
        return DEFAULT_SCALE.get(self.toy, 1.0) if self.scale is None else self.scale

    def mixture(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mixture itself, float64: means [K, 2], covariances [K, 2, 2] and weights [K] of sum 1."""
        means, spread, weights = _mixture(self)
        covariances = np.broadcast_to(spread @ spread.T, (len(weights), 2, 2))
        return torch.tensor(means), torch.tensor(covariances), torch.tensor(weights)

    def sample(self, philox: Philox, stream: Stream, positions: torch.Tensor) -> torch.Tensor:
        """Draw one point for each position: a pure function of (seed, stream, position).

        Args:
            philox: the run's counter-based generator.
            stream: stream of the points.
            positions: int64 [N].

        Returns:
            float32 [N, 2] on the CPU.
        """
        means, spread, weights = _mixture(self)
        # A counter has four words: the first two pick the component, the others make the point's normals.
        noise = philox.normal(stream, positions, (4,))[:, 2:].double().numpy()
        points = means[0]
        if len(weights) > 1:
            pick = philox.uniform(stream, positions, 1)[:, 0].numpy()
            component = np.searchsorted(np.cumsum(weights), pick, side="right")
            points = means.take(np.minimum(component, len(weights) - 1), axis=0)
        # Written out elementwise in fp64: a matrix product may sum in another order for another batch size.
        shift = [spread[i, 0] * noise[:, 0] + spread[i, 1] * noise[:, 1] for i in range(2)]
        return torch.from_numpy((points + np.stack(shift, axis=1)).astype(np.float32))


@lru_cache(maxsize=64)
def _mixture(distribution: ToyDistribution) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(means [K, 2], spread [2, 2], weights [K]), float64; each covariance is spread @ spread.T."""
    scale, stds = distribution._scale(), distribution._stds()
    figure, weights = _FIGURES[distribution.toy](scale, stds[0])
    figure = figure - weights @ figure
    angle = math.radians(distribution.rotation)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    means = figure @ rotation.T + np.array(distribution.mean)
    return means, rotation * np.array(stds), weights


def _count(length: float, std: float) -> int:
    """Components that cover a curve of this length at spacing std or less."""
    count = math.ceil(length / std)
    if count > MAX_COMPONENTS:
        raise ValueError(
            f"std {std:g} needs {count} components to cover this curve: raise std to "
            f"{length / MAX_COMPONENTS:.2g} or more, or lower scale"
        )
    return count


def _polar(radius: float | np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _equal(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return means, np.full(len(means), 1 / len(means))


def _gaussian(scale: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    return _equal(np.zeros((1, 2)))


def _eight_gaussians(scale: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    return _equal(_polar(scale, np.arange(8) * math.pi / 4))


def _swiss_roll(scale: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """t (cos t, sin t) for t uniform in [1.5 pi, 4.5 pi]; components are equally spaced along the curve."""
    start, end = 1.5 * math.pi, 4.5 * math.pi

    def length(t):  # of the spiral r = t from its origin
        return (t * np.sqrt(1 + t * t) + np.arcsinh(t)) / 2

    unit = scale / end
    count = _count(unit * (length(end) - length(start)), std)
    fine = np.linspace(start, end, 20 * count + 1)
    # Component k stands in the middle of arc k, and its weight is the share of t that the arc takes.
    marks = np.interp(np.linspace(length(start), length(end), 2 * count + 1), length(fine), fine)
    middles, edges = marks[1::2], marks[::2]
    return unit * _polar(middles, middles), np.diff(edges) / (end - start)


def _two_moons(scale: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    count = _count(math.pi * scale, std)
    angle = math.pi * (np.arange(count) + 0.5) / count
    upper = _polar(scale, angle)
    lower = np.array([scale, scale / 2]) - upper
    return _equal(np.concatenate([upper, lower]))


def _circles(scale: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Outer and inner circle (half the radius) of equal mass."""
    rings, weights = [], []
    for radius in (scale, scale / 2):
        count = _count(2 * math.pi * radius, std)
        rings.append(_polar(radius, 2 * math.pi * np.arange(count) / count))
        weights.append(np.full(count, 0.5 / count))
    return np.concatenate(rings), np.concatenate(weights)


_FIGURES: dict[str, Callable[[float, float], tuple[np.ndarray, np.ndarray]]] = {
    "gaussian": _gaussian,
    "8gaussians": _eight_gaussians,
    "swiss_roll": _swiss_roll,
    "two_moons": _two_moons,
    "circles": _circles,
}
