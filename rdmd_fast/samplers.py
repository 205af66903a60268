"""EDM's sampler: noise levels, churn and Heun steps (arXiv 2206.00364, Algorithm 2)."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.randomness import Philox, Stream

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


NoiseOfStep = Callable[[int], torch.Tensor]


def karras_levels(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """EDM's sampling levels (Equation 5), float64 [steps + 1], falling from sigma_max to sigma_min and then 0."""
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat(((high + share * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)))


@dataclass(frozen=True)
class Churn:
    """Fresh noise between the steps of EDM's sampler (arXiv 2206.00364, Algorithm 2); an amount of 0 adds none.

    Attributes:
        amount: S_churn, spread evenly over the steps.
        sigma_min, sigma_max: S_tmin and S_tmax, noise levels between which noise is added, data units.
        noise: S_noise, standard deviation of the fresh noise over what the level asks for.
    """

    amount: float = 0.0
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    noise: float = 1.0

    def factor(self, level: float, steps: int) -> float:
        """1 + γ, by which the noise level is raised ahead of a step."""
        within = self.sigma_min <= level <= self.sigma_max
        return 1 + min(self.amount / steps, math.sqrt(2) - 1) if within else 1.0


def churn_noise(philox: Philox, positions: torch.Tensor, shape: tuple[int, ...], device="cpu") -> NoiseOfStep:
    """Fresh noise of the samples at ``positions``, int64 [N] below 2^32: a function of position and step alone."""
    return lambda step: philox.normal(Stream.SAMPLER_CHURN, (step << 32) + positions, shape, device)


@torch.no_grad()
def heun_sample(
    denoiser: Denoise,
    noise: torch.Tensor,
    levels: torch.Tensor,
    churn: Churn | None = None,
    fresh: NoiseOfStep | None = None,
) -> torch.Tensor:
    """EDM's second-order sampler for the probability-flow ODE dx/dσ̃ = (x - D)/σ̃ (Algorithms 1 and 2).

    Args:
        denoiser: ``denoiser(state, sigma_tilde)`` with σ̃ a float64 scalar tensor; takes and returns [N, ...].
        noise: standard normal [N, ...].
        levels: float64 [steps + 1], falling, the last one 0.
        churn: makes it stochastic; None for the deterministic sampler.
        fresh: with ``churn``, maps the number of a step to standard normals [N, ...].

    Returns:
        Samples float32 [N, ...], data units. Costs 2 steps - 1 evaluations.
    """
    state = noise.double() * levels[0]
    for step, (now, following) in enumerate(itertools.pairwise(levels)):
        factor = churn.factor(float(now), len(levels) - 1) if churn else 1.0
        raised = now * factor
        if factor > 1:
            state = state + (raised**2 - now**2).sqrt() * churn.noise * fresh(step).double()
        state = _heun_step(denoiser, state, raised, following)
    return state.float()


@torch.no_grad()
def heun_solve(denoiser: Denoise, state: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Carry samples along the probability-flow ODE by Heun's rule, to less noise or to more.

    Args:
        denoiser: as ``heun_sample``.
        state: [N, ...] at the noise level levels[0], data units.
        levels: float64 [steps + 1], above 0 but for the last one: falling to denoise, rising to encode.

    Returns:
        float64 [N, ...] at levels[-1]. Costs 2 steps evaluations, one less if the last level is 0.
    """
    state = state.double()
    for now, following in itertools.pairwise(levels):
        state = _heun_step(denoiser, state, now, following)
    return state


def _heun_step(denoiser: Denoise, state: torch.Tensor, now: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    slope = (state - denoiser(state.float(), now).double()) / now
    predicted = state + (following - now) * slope
    if following > 0:
        corrected = (predicted - denoiser(predicted.float(), following).double()) / following
        predicted = state + (following - now) * (slope + corrected) / 2
    return predicted


def sampling_levels(
    steps: int,
    options: DiffusionOptions,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> torch.Tensor:
    """``karras_levels`` for a teacher: EDM's bounds 0.002 and 80 are for data of deviation 0.5 and scale with it."""
    scale = options.sigma_data / 0.5 if options.parameterization == "edm" else 1.0
    low = 0.002 * scale if sigma_min is None else sigma_min
    return karras_levels(steps, low, 80.0 * scale if sigma_max is None else sigma_max, rho)
