"""Residual sum and skip scale of a U-Net block in one pass, with the biases of the convolutions that made its operands.

    y = scale (h + x + b)                               dh = dx = scale dy,   db = sum of dx over pixels

b is a number a channel. Forward it reads h and x and writes y into h's memory; backward it reads dy and writes the one
gradient that both branches share, and sums it by channel on the way: per program, then over programs, in a fixed order.
With scale 1 and no biases the backward pass costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, computes, jit, tl, triton
from rdmd_fast.kernels._merge import merge

BLOCK = 2048
PROGRAMS = 1024  # about as many fill a GPU, each with a sum of its own
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def scaled_residual_reference(h: Tensor, x: Tensor, scale: float, biases: Sequence[Tensor] = ()) -> Tensor:
    """``scaled_residual`` in plain torch, on any device."""
    total = h.add_(x)
    for bias in biases:
        total = total.add_(_by_channel(bias, h))
    return total if scale == 1 else total.mul_(scale)


def _by_channel(bias: Tensor, h: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (h.ndim - 2))


@jit
def _scaled_sum_kernel(h, x, y, scale, count, HAS_X: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    total = tl.load(h + offset, mask=mask).to(tl.float32)
    if HAS_X:
        total += tl.load(x + offset, mask=mask).to(tl.float32)
    tl.store(y + offset, (total * scale).to(y.dtype.element_ty), mask=mask)


@jit
def _biased_rows_kernel(
    h, x, bias, second, y, scale, rows, columns, HAS_SECOND: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):
    """y [rows, columns] = scale (h + x + bias + second), with a bias of [columns] each."""
    row = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)[:, None]
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    added = tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)
    if HAS_SECOND:
        added += tl.load(second + column, mask=column < columns, other=0).to(tl.float32)
    offset, mask = row * columns + column[None, :], (row < rows) & (column[None, :] < columns)
    total = tl.load(h + offset, mask=mask).to(tl.float32) + tl.load(x + offset, mask=mask).to(tl.float32)
    tl.store(y + offset, ((total + added[None, :]) * scale).to(y.dtype.element_ty), mask=mask)


@jit
def _scaled_rows_kernel(
    dy, dx, partials, scale, rows, columns, stride,
    HAS_DX: tl.constexpr, HAS_SUM: tl.constexpr, STEPS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """dx [rows, columns] = scale dy, whose rows lie ``stride`` apart; partials [programs, columns] are sums of rows."""
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)[None, :]
    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * TILE_R + tl.arange(0, TILE_R)[:, None]
        mask = (row < rows) & (column < columns)
        value = tl.load(dy + row * stride + column, mask=mask, other=0).to(tl.float32) * scale
        if HAS_DX:
            tl.store(dx + row * columns + column, value.to(dx.dtype.element_ty), mask=mask)
        total += value
    if HAS_SUM:
        column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
        tl.store(partials + tl.program_id(0) * columns + column, tl.sum(total, 0), mask=column < columns)


def _sum(h: Tensor, x: Tensor | None, y: Tensor, scale: float) -> Tensor:
    """y = scale (h + x) by Triton; all dense, in one memory order."""
    if h.numel() and computes():
        with torch.cuda.device_of(h):
            _scaled_sum_kernel[(triton.cdiv(h.numel(), BLOCK),)](
                h, x, y, scale, h.numel(), x is not None, BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return y


def _biased_sum(h: Tensor, x: Tensor, scale: float, biases: Sequence[Tensor]) -> Tensor:
    """h = scale (h + x + biases) by Triton; channels are innermost in both."""
    if h.numel() and computes():
        rows, columns, tile_r, tile_c = _tiles(h)
        with torch.cuda.device_of(h):
            _biased_rows_kernel[(triton.cdiv(rows, tile_r), triton.cdiv(columns, tile_c))](
                h, x, biases[0], biases[-1], h, scale, rows, columns, len(biases) > 1, tile_r, tile_c,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return h


def _tiles(h: Tensor) -> tuple[int, int, int, int]:
    """(rows, columns, rows and columns of a tile) of h as pixels by channels."""
    rows, columns = h.numel() // h.shape[1], h.shape[1]
    tile_c = min(128, triton.next_power_of_2(columns))
    return rows, columns, BLOCK // tile_c, tile_c


def _scaled_rows(dy: Tensor, dx: Tensor | None, scale: float, sums: Tensor | None) -> None:
    """dx = scale dy by Triton, where channels lie side by side; their sums over pixels go to ``sums`` [C], if given."""
    if not computes():
        return
    rows, columns, tile_r, tile_c = _tiles(dy)
    across, down = triton.cdiv(columns, tile_c), triton.cdiv(rows, tile_r)
    steps = 1 if sums is None else triton.next_power_of_2(max(1, across * down // PROGRAMS))
    programs = triton.cdiv(down, steps)
    partials = None if sums is None else dy.new_empty((programs, columns), dtype=torch.float32)
    with torch.cuda.device_of(dy):
        _scaled_rows_kernel[(programs, across)](
            dy, dx, partials, scale, rows, columns, dy.stride(-1 if dy.ndim > 2 else 0),
            dx is not None, sums is not None, steps, tile_r, tile_c, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if sums is not None:
            merge(partials, sums)


def _scaled(dy: Tensor, scale: float) -> Tensor:
    """scale dy, dense."""
    if _dense(dy):
        return _sum(dy, None, torch.empty_like(dy), scale)
    if _is_channel_slice(dy):  # what the backward pass of a concatenation hands back
        dx = torch.empty_like(dy, memory_format=torch.channels_last)
        _scaled_rows(dy, dx, scale, None)
        return dx
    dy = dy.contiguous()
    return _sum(dy, None, dy, scale)


def _scaled_with_sums(dy: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale dy, its sums over pixels [C] in ``dtype``), channels innermost."""
    if not (_channels_innermost(dy) or _is_channel_slice(dy)):
        dy = dy.contiguous(memory_format=torch.channels_last) if dy.ndim == 4 else dy.contiguous()
    dx = None if scale == 1 else torch.empty_like(dy, memory_format=_innermost(dy))
    sums = dy.new_empty(dy.shape[1], dtype=dtype)
    if dy.numel():
        _scaled_rows(dy, dx, scale, sums)
    else:
        sums.zero_()
    return dy if dx is None else dx, sums


def _innermost(h: Tensor) -> torch.memory_format:
    return torch.channels_last if h.ndim == 4 else torch.contiguous_format


def _channels_innermost(h: Tensor) -> bool:
    """Whether h is pixels by channels in memory, without gaps."""
    return h.ndim in (2, 4) and h.is_contiguous(memory_format=_innermost(h))


def _is_channel_slice(dy: Tensor) -> bool:
    if dy.ndim != 4 or not dy.numel() or 1 in dy.shape:
        return False
    height, width, pixel = dy.shape[2], dy.shape[3], dy.stride(3)
    return dy.stride() == (height * width * pixel, 1, width * pixel, pixel)


def _like(x: Tensor, h: Tensor) -> Tensor:
    """x in h's memory order; strides of dimensions of size 1 mean nothing."""
    same = all(a == b or size == 1 for a, b, size in zip(x.stride(), h.stride(), h.shape, strict=True))
    return x if same else torch.empty_like(h).copy_(x)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill memory without gaps, in any order of the dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense(x)


class _ScaledResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, x, scale, *biases):
        ctx.scale, ctx.dtypes = scale, [bias.dtype for bias in biases]
        ctx.mark_dirty(h)
        x = _like(x, h)
        return _biased_sum(h, x, scale, biases) if biases else _sum(h, x, h, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if any(ctx.needs_input_grad[3:]):
            dx, sums = _scaled_with_sums(dy, ctx.scale, ctx.dtypes[0])
            return dx, dx, None, *(sums.to(dtype) for dtype in ctx.dtypes)
        dx = dy if ctx.scale == 1 else _scaled(dy, ctx.scale)
        return dx, dx, None, *(None for _ in ctx.dtypes)


def scaled_residual(h: Tensor, x: Tensor, scale: float, biases: Sequence[Tensor] = ()) -> Tensor:
    """scale (h + x + biases), differentiable once.

    Args:
        h: any shape, dense; fp32, bf16 or fp16. Its memory may be taken for the result, so the caller has no more use
            for it, and neither has a backward pass (outputs of convolutions and linear layers qualify).
        x: shape, dtype and device of h.
        scale: of the sum, 1 for none.
        biases: at most two, [C] of h [N, C, H, W] or [pixels, C], any of the dtypes: what convolutions have left out.

    Raises:
        ValueError: on a GPU, operands that differ or gaps in h's memory.
    """
    if torch.compiler.is_compiling():
        total = h + x
        for bias in biases:
            total = total + _by_channel(bias, h)
        return total * scale  # Inductor fuses them
    if backend(h.device) == "reference":
        return scaled_residual_reference(h, x, scale, biases)
    if h.dtype not in DTYPES or (h.shape, h.dtype, h.device) != (x.shape, x.dtype, x.device) or not _dense(h):
        raise ValueError(
            f"h is {h.dtype} {list(h.shape)} on {h.device}, x {x.dtype} {list(x.shape)} on {x.device}: want both alike "
            "and no gaps in memory"
        )
    if any(bias.shape != h.shape[1:2] or bias.device != h.device for bias in biases) or len(biases) > 2:
        raise ValueError(f"biases are {[list(bias.shape) for bias in biases]}: want at most two of [{h.shape[1]}]")
    if biases and not _channels_innermost(h):
        for bias in biases:
            h = h.add_(_by_channel(bias, h))
        biases = ()
    return _ScaledResidual.apply(h, x, scale, *biases)
