"""λ, the weight of the transport cost: one number, or a range over which one generator is trained.

With a range every sample has a λ of its own, and generator and fake score are told it as their ``condition``: ln λ,
mapped to [-1, 1] over the range. For each λ of the range G(x, λ) then has the paper's objective with that λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Discriminator, Field, Tag, model_validator

from rdmd_fast.errors import InputError
from rdmd_fast.options import Options
from rdmd_fast.randomness import DrawnAhead, Philox, Stream


class LogUniformWeight(Options):
    """ln λ uniform between two bounds."""

    log_uniform: list[Annotated[float, Field(ge=1e-6, le=1e6)]] = Field(
        min_length=2,
        max_length=2,
        description="[low, high]: one generator for every λ between them, chosen when it is used (ours)",
    )

    @model_validator(mode="after")
    def _ordered(self):
        if self.log_uniform[0] >= self.log_uniform[1]:
            raise ValueError("give [low, high] with low below high")
        return self


TransportWeight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[LogUniformWeight, Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, dict | LogUniformWeight) else "number"),
]


class WeightRange(NamedTuple):
    """The λ that a conditioned generator takes."""

    low: float
    high: float

    @classmethod
    def of(cls, weight: float | LogUniformWeight) -> WeightRange | None:
        """The range of ``rdmd.transport_weight``; None if that is a number."""
        return cls(*weight.log_uniform) if isinstance(weight, LogUniformWeight) else None

    @property
    def middle(self) -> float:
        """The geometric mean, whose condition is 0."""
        return math.sqrt(self.low * self.high)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """u in (0, 1), float64 -> λ, float64."""
        return torch.exp(math.log(self.low) + u * math.log(self.high / self.low))

    def condition(self, weight: float | torch.Tensor, count: int) -> torch.Tensor:
        """λ, a number or [N], as the networks are told it: float32 [N] on the CPU.

        Raises:
            InputError: a λ outside the range, or not one for each of the ``count`` samples.
        """
        weights = torch.as_tensor(weight, dtype=torch.float64).cpu()
        if weights.ndim and weights.shape != (count,):
            raise InputError(f"transport_weight: shape {list(weights.shape)}, give a number or [{count}]")
        # A bound that went through float32 or text is still the bound.
        if not ((weights >= self.low * (1 - 1e-6)) & (weights <= self.high * (1 + 1e-6))).all():
            outside = weights if weights.ndim == 0 else weights[(weights < self.low) | ~(weights <= self.high)][0]
            raise InputError(
                f"transport_weight {float(outside):g}: the generator was trained for {self.low:g} to {self.high:g}, "
                "choose one between them"
            )
        return self.to_condition(weights).expand(count)

    def to_condition(self, weights: torch.Tensor) -> torch.Tensor:
        """Map ln λ to [-1, 1], float32; λ is cut to the range."""
        share = (weights.double() / self.low).log() / math.log(self.high / self.low)
        return (2 * share - 1).clamp(-1, 1).float()


class BatchWeight(NamedTuple):
    """λ of a batch.

    Attributes:
        value: a number, or float32 [N] on the device.
        inputs: what the networks are given for it, by keyword: nothing, or ``condition``, float32 [N].
    """

    value: float | torch.Tensor
    inputs: dict[str, torch.Tensor]


class TransportWeights:
    """λ of the samples at given source positions: a function of seed and position alone."""

    BLOCK_ITERATIONS = 64

    def __init__(self, weight: float | LogUniformWeight, philox: Philox, stride: int, device: torch.device):
        """``stride``: positions from one batch to the next one."""
        self.weight, self.range, self.stride, self.device = weight, WeightRange.of(weight), stride, device
        self.philox = philox
        self._ahead = DrawnAhead(stride, self._draw_block)

    def draw(self, positions: torch.Tensor, slot: int = 0) -> BatchWeight:
        """λ for the samples at ``positions`` (int64 [n], a range); ``slot`` tells micro-batches of an update apart."""
        return BatchWeight(self.weight, {}) if self.range is None else self._ahead.draw(positions, slot)

    def _draw_block(self, first: int, count: int) -> list[BatchWeight]:
        starts = first + self.stride * torch.arange(self.BLOCK_ITERATIONS, dtype=torch.int64)
        u = golden_sequence(self.philox, Stream.TRANSPORT_WEIGHT, (starts[:, None] + torch.arange(count)).flatten())
        rows = torch.stack([self.range.quantile(u), 2 * u - 1]).float().unflatten(1, (len(starts), count))
        if self.device.type == "cuda":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        return [BatchWeight(values, {"condition": condition}) for values, condition in zip(*rows, strict=True)]


def golden_sequence(philox: Philox, stream: Stream, positions: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float64 [N]: multiples of the golden ratio modulo 1 after a random shift.

    Neighbours in any stretch of positions cover the interval evenly (a Kronecker sequence), so that every batch has
    large and small values alike, however it is split. Of 32 bits: they repeat after 2^32 positions.
    """
    shift = (philox.uniform(stream, [0])[0, 0] * 2**32).long()
    words = ((positions & 0xFFFFFFFF) * 0x9E3779B9 + shift) & 0xFFFFFFFF  # wraps around; its low bits do not care
    return (words.double() + 0.5) / 2**32


def with_condition(network: Callable, inputs: dict[str, torch.Tensor]) -> Callable:
    """``network`` with further inputs given to every call."""
    return (lambda *arguments: network(*arguments, **inputs)) if inputs else network


def bounds_of(weight: float | LogUniformWeight) -> list[float] | None:
    """Give [low, high] of ``rdmd.transport_weight``, as an export keeps it; None where that is a number."""
    bounds = WeightRange.of(weight)
    return list(bounds) if bounds else None


def reported_weights(bounds: WeightRange | None) -> dict[str, float | None]:
    """λ at which a conditioned generator is looked at, by the suffix of its metrics; its middle has none."""
    if bounds is None:
        return {"": None}
    return {"": bounds.middle, f"_at_{bounds.low:g}": bounds.low, f"_at_{bounds.high:g}": bounds.high}


def output_name(weight: float | None) -> str:
    """What a picture calls the generator's output."""
    return "G(x)" if weight is None else f"G(x), λ = {weight:.3g}"
