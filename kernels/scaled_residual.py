"""Residual sum and skip scale of a U-Net block in one pass.

    y = scale (h + x)                                   dh = dx = scale dy

Forward it reads h and x and writes y into h's memory; backward it reads dy and writes the one gradient that both
branches share. With scale 1 the backward pass costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, computes, jit, tl, triton

BLOCK = 2048
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def scaled_residual_reference(h: Tensor, x: Tensor, scale: float) -> Tensor:
    """``scaled_residual`` in plain torch, on any device."""
    total = h.add_(x)
    return total if scale == 1 else total.mul_(scale)


@jit
def _scaled_sum_kernel(h, x, y, scale, count, HAS_X: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    total = tl.load(h + offset, mask=mask).to(tl.float32)
    if HAS_X:
        total += tl.load(x + offset, mask=mask).to(tl.float32)
    tl.store(y + offset, (total * scale).to(y.dtype.element_ty), mask=mask)


@jit
def _scaled_rows_kernel(dy, dx, scale, rows, columns, stride, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """dx [rows, columns] = scale dy, where dy's rows lie ``stride`` apart."""
    row = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)[:, None]
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)[None, :]
    mask = (row < rows) & (column < columns)
    value = tl.load(dy + row * stride + column, mask=mask).to(tl.float32)
    tl.store(dx + row * columns + column, (value * scale).to(dx.dtype.element_ty), mask=mask)


def _sum(h: Tensor, x: Tensor | None, y: Tensor, scale: float) -> Tensor:
    """y = scale (h + x) by Triton; all dense, in one memory order."""
    if h.numel() and computes():
        with torch.cuda.device_of(h):
            _scaled_sum_kernel[(triton.cdiv(h.numel(), BLOCK),)](
                h, x, y, scale, h.numel(), x is not None, BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return y


def _packed(dy: Tensor, dx: Tensor, scale: float) -> Tensor:
    """dx = scale dy by Triton, for channels of a larger channels_last tensor."""
    if not computes():
        return dx
    rows, columns = dy.numel() // dy.shape[1], dy.shape[1]
    tile_c = min(128, triton.next_power_of_2(columns))
    tile_r = BLOCK // tile_c
    with torch.cuda.device_of(dy):
        _scaled_rows_kernel[(triton.cdiv(rows, tile_r), triton.cdiv(columns, tile_c))](
            dy, dx, scale, rows, columns, dy.stride(3), tile_r, tile_c, num_warps=4, enable_fp_fusion=False
        )
    return dx


def _scaled(dy: Tensor, scale: float) -> Tensor:
    """scale dy, dense."""
    if _dense(dy):
        return _sum(dy, None, torch.empty_like(dy), scale)
    if _is_channel_slice(dy):  # what the backward pass of a concatenation hands back
        return _packed(dy, torch.empty_like(dy, memory_format=torch.channels_last), scale)
    dy = dy.contiguous()
    return _sum(dy, None, dy, scale)


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
    def forward(ctx, h, x, scale):
        ctx.scale = scale
        ctx.mark_dirty(h)
        return _sum(h, _like(x, h), h, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx = dy if ctx.scale == 1 else _scaled(dy, ctx.scale)
        return dx, dx, None


def scaled_residual(h: Tensor, x: Tensor, scale: float) -> Tensor:
    """scale (h + x), differentiable once.

    Args:
        h: any shape, dense; fp32, bf16 or fp16. Its memory may be taken for the result, so the caller has no more use
            for it, and neither has a backward pass (outputs of convolutions and linear layers qualify).
        x: shape, dtype and device of h.
        scale: of the sum, 1 for none.

    Raises:
        ValueError: on a GPU, operands that differ or gaps in h's memory.
    """
    if torch.compiler.is_compiling():
        return (h + x) * scale  # Inductor fuses the three
    if backend(h.device) == "reference":
        return scaled_residual_reference(h, x, scale)
    if h.dtype not in DTYPES or (h.shape, h.dtype, h.device) != (x.shape, x.dtype, x.device) or not _dense(h):
        raise ValueError(
            f"h is {h.dtype} {list(h.shape)} on {h.device}, x {x.dtype} {list(x.shape)} on {x.device}: want both alike "
            "and no gaps in memory"
        )
    return _ScaledResidual.apply(h, x, scale)
