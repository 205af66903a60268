"""Forward process, parameterisations, noise-level distributions, weightings and samplers.

Everything here is a function of σ̃ = σ/α, the noise-to-signal ratio: one schedule fits variance-exploding,
variance-preserving and flow-matching processes alike. Host code works in float64 and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.noise_forward import CounterNoise
from rdmd_fast.options import Options
from rdmd_fast.randomness import DrawnAhead, Philox, Stream


class DiffusionOptions(Options):
    """How a network's output is read; teacher and fake score share it."""

    parameterization: Literal["edm", "epsilon", "v", "x0", "flow"] = Field(
        "edm",
        description="what the network predicts: edm (EDM, Table 1), epsilon, v or x0 (the clean sample) on a "
        "variance-preserving process, flow (velocity of the straight path x_t = (1-t) x + t ε)",
    )
    sigma_data: float = Field(
        0.5,
        ge=1e-6,
        le=1e6,
        description="standard deviation of the data that edm's scaling assumes, data units (EDM: 0.5)",
    )


def _scalings(s: torch.Tensor, options: DiffusionOptions) -> tuple[torch.Tensor, ...]:
    """(alpha, sigma, c_skip, c_out, c_in) at noise levels σ̃, float64 [N]."""
    one = torch.ones_like(s)
    if options.parameterization == "edm":
        scale = (s**2 + options.sigma_data**2).sqrt()
        return one, s, (options.sigma_data / scale) ** 2, s * options.sigma_data / scale, 1 / scale
    if options.parameterization == "flow":
        alpha = 1 / (1 + s)
        sigma = s * alpha
        return alpha, sigma, one, -sigma, one
    alpha = 1 / (1 + s**2).sqrt()
    sigma = s * alpha
    if options.parameterization == "epsilon":
        return alpha, sigma, 1 / alpha, -sigma / alpha, one
    if options.parameterization == "x0":
        return alpha, sigma, torch.zeros_like(s), one, one
    return alpha, sigma, alpha, -sigma, one


def coefficients(
    sigma_tilde: torch.Tensor, options: DiffusionOptions, weighting: str = "uniform", device="cpu"
) -> Coefficients:
    """Coefficient table of N samples.

    Args:
        sigma_tilde: float64 [N] on the CPU, σ̃ > 0 in data units.
        options: the parameterisation.
        weighting: ω of the table's score_scale row; ``dmd`` does not read it.
        device: where the table is needed.

    c_noise is ln(σ̃)/4 for every parameterisation (EDM, Table 1); an imported network with a conditioning of its
    own converts from that inside its forward pass.
    """
    s = sigma_tilde.double()
    return Coefficients.from_float64(*_scalings(s, options), s.log() / 4, omega(s, weighting), device)


def omega(sigma_tilde: torch.Tensor, weighting: str) -> torch.Tensor:
    """ω(σ̃) of the objective, float64 [N]. ``dmd`` has none: it normalises by each sample's own residual."""
    if weighting == "sigma2":
        return sigma_tilde.double() ** 2
    return torch.ones_like(sigma_tilde, dtype=torch.float64)


class LogNormalSigma(Options):
    """ln σ̃ ~ N(mean, std²): EDM's training distribution."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = Field(-1.2, ge=-20, le=20, description="mean of ln σ̃ (EDM)")
    std: float = Field(1.2, gt=0, le=10, description="standard deviation of ln σ̃ (EDM)")

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))


class KarrasUniformSigma(Options):
    """Uniform over the middle of EDM's sampling levels, as DMD and DMD2 draw them."""

    kind: Literal["karras_uniform"] = "karras_uniform"
    sigma_min: float = Field(0.002, ge=1e-6, le=1e6, description="lowest level, data units (EDM)")
    sigma_max: float = Field(80.0, ge=1e-6, le=1e6, description="highest level, data units (EDM)")
    rho: float = Field(7.0, ge=0.1, le=100, description="curvature of the levels (EDM)")
    low: float = Field(0.02, ge=0, lt=1, description="lowest share of the levels that is drawn (DMD2)")
    high: float = Field(0.98, gt=0, le=1, description="highest share of the levels that is drawn (DMD2)")
    levels: int = Field(1000, ge=2, le=10**6, description="number of levels (DMD2)")

    @model_validator(mode="after")
    def _ordered(self):
        if self.sigma_min > self.sigma_max or self.low >= self.high:
            raise ValueError("sigma_min must not exceed sigma_max, and low must be below high")
        return self

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        first, last = round(self.low * self.levels), round(self.high * self.levels)
        level = first + torch.floor(u * (last - first))
        share = level / (self.levels - 1)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + share * (high - low)) ** self.rho


class LogUniformSigma(Options):
    """ln σ̃ uniform between two bounds."""

    kind: Literal["log_uniform"] = "log_uniform"
    sigma_min: float = Field(0.01, ge=1e-6, le=1e6, description="lower bound of σ̃, data units (ours)")
    sigma_max: float = Field(10.0, ge=1e-6, le=1e6, description="upper bound of σ̃, data units (ours)")

    @model_validator(mode="after")
    def _ordered(self):
        if self.sigma_min > self.sigma_max:
            raise ValueError("sigma_min must not exceed sigma_max")
        return self

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.exp(low + u * (high - low))


def _with_default_kind(value):
    # `rdmd.sigma.mean=-1` alone is meant for the default kind, as with any other option.
    return {"kind": "lognormal", **value} if isinstance(value, dict) else value


SigmaOptions = Annotated[
    LogNormalSigma | KarrasUniformSigma | LogUniformSigma,
    Field(discriminator="kind"),
    BeforeValidator(_with_default_kind),
]
"""A distribution of σ̃. ``quantile(u)`` maps float64 [N] uniform in (0, 1) to σ̃, float64 [N], in data units."""


def denoise(
    network: Callable[..., torch.Tensor],
    state: torch.Tensor,
    sigma_tilde: torch.Tensor,
    options: DiffusionOptions,
    class_labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """D at noise level σ̃ of samples in variance-exploding units (y + σ̃ ε), whatever the network's own process.

    Args:
        network: raw network, ``network(input, c_noise, class_labels)``.
        state: [N, ...] on the network's device, data units.
        sigma_tilde: float64 [N] or scalar on the CPU.
        dtype: dtype the network computes in.

    Returns:
        Denoised batch, float32 [N, ...].
    """
    levels = torch.as_tensor(sigma_tilde, dtype=torch.float64).expand(state.shape[0])
    table = coefficients(levels, options, device=state.device)
    own_state = table.row("alpha", state) * state.float()
    output = network((table.row("c_in", state) * own_state).to(dtype), table.c_noise, class_labels)
    return table.row("c_skip", state) * own_state + table.row("c_out", state) * output.float()


@dataclass(frozen=True)
class Reading:
    """How a raw network is read as a generator: G(x) = skip x + scale F(input_scale x; c_noise)."""

    skip: float
    input_scale: float
    scale: float
    c_noise: float

    @classmethod
    def of(cls, kind: str, diffusion: DiffusionOptions, generator_sigma: float) -> Reading:
        """``teacher``: the denoiser at σ̃ = generator_sigma; ``mlp``: residual x + F(x); ``affine``: F(x) itself."""
        if kind == "mlp":
            return cls(1.0, 1.0, 1.0, 0.0)
        if kind == "affine":
            return cls(0.0, 1.0, 1.0, 0.0)
        table = coefficients(torch.tensor([generator_sigma], dtype=torch.float64), diffusion)
        alpha, c_skip, c_out, c_in, c_noise = (
            float(table.row(name)) for name in ("alpha", "c_skip", "c_out", "c_in", "c_noise")
        )
        return cls(c_skip * alpha, c_in * alpha, c_out, c_noise)

    def __call__(self, network: Callable, x: torch.Tensor, class_labels=None, dtype=torch.float32) -> torch.Tensor:
        """Translate x [N, ...] in data units; float32 out, differentiable in the network."""
        c_noise = torch.full((x.shape[0],), self.c_noise, device=x.device)
        output = network((self.input_scale * x).to(dtype), c_noise, class_labels)
        return torch.add(self.skip * x, output.float(), alpha=self.scale)


class ForwardProcess:
    """Draws t and ε of F(x, t) for given sample positions, many iterations in one call where they are small.

    The draws are a pure function of (seed, streams, position): rank, micro-batch and block leave no trace.
    """

    # Normals at once, eight iterations of a toy; drawing holds thirty times that for a moment. Two iterations may have
    # four times as many, as of 8×8 images, since launches are a good part of what drawing them takes.
    BLOCK_ELEMENTS, BLOCK_ITERATIONS = 2**13, 512

    def __init__(
        self,
        philox: Philox,
        sigma: Options,
        diffusion: DiffusionOptions,
        weighting: str,
        streams: tuple[Stream, Stream],
        sample_shape: tuple[int, ...],
        stride: int,
        device: torch.device,
    ):
        """
        Args:
            sigma: distribution of σ̃.
            weighting: ω of the coefficient table.
            streams: (noise level, noise).
            stride: positions from one draw to the next one in the same slot.
        """
        self.philox, self.sigma, self.diffusion, self.weighting = philox, sigma, diffusion, weighting
        self.streams, self.sample_shape, self.stride, self.device = streams, sample_shape, stride, device
        self._ahead = DrawnAhead(stride, self._draw_block)

    def draw(self, positions: torch.Tensor, slot: int = 0) -> tuple[Coefficients, CounterNoise]:
        """Coefficients at random noise levels, and the noise, for the samples at ``positions`` (int64 [n], a range).

        ``slot`` tells the micro-batches of one update apart.
        """
        return self._ahead.draw(positions, slot)

    def _draw_block(self, first: int, count: int) -> list[tuple[Coefficients, CounterNoise]]:
        on_cpu = self.device.type == "cpu"
        # On a GPU the kernels draw the noise themselves; tables and positions go there many iterations at a time.
        each = count * math.prod(self.sample_shape)
        fitting = max(1, self.BLOCK_ELEMENTS // each, min(2, 4 * self.BLOCK_ELEMENTS // each))
        iterations = min(self.BLOCK_ITERATIONS, fitting) if on_cpu else 64
        starts = first + self.stride * torch.arange(iterations, dtype=torch.int64)
        positions = starts[:, None] + torch.arange(count)
        levels = self.sigma.quantile(self.philox.uniform(self.streams[0], positions.flatten())[:, 0])
        table = coefficients(levels, self.diffusion, self.weighting, self.device)
        tables = table.rows.view(-1, iterations, count).transpose(0, 1).contiguous()
        if on_cpu:
            drawn = self.philox.normal(self.streams[1], positions.flatten(), self.sample_shape)
            normals = list(drawn.unflatten(0, (iterations, count)))
        else:
            positions, normals = positions.pin_memory().to(self.device, non_blocking=True), [None] * iterations
        stream = int(self.streams[1])
        return [
            (Coefficients(rows), CounterNoise(self.philox.seed, stream, places, noise))
            for rows, places, noise in zip(tables, positions, normals, strict=True)
        ]
