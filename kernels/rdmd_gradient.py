"""Gradient of the RDMD objective with respect to the generator's output (arXiv 2406.14762, Algorithm 1).

    dL/dy = (g + λ ∂c(x, y)/∂y) / B
    g     = ω (α²/σ²) (D_fake(y_t) - D_real(y_t))

Teacher and fake score share one coefficient table, so that c_skip y_t cancels and
D_fake - D_real = c_out (F_fake - F_real). With ω α²/σ² c_out folded into one number per sample, the table's row
``score_scale``, g = score_scale (F_fake - F_real) for ω = 1 and ω = σ̃².

The ``dmd`` weighting (DMD, arXiv 2311.18828, Equation 8; DMD2, arXiv 2405.14867) divides by mean |y - D_real| over a
sample's elements. Since y - D_real = c_out (F* - F_real) with F* of coefficients.py, it is
g = sign(c_out) (F_fake - F_real) / mean |F* - F_real|.

For a generator read as y = skip x + scale F_G it goes on to dL/dF_G = scale dL/dy in F_G's dtype, and reads F_G instead
of y.

Launches: one, and for ``dmd`` one before it that sums |F* - F_real| by chunks of 1,024 elements. Sums by chunk are
added in a fixed order, without atomics, so they depend neither on the batch nor on the run.
λ is a number, or one of each sample, read with the table.
Memory: reads F_real, F_fake, x and F_G, writes the gradient; ``dmd`` reads F_real and F_G twice, or y instead of F_G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import jit, tl, triton
from rdmd_fast.kernels.coefficients import C_OUT, SCORE_SCALE, TARGET_CLEAN, TARGET_NOISE, Coefficients, Reading
from rdmd_fast.kernels.noise_forward import (
    CounterNoise,
    add_chunks,
    check_shapes,
    chunk_count,
    chunk_sums,
    empty_in_element_order,
    generator_output,
    in_element_order,
    launch,
    load_clean,
    load_coefficient,
    load_samples,
    noise_pointers,
    noise_tile,
    noised_operation,
    tile_pointers,
)

WEIGHTINGS = ("uniform", "sigma2", "dmd")
COSTS = ("squared_l2", "l1", "pseudo_huber", "none")

# A sample that the teacher restores exactly would divide by zero; at this floor its gradient is merely large.
NORMALIZER_FLOOR = 1e-6


class GradientStatistics(NamedTuple):
    """Per-sample sums for telemetry, left on the device and added up when read.

    Attributes:
        score_partials, cost_partials: float32 [N, chunks], the sums over each 1,024 elements.
    """

    score_partials: Tensor
    cost_partials: Tensor

    @property
    def score_gradient_square(self) -> Tensor:
        """‖g‖², float32 [N]."""
        return add_chunks(self.score_partials)

    @property
    def transport_cost(self) -> Tensor:
        """c(x, y), float32 [N]."""
        return add_chunks(self.cost_partials)


class _Operands(NamedTuple):
    """Operands of the gradient, as the operator's schema can hold them but for table and noise.

    Attributes:
        output: F_G.
        y: skip x + scale F_G, where it is at hand.
        weights: λ of each sample, float32 [N], in the place of the number ``transport_weight``.
        factor: of the whole: 1/B, the generator's scale and the loss scale.
    """

    output: Tensor
    x: Tensor
    y: Tensor | None
    f_real: Tensor
    f_fake: Tensor
    extra: Tensor | None
    weights: Tensor | None
    transport_weight: float
    weighting: str
    cost: str
    delta: float
    factor: float
    skip: float
    scale: float
    table: Coefficients
    noise: CounterNoise


# -- reference ---------------------------------------------------------------------------------------------------------


def elementwise_cost(displacement: Tensor, cost: str, delta: float) -> tuple[Tensor, Tensor]:
    """Cost of each element of y - x, and its derivative with respect to y.

    squared_l2: d²; l1: |d| (derivative 0 at 0); pseudo_huber: δ² (√(1 + (d/δ)²) - 1), d in data units; none: 0.
    """
    if cost == "none":
        return torch.zeros_like(displacement), torch.zeros_like(displacement)
    if cost == "squared_l2":
        return displacement.square(), 2 * displacement
    if cost == "l1":
        return displacement.abs(), displacement.sign()
    if cost == "pseudo_huber":
        root = torch.sqrt(1 + (displacement / delta).square())
        return displacement.square() / (root + 1), displacement / root  # the same value, without cancellation
    raise ValueError(f"transport cost {cost!r}: one of {', '.join(COSTS)}")


def _reference(given: _Operands) -> tuple[Tensor, Tensor, Tensor]:
    table, y = given.table, given.y
    if y is None:
        y = generator_output(given.output, given.x, given.skip, given.scale)
    f_real = given.f_real.float()
    difference = given.f_fake.float() - f_real
    if given.weighting == "dmd":
        target = table.row("target_clean", y) * y + table.row("target_noise", y) * given.noise.values(y)
        residual = (target - f_real).abs().flatten(1).mean(1).clamp_min(NORMALIZER_FLOOR)
        scale = table.row("c_out").sign() / residual
    else:
        scale = table.row("score_scale")
    scale = scale.view(-1, *(1,) * (y.ndim - 1))
    score_gradient = difference * scale
    cost, cost_gradient = elementwise_cost(y - given.x.float(), given.cost, given.delta)
    if given.extra is not None:
        cost_gradient = cost_gradient + given.extra.float()
    if given.weights is None:
        gradient = score_gradient.add(cost_gradient, alpha=given.transport_weight)
    else:
        gradient = score_gradient.addcmul(cost_gradient, given.weights.view(scale.shape))  # with the bits of add
    gradient.mul_(given.factor)
    return in_element_order(gradient.to(given.output.dtype)), chunk_sums(score_gradient.square()), chunk_sums(cost)


# -- kernels -----------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["stream", "n", "chunks"])
def _residual_kernel(
    residuals, f_real, clean, reading_x, table, seed, positions, drawn,
    stream, skip, scale, n, count, chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of |F* - F_real| over chunks: float32 [n, chunks]."""
    row, chunk, offsets, mask = tile_pointers(n, count, chunks, ROWS, WIDTH)
    f_real_tile = load_samples(f_real, offsets, mask)
    y = load_clean(clean, reading_x, skip, scale, offsets, mask)
    epsilon = noise_tile(seed, stream, positions, drawn, row, chunk, offsets, mask, n, ROWS, WIDTH)
    target = load_coefficient(table, TARGET_CLEAN, row, n) * y + load_coefficient(table, TARGET_NOISE, row, n) * epsilon
    residual = tl.where(mask, tl.abs(target - f_real_tile), 0.0)
    tl.store(residuals + row * chunks + chunk, tl.sum(residual, axis=1), mask=row < n)


@jit
def _score_scale(residuals, table, floor, row, n, count, chunks, ROWS: tl.constexpr, PARTIALS: tl.constexpr):
    """The number [ROWS, 1] that makes F_fake - F_real the score gradient."""
    if residuals is None:
        scale = load_coefficient(table, SCORE_SCALE, row, n)
    else:
        total = tl.zeros([ROWS, PARTIALS], tl.float32)
        for first in range(0, chunks, PARTIALS):
            index = first + tl.arange(0, PARTIALS)
            mask = (row < n)[:, None] & (index < chunks)[None, :]
            total += tl.load(residuals + (row * chunks)[:, None] + index[None, :], mask=mask, other=0.0)
        mean = tl.sum(total, axis=1)[:, None] / count
        mean = tl.where(mean < floor, floor, mean)  # unlike a maximum, this keeps NaN
        c_out = load_coefficient(table, C_OUT, row, n)
        scale = tl.where(c_out > 0, 1.0, tl.where(c_out < 0, -1.0, 0.0)) / mean
    return scale


@jit
def _elementwise_cost(displacement, delta, COST: tl.constexpr):
    if COST == "squared_l2":
        cost, derivative = displacement * displacement, 2 * displacement
    elif COST == "l1":
        cost = tl.abs(displacement)
        derivative = tl.where(displacement > 0, 1.0, tl.where(displacement < 0, -1.0, displacement))
    elif COST == "none":
        cost, derivative = tl.zeros_like(displacement), tl.zeros_like(displacement)
    else:
        ratio = displacement / delta
        root = tl.sqrt(1 + ratio * ratio)
        cost, derivative = displacement * displacement / (root + 1), displacement / root
    return cost, derivative


@jit(do_not_specialize=["n", "chunks"])
def _gradient_kernel(
    gradient, score_partials, cost_partials, f_real, f_fake, output, x, extra, weights, residuals, table,
    skip, scale, transport_weight, factor, delta, floor, n, count, chunks,
    COST: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, chunk, offsets, mask = tile_pointers(n, count, chunks, ROWS, WIDTH)
    difference = load_samples(f_fake, offsets, mask) - load_samples(f_real, offsets, mask)
    y = load_samples(output, offsets, mask)
    source = load_samples(x, offsets, mask)
    y = skip * source + scale * y
    score_gradient = difference * _score_scale(residuals, table, floor, row, n, count, chunks, ROWS, PARTIALS)
    cost, cost_gradient = _elementwise_cost(y - source, delta, COST)
    if extra is not None:
        cost_gradient += load_samples(extra, offsets, mask)
    if weights is not None:
        transport_weight = load_coefficient(weights, 0, row, n)  # as of a table of one row
    total = (score_gradient + transport_weight * cost_gradient) * factor
    tl.store(gradient + offsets, total.to(gradient.dtype.element_ty), mask=mask)
    partial = row * chunks + chunk
    tl.store(score_partials + partial, tl.sum(score_gradient * score_gradient, axis=1), mask=row < n)
    tl.store(cost_partials + partial, tl.sum(cost, axis=1), mask=row < n)


# -- operation ---------------------------------------------------------------------------------------------------------


def _partials_width(chunks: int) -> int:
    """Partial sums that a program loads at once."""
    # With a single one ptxas spills 8 bytes on sm_80; with two it spills none.
    return max(2, min(1024, triton.next_power_of_2(chunks)))


def _shapes(given: _Operands) -> tuple[Tensor, Tensor, Tensor]:
    output = given.output
    partials = (output.shape[0], chunk_count(output[0].numel()))
    score, cost = (output.new_empty(partials, dtype=torch.float32) for _ in range(2))
    return empty_in_element_order(output, output.dtype), score, cost


def _triton(given: _Operands) -> tuple[Tensor, Tensor, Tensor]:
    dmd, samples = given.weighting == "dmd", (given.output, given.x, given.y, given.f_real, given.f_fake, given.extra)
    check_shapes(given.output, given.table, given.noise if dmd else None, *samples)
    output, x, y, f_real, f_fake, extra = map(in_element_order, samples)
    gradient, score_partials, cost_partials = _shapes(given)
    rows, residuals = given.table.rows.contiguous(), None
    if dmd:
        residuals = torch.empty_like(score_partials)
        clean = (output, x) if y is None else (y, None)
        launch(
            _residual_kernel, output, residuals, f_real, *clean, rows,
            *noise_pointers(given.noise, output.device), given.skip, given.scale,
        )  # fmt: skip
    launch(
        _gradient_kernel, output, gradient, score_partials, cost_partials, f_real, f_fake, output, x, extra,
        given.weights, residuals, rows,
        given.skip, given.scale, given.transport_weight, given.factor, given.delta, NORMALIZER_FLOOR,
        COST=given.cost, PARTIALS=_partials_width(score_partials.shape[1]) if dmd else 1,
    )  # fmt: skip
    return gradient, score_partials, cost_partials


_rdmd_gradient = noised_operation(
    "rdmd_gradient", _Operands, "(Tensor, Tensor, Tensor)", triton=_triton, reference=_reference, shapes=_shapes
)


def generator_gradient(
    *,
    f_real: Tensor,
    f_fake: Tensor,
    f_generator: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    reading: Reading,
    noise: CounterNoise,
    table: Coefficients,
    transport_weight: float | Tensor,
    weighting: str = "dmd",
    cost: str = "squared_l2",
    delta: float = 0.1,
    extra: Tensor | None = None,
    batch_size: int | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, GradientStatistics]:
    """Compute dL/dF_G = scale dL/dy for the generator y = skip x + scale F_G, in the dtype of F_G. No gradient flows.

    Args:
        f_real, f_fake: raw outputs of teacher and fake score at y_t, [N, ...], any floating dtype.
        f_generator: raw output of the generator's network [N, ...]; y is formed again from it and x.
        x: the sources that it came from [N, ...], data units.
        y: the generator's output, if it is at hand: the first launch of ``dmd`` reads it with fewer bytes.
        reading: how that network is read as a generator.
        noise: the noise of y_t; read by ``dmd`` only.
        table: coefficients of the N samples.
        transport_weight: λ, a number, or float32 [N] on the samples' device.
        weighting: one of ``WEIGHTINGS``.
        cost: one of ``COSTS``.
        delta: scale of the pseudo-Huber cost in data units.
        extra: derivative of a further cost of each sample with respect to y [N, ...], weighted by λ too; not part
            of the statistics.
        batch_size: B, the samples that the loss is the mean of; N if None.
        loss_scale: factor of the gradient, applied in fp32 before it is rounded to the dtype of F_G.

    Returns:
        (gradient [N, ...], statistics); images in channels_last.

    Raises:
        ValueError: unknown weighting or cost, or a λ of another shape, dtype or device.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r}: one of {', '.join(WEIGHTINGS)}")
    if cost not in COSTS:
        raise ValueError(f"transport cost {cost!r}: one of {', '.join(COSTS)}")
    weights = None
    if isinstance(transport_weight, Tensor):
        weights, transport_weight = transport_weight.contiguous(), 0.0
        if (weights.shape, weights.dtype, weights.device) != (x.shape[:1], torch.float32, f_generator.device):
            raise ValueError(
                f"transport_weight: {weights.dtype} {list(weights.shape)} on {weights.device}, give float32 "
                f"[{x.shape[0]}] on {f_generator.device}"
            )
    factor = reading.scale * loss_scale / (batch_size or x.shape[0])
    gradient, *partials = _rdmd_gradient(
        _Operands(
            f_generator, x, y, f_real, f_fake, extra, weights, transport_weight, weighting, cost, delta, factor,
            reading.skip, reading.scale, table, noise,
        )
    )  # fmt: skip
    return gradient, GradientStatistics(*partials)
