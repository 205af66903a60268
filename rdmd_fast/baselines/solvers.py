"""What the baselines share: levels, fresh noise by position, and one step of the reverse process.

All is in variance-exploding form, x_σ = x + σ ε, whatever the teacher's own process: a variance-preserving state is
x_VP = α x_VE with σ = σ_VP/α, so every equation for x_VP divides by α.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from rdmd_fast.baselines.options import LevelOptions
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.samplers import sampling_levels

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Models(NamedTuple):
    """The networks of a translation.

    Attributes:
        target: the target domain's, ``target(state, sigma) -> denoised``: of ``load_denoiser``, or a closed form.
        source: the source domain's, for ddib and cyclediffusion.
        energy: the domain classifier, for egsde with lambda_s above 0 (``energy.load_energy``).
    """

    target: Denoise
    source: Denoise | None = None
    energy: torch.nn.Module | None = None


class Translation(NamedTuple):
    """What ``translate`` returns.

    Attributes:
        outputs: float32 [N, ...], data units.
        evaluations: of diffusion networks, for one sample.
        energy_evaluations: of the energy network, for one sample.
    """

    outputs: torch.Tensor
    evaluations: float
    energy_evaluations: float = 0.0


class Counted:
    """A denoiser that counts its evaluations (of a whole batch, so each is one an image)."""

    def __init__(self, denoiser: Denoise):
        self.denoiser, self.evaluations = denoiser, 0

    def __call__(self, state: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        return self.denoiser(state.float(), level)

    def double(self, state: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return self(state, level).double()


class Noise:
    """Standard normals of some samples, float64 [N, ...]: functions of seed, position and step alone.

    Args:
        positions: int64 [N] below 2^32.
        like: [N, ...], for shape and device.
    """

    def __init__(self, philox: Philox, positions: torch.Tensor, like: torch.Tensor):
        self.philox, self.shape, self.device = philox, tuple(like.shape[1:]), like.device
        self.positions = torch.as_tensor(positions, dtype=torch.int64)
        if self.positions.shape != (len(like),):
            raise ValueError(f"positions of shape {list(self.positions.shape)} for {len(like)} samples")

    def start(self) -> torch.Tensor:
        return self._draw(Stream.BASELINE_START, 0)

    def step(self, number: int) -> torch.Tensor:
        return self._draw(Stream.BASELINE_STEP, number)

    def reference(self, number: int) -> torch.Tensor:
        """For a noised source beside the chain (ILVR, EGSDE)."""
        return self._draw(Stream.BASELINE_REFERENCE, number)

    def _draw(self, stream: Stream, number: int) -> torch.Tensor:
        return self.philox.normal(stream, (number << 32) + self.positions, self.shape, self.device).double()


def level_schedule(options: LevelOptions, denoiser: Denoise, sigma0: float | None) -> torch.Tensor:
    """float64 [steps + 1] from ``sigma0`` (unset: EDM's highest for this denoiser) to sigma_min, then 0.

    Raises:
        InputError: sigma0 does not lie above sigma_min.
    """
    config = getattr(denoiser, "config", None)
    diffusion = config.diffusion if config else DiffusionOptions()
    levels = sampling_levels(options.steps, diffusion, options.sigma_min, sigma0, options.rho)
    if options.steps > 1 and not levels[0] > levels[-2]:
        raise InputError(
            f"{options.method}: sigma0 {float(levels[0]):g} must be above sigma_min {float(levels[-2]):g}, "
            "raise the one or lower the other"
        )
    return levels


def reverse_mean(state: torch.Tensor, denoised: torch.Tensor, now, following) -> torch.Tensor:
    """state + (σ_t² - σ_s²) score = D + (σ_s²/σ_t²)(state - D), from level t (``now``) to s: the mean of Euler-Maruyama
    for the reverse SDE (SDEdit, Algorithm 1) and of the posterior q(x_s | x_t, D) (DDPM) alike."""
    return denoised + (following / now) ** 2 * (state - denoised)


def reverse_deviation(now, following, solver: str):
    """Standard deviation of a step: sqrt(σ_t² - σ_s²) of Euler-Maruyama (``sde``); the posterior's (``ancestral``) is
    σ_s/σ_t times that, and 0 in the last step."""
    deviation = (now**2 - following**2).sqrt()
    return deviation * (following / now) if solver == "ancestral" else deviation


def reverse_sde(
    target: Counted,
    state: torch.Tensor,
    levels: torch.Tensor,
    solver: str,
    noise: Noise,
    energy_gradient: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Carry ``state``, float64 at levels[0], along the reverse SDE to levels[-1].

    ``energy_gradient(step, state, level)`` is subtracted from the score: EGSDE's term.
    """
    for step, (now, following) in enumerate(itertools.pairwise(levels)):
        mean = reverse_mean(state, target.double(state, now), now, following)
        if energy_gradient:
            mean = mean - (now**2 - following**2) * energy_gradient(step, state, now)
        state = mean + reverse_deviation(now, following, solver) * noise.step(step)
    return state


def low_pass(x: torch.Tensor, factor: int) -> torch.Tensor:
    """φ_N: means of blocks of N × N pixels, each repeated over its block; [N, C, H, W] to the same shape.

    Linear and an orthogonal projection, φ(φ(x)) = φ(x), as ILVR's derivation asks; its code filters bicubically, which
    is idempotent only nearly.

    Raises:
        InputError: no images, or sides that N does not divide.
    """
    if x.ndim != 4 or x.shape[2] % factor or x.shape[3] % factor:
        raise InputError(
            f"factor {factor}: its low-pass takes images whose sides it divides, these samples are {list(x.shape[1:])}"
        )
    means = torch.nn.functional.avg_pool2d(x, factor)
    return means.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
