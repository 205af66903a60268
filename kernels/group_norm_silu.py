"""GroupNorm, modulation and SiLU of a U-Net block in one operation (GroupNorm: Wu and He, arXiv 1803.08494).

    u = x + addend + x_bias        addend, scale and shift: one number a sample and channel; x_bias: one a channel
    h = (u - mean) rstd                              mean, rstd = 1 / sqrt(var + eps) over a group's elements
    z = (h weight + bias) (1 + scale) + shift
    y = z sigmoid(z), or z without SiLU

With c = x - (mean - addend - x_bias), gain = rstd weight (1 + scale) and offset = bias (1 + scale) + shift it is
z = gain c + offset. The four rows (mean - addend - x_bias, rstd, gain, offset), a number a sample and channel each, are
the table that the forward pass leaves for the backward pass.

Backward, with dz = dy (s + z s (1 - s)), s = sigmoid(z), and sums over a channel's P pixels

    p1 = sum dz,   p2 = rstd sum dz c,   p3 = sum c
    dshift = p1    dscale = weight p2 + bias p1    dbias, dweight = sum over samples of (1 + scale) (p1, p2)
    m1, m2 = means over the group's elements of dz and dz h, both times weight (1 + scale)
    dx = gain dz - rstd² m2 c - rstd m1            daddend = gain p1 - rstd² m2 p3 - P rstd m1
                                                   dx_bias = sum of daddend over samples

Where x also goes past the norm, as in a residual block, the gradient from there is added to dx as dx is written.

The kernels are in _group_norm_silu.py. x is read once where a group fits a program's registers, else twice, and
so are x and dy backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdmd_fast.kernels import _group_norm_silu as kernels
from rdmd_fast.kernels._dispatch import backend, computes, triton
from rdmd_fast.kernels._merge import merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, scale=None, shift=None, addend=None, silu=True,
    x_bias=None,
) -> Tensor:  # fmt: skip
    """``group_norm_silu`` in plain torch, on any device, in any floating dtype, float64 included."""
    if weight.dtype != x.dtype:
        wide = torch.promote_types(weight.dtype, x.dtype)
        parts = (x, weight, bias, scale, shift, addend, x_bias)
        x_wide, weight, bias, *modulation, x_bias = (None if part is None else part.to(wide) for part in parts)
        return group_norm_silu_reference(x_wide, weight, bias, groups, eps, *modulation, silu, x_bias).to(x.dtype)
    if x_bias is not None:
        x = x + x_bias[:, None, None]
    if addend is not None:
        x = x + addend[:, :, None, None]
    normed = _group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        normed = normed * (1 + scale[:, :, None, None])
    if shift is not None:
        normed = normed + shift[:, :, None, None]
    return F.silu(normed) if silu else normed


def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    slow = x.device.type == "cpu" and x.element_size() == 2 and x.ndim == 4 and not x.is_contiguous()
    if slow and not torch.compiler.is_compiling() and _is_channels_last(x):
        return _ChannelsLastGroupNorm.apply(x, weight, bias, groups, eps)
    return F.group_norm(x, groups, weight, bias, eps)


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """PyTorch's on the CPU, by detours: for 16-bit channels_last it takes two to four times as long.

    On small images it is fastest contiguous, on middling ones and backward in fp32 (benchmarks/NOTES.md).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        pixels = x[0, 0].numel()
        ctx.sizes = (*x.shape[:2], pixels, groups)
        if 64 < pixels < 1024:
            y, mean, rstd = torch.native_group_norm(x.float(), weight.float(), bias.float(), *ctx.sizes, eps)
        else:
            given = x.contiguous() if pixels <= 64 else x
            y, mean, rstd = torch.native_group_norm(given, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        wide = (part.float() for part in (dy, x, mean, rstd, weight))
        gradients = torch.ops.aten.native_group_norm_backward(*wide, *ctx.sizes, list(ctx.needs_input_grad[:3]))
        dx, dweight, dbias = (None if part is None else part.to(x.dtype) for part in gradients)
        return dx, dweight, dbias, None, None


class Plan(NamedTuple):
    """How a kernel that walks over the image is launched: constexprs of the tile, grid and warps."""

    tile: dict
    grid: tuple[int, int]
    warps: int


def _layout(channels: int, pixels: int, channels_last: bool) -> dict:
    """The largest power of 2, up to 16, that divides the contiguous extent makes wide accesses provable."""
    contiguous = channels if channels_last else pixels
    unit = min(16, contiguous & -contiguous)
    units = (unit, 1) if channels_last else (1, unit)
    return dict(zip(("CHANNELS_LAST", "CHANNEL_UNIT", "PIXEL_UNIT"), (channels_last, *units), strict=True))


def plan_resident(shape: tuple, groups: int, itemsize: int, channels_last: bool, tensors: int = 1) -> Plan | None:
    """Whole groups a program, or None where they do not fit. Registers are shared by ``tensors``, a power of 2.

    In channels_last a row of the tile has 32 to 64 bytes, so that no sector of memory is fetched in vain.
    """
    n, channels, pixels = shape
    group = channels // groups
    tile_p = triton.next_power_of_2(pixels)
    if group & (group - 1) or tile_p * group > 8192:
        return None
    tile_c = group
    while groups % (2 * tile_c // group) == 0:
        doubled, width = 2 * tile_c * tile_p, tile_c * itemsize if channels_last else 64
        if doubled > 1024 and not (width < 64 and doubled <= 4096) and not (width < 32 and doubled <= 8192):
            break
        tile_c *= 2
    if channels_last and tile_c * itemsize < 16:
        return None
    tile = {**_layout(channels, pixels, channels_last), "TILE_P": tile_p, "TILE_C": tile_c, "GROUP": group}
    # Narrow accesses need an address each: fewer elements a thread leave registers for them.
    wide = tile["CHANNEL_UNIT" if channels_last else "PIXEL_UNIT"] * itemsize >= 16
    a_thread = (16 if wide else 4) // tensors
    return Plan(tile, (n, channels // tile_c), min(16, max(1, tile_p * tile_c // (32 * a_thread))))


@functools.lru_cache(maxsize=1024)  # each launch asks, on the host
def plan_chunks(shape: tuple, channels_last: bool, elements: int) -> Plan:
    """Chunks of pixels in tiles of ``elements``. Chunks depend on C and H W alone, so no sum on the batch."""
    n, channels, pixels = shape
    whole = triton.next_power_of_2(pixels)
    if channels_last:
        tile_c = min(128, channels & -channels)
        if tile_c < 32:
            tile_c = min(128, triton.next_power_of_2(channels))
        chunk = min(whole, max(64, min(256, whole // 32)))
        tile_p = min(elements // tile_c, chunk)
    else:
        chunk = min(whole, max(512, min(2048, whole // 16)))
        tile_p = min(512, chunk)
        tile_c = min(elements // tile_p, triton.next_power_of_2(channels))
    tile = {**_layout(channels, pixels, channels_last), "TILE_P": tile_p, "TILE_C": tile_c, "STEPS": chunk // tile_p}
    return Plan(tile, (n * triton.cdiv(pixels, chunk), triton.cdiv(channels, tile_c)), 4)


def plan_merge(group_channels: int, chunks: int) -> tuple[dict, int]:
    """Constexprs and warps of the kernels that merge the chunks of a group."""
    tile_c = triton.next_power_of_2(group_channels)
    tile_chunks = min(triton.next_power_of_2(chunks), max(1, 2048 // tile_c))
    return {"TILE_CHUNKS": tile_chunks, "TILE_C": tile_c}, 4 if tile_c * tile_chunks >= 512 else 1


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that the kernels take."""
    return x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _check(x, weight, bias, groups, modulation, x_bias) -> None:
    if x.ndim != 4 or x.shape[1] % groups or x[0:1].numel() >= 1 << 31:
        raise ValueError(
            f"x is {list(x.shape)}: want [N, C, H, W] with {groups} groups dividing C, under 2**31 a sample"
        )
    by_channel = ((part, x.shape[1:2]) for part in (weight, bias, x_bias))
    for part, shape in (*by_channel, *((part, x.shape[:2]) for part in modulation)):
        if part is None:
            continue
        if part.shape != shape or part.device != x.device:
            raise ValueError(f"parameter is {list(part.shape)} on {part.device}, want {list(shape)} on {x.device}")
        if part.dtype not in DTYPES or x.dtype not in DTYPES:
            raise TypeError(f"x is {x.dtype}, a parameter {part.dtype}: kernels take {DTYPES}; RDMD_KERNELS=reference")


def _rows(values: Tensor | None) -> tuple[Tensor | None, int]:
    """An optional [N, C] tensor with unit stride along C, and its other stride."""
    if values is None:
        return None, 0
    if values.stride(1) != 1:
        values = values.contiguous()
    return values, values.stride(0)


def _forward_results(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((4, *x.shape[:2]), dtype=torch.float32)


def group_norm_silu_forward(x, weight, bias, groups, eps, scale, shift, addend, silu, x_bias) -> tuple[Tensor, Tensor]:
    """By Triton: y and the table [4, N, C] of the docstring above. ``x`` is ``dense``."""
    n, channels = x.shape[:2]
    y, table = _forward_results(x)
    if not computes():
        return y, table
    _check(x, weight, bias, groups, (scale, shift, addend), x_bias)
    if not x.numel():
        return y, table.zero_()
    pixels, channels_last = x[0, 0].numel(), _is_channels_last(x)
    rows = [_rows(part) for part in (scale, shift, addend)]
    parameters = weight.contiguous(), bias.contiguous(), x_bias, *(row for row, _ in rows)
    strides = tuple(stride for _, stride in rows)
    shape = n, channels, pixels
    with torch.cuda.device_of(x):
        if plan := plan_resident(shape, groups, x.element_size(), channels_last):
            arguments = x, y, *parameters, table, n, *_units(plan, shape), *strides, eps
            _launch(kernels.resident_forward_kernel, plan, *arguments, SILU=silu)
            return y, table
        plan = plan_chunks(shape, channels_last, 2048)
        chunks, units = plan.grid[0] // n, _units(plan, shape)
        partials = x.new_empty((n, chunks, 2, channels), dtype=torch.float32)
        _launch(kernels.moments_kernel, plan, x, partials, *units, chunks)
        tile, warps = plan_merge(channels // groups, chunks)
        arguments = partials, *parameters, table, n, channels, pixels, chunks, channels // groups, *strides, eps
        chunk = plan.tile["TILE_P"] * plan.tile["STEPS"]
        _launch(kernels.table_kernel, Plan(tile, (n, groups), warps), *arguments, CHUNK=chunk)
        _launch(kernels.apply_kernel, plan, x, y, table, n, *units, chunks, SILU=silu)
    return y, table


def _parameter_results(
    x: Tensor, dtype: torch.dtype, wants_parameters: bool, modulation_dtype: torch.dtype, has_x_bias: bool
) -> tuple[Tensor, Tensor]:
    n, channels = x.shape[:2]
    parameters = x.new_empty((2 + has_x_bias, channels if wants_parameters else 0), dtype=dtype)
    return parameters, x.new_empty((3, n, channels), dtype=modulation_dtype)


def group_norm_silu_backward(
    dy, x, table, weight, bias, groups, scale, silu, wants_parameters, modulation_dtype, has_x_bias, branch=None
) -> tuple[Tensor, Tensor, Tensor]:
    """By Triton: dx (+ branch), (dweight, dbias, dx_bias if any) [., C or 0], the modulation's three [3, N, C]."""
    x = dense(x)
    choice = weight.dtype, wants_parameters, modulation_dtype, has_x_bias
    dx, parameters, modulation = torch.empty_like(x), *_parameter_results(x, *choice)
    if not (computes() and x.numel()):
        return dx, parameters.zero_(), modulation.zero_()
    dy, branch = _laid_out_as(x, dy, branch)
    # Beside another branch's gradient registers hold one 16-byte access a tensor and thread.
    plan = _plan_backward(x, groups, 2 if branch is None else x.element_size())
    if plan is None:
        slopes, *results = group_norm_silu_slopes(dy, x, table, weight, bias, groups, scale, silu, *choice[1:])
        _apply_slopes(dy, x, table, slopes, dx, branch, silu)
        return dx, *results
    n, channels = x.shape[:2]
    contributions = table.new_empty((n, 2 + has_x_bias, channels))
    scale, stride = _rows(scale)
    arguments = x, dy, branch, dx, weight.contiguous(), bias.contiguous(), scale, table, contributions, modulation, n
    with torch.cuda.device_of(x):
        units = _units(plan, (n, channels, x[0, 0].numel()))
        _launch(kernels.resident_backward_kernel, plan, *arguments, *units, stride, SILU=silu, X_BIAS=has_x_bias)
        if wants_parameters:
            merge(contributions, parameters)
    return dx, parameters, modulation


def _plan_backward(x: Tensor, groups: int, tensors: int) -> Plan | None:
    return plan_resident((*x.shape[:2], x[0, 0].numel()), groups, x.element_size(), _is_channels_last(x), tensors)


def group_norm_silu_slopes(
    dy, x, table, weight, bias, groups, scale, silu, wants_parameters, modulation_dtype, has_x_bias
) -> tuple[Tensor, Tensor, Tensor]:
    """All of the backward pass but dx, by chunks: (rstd² m2, rstd m1) [2, N, C] fp32 of the docstring above, then
    parameters' and modulation's gradients."""
    x = dense(x)
    slopes = _slopes_result(x, table)
    parameters, modulation = _parameter_results(x, weight.dtype, wants_parameters, modulation_dtype, has_x_bias)
    if not (computes() and x.numel()):
        return slopes.zero_(), parameters.zero_(), modulation.zero_()
    n, channels = x.shape[:2]
    (dy,) = _laid_out_as(x, dy)
    contributions = table.new_empty((n, 2 + has_x_bias, channels))
    scale, stride = _rows(scale)
    with torch.cuda.device_of(x):
        plan, *sizes, chunks = _gradient_chunks(x)
        partials = table.new_empty((n, chunks, 3, channels))
        _launch(kernels.gradient_sums_kernel, plan, x, dy, table, partials, n, *sizes, chunks, SILU=silu)
        tile, warps = plan_merge(channels // groups, chunks)
        arguments = partials, table, weight.contiguous(), bias.contiguous(), scale, contributions, modulation, slopes
        sizes = n, channels, x[0, 0].numel(), chunks, channels // groups, stride
        grid = Plan(tile, (n, groups), warps)
        _launch(kernels.gradient_table_kernel, grid, *arguments, *sizes, X_BIAS=has_x_bias)
        if wants_parameters:
            merge(contributions, parameters)
    return slopes, parameters, modulation


def _slopes_result(x: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((2, *x.shape[:2]))


def _apply_slopes(dy, x, table, slopes, dx, branch, silu) -> None:
    """dx (+ branch) by Triton; all in one layout."""
    plan, *sizes = _gradient_chunks(x)
    with torch.cuda.device_of(x):
        arguments = x, dy, branch, dx, table, slopes, len(x), *sizes
        _launch(kernels.gradient_apply_kernel, plan, *arguments, SILU=silu)


def _laid_out_as(x: Tensor, *gradients: Tensor | None) -> list[Tensor | None]:
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return [None if gradient is None else gradient.contiguous(memory_format=layout) for gradient in gradients]


def _gradient_chunks(x: Tensor) -> tuple[Plan, int, int, int]:
    """(plan, channels and pixels in its units, chunks) of the kernels that walk over x in the backward pass."""
    shape = *x.shape[:2], x[0, 0].numel()
    plan = plan_chunks(shape, _is_channels_last(x), 1024)
    return plan, *_units(plan, shape), plan.grid[0] // len(x)


def _apply_slopes_in_torch(dy, x, table, slopes, silu) -> Tensor:
    """dx as operations that Inductor fuses with what is done with it."""
    center, _, gain, offset, slope, constant = (
        row[:, :, None, None] for rows in (table, slopes) for row in rows.unbind()
    )
    centered, dz = x.float() - center, dy.float()
    if silu:
        z = centered * gain + offset
        gate = torch.sigmoid(z)
        dz = dz * (gate * (1 + z * (1 - gate)))
    return (dz * gain - centered * slope - constant).to(x.dtype)


def _units(plan: Plan, shape: tuple) -> tuple[int, int]:
    return shape[1] // plan.tile["CHANNEL_UNIT"], shape[2] // plan.tile["PIXEL_UNIT"]


def _launch(kernel, plan: Plan, *arguments, **constants) -> None:
    kernel[plan.grid](*arguments, **plan.tile, **constants, num_warps=plan.warps, enable_fp_fusion=True)


class _GroupNormSiLU(torch.autograd.Function):
    """The eager path: a third of the host time of the registered operation."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, scale, shift, addend, silu, x_bias):
        x = dense(x)
        y, table = group_norm_silu_forward(x, weight, bias, groups, eps, scale, shift, addend, silu, x_bias)
        _save(ctx, x, weight, bias, groups, scale, shift, addend, silu, x_bias, table)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _backward(ctx, group_norm_silu_backward, dy)


class _BranchingGroupNormSiLU(torch.autograd.Function):
    """(y, x): the gradient of x's other branch comes back here, and no pass over memory adds the two."""

    @staticmethod
    def forward(ctx, x, *arguments):
        return _GroupNormSiLU.forward(ctx, x, *arguments), x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, branch):
        return _backward(ctx, group_norm_silu_backward, dy, branch)


def _save(ctx, x, weight, bias, groups, scale, shift, addend, silu, x_bias, table) -> None:
    ctx.save_for_backward(x, weight, bias, scale, table)
    ctx.groups, ctx.silu, ctx.has_x_bias = groups, silu, x_bias is not None
    ctx.dtypes = [None if part is None else part.dtype for part in (scale, shift, addend)]


def _backward(ctx, backward, dy, *branch):
    """Gradients in the order of the forward's arguments."""
    x, weight, bias, scale, table = ctx.saved_tensors
    modulation = {dtype for dtype in ctx.dtypes if dtype is not None}
    dtype = modulation.pop() if len(modulation) == 1 else torch.float32
    wants_parameters = any(ctx.needs_input_grad[place] for place in (1, 2, 9))
    dx, parameters, samples = backward(
        dy, x, table, weight, bias, ctx.groups, scale, ctx.silu, wants_parameters, dtype, ctx.has_x_bias, *branch
    )
    by_channel = parameters.unbind() if wants_parameters else ()
    dweight, dbias, dx_bias = (*by_channel, *(None,) * (3 - len(by_channel)))
    dmodulation = [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(samples.unbind(), ctx.dtypes, strict=True)
    ]
    return dx, dweight, dbias, None, None, *dmodulation, None, dx_bias


@torch.library.custom_op("rdmd_fast::group_norm_silu", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    addend: Tensor | None,
    silu: bool,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return group_norm_silu_forward(dense(x), weight, bias, groups, eps, scale, shift, addend, silu, x_bias)


_forward_op.register_fake(lambda x, *arguments: _forward_results(dense(x)))


def _gradient_operation(name: str, function: Callable, first_result: Callable[[Tensor, Tensor], Tensor]):
    """Register a function of the gradients above; ``first_result`` makes the first of its results from (x, table)."""
    schema = (
        "(Tensor dy, Tensor x, Tensor table, Tensor weight, Tensor bias, int groups, Tensor? scale, bool silu, "
        "bool wants_parameters, ScalarType modulation_dtype, bool has_x_bias) -> (Tensor, Tensor, Tensor)"
    )
    operation = torch.library.custom_op(f"rdmd_fast::{name}", function, mutates_args=(), schema=schema)

    @operation.register_fake
    def _(dy, x, table, weight, bias, groups, scale, silu, *choice):
        return first_result(x, table), *_parameter_results(x, weight.dtype, *choice)

    return operation


_backward_op = _gradient_operation(
    "group_norm_silu_backward", group_norm_silu_backward, lambda x, table: torch.empty_like(dense(x))
)
_slopes_op = _gradient_operation("group_norm_silu_slopes", group_norm_silu_slopes, _slopes_result)


def _traced_backward(dy, x, table, weight, bias, groups, scale, silu, *choice) -> tuple[Tensor, Tensor, Tensor]:
    """For torch.compile: one kernel where groups fit a program; else Inductor applies what kernels have summed."""
    sizes_known = all(isinstance(size, int) for size in x.shape[1:])
    arguments = dy, x, table, weight, bias, groups, scale, silu, *choice
    if not sizes_known or _plan_backward(dense(x), groups, 2) is not None:
        return _backward_op(*arguments)
    slopes, *results = _slopes_op(*arguments)
    return _apply_slopes_in_torch(dy, x, table, slopes, silu), *results


def _setup_context(ctx, inputs, output):
    x, weight, bias, groups, _, scale, shift, addend, silu, x_bias = inputs
    ctx.set_materialize_grads(False)
    _save(ctx, x, weight, bias, groups, scale, shift, addend, silu, x_bias, output[1])


_forward_op.register_autograd(lambda ctx, dy, _: _backward(ctx, _traced_backward, dy), setup_context=_setup_context)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
    silu: bool = True,
    x_bias: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + addend + x_bias) (1 + scale) + shift), differentiable once in every tensor.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16 (the reference takes float64 too), channels_last or
            contiguous; other layouts are copied to channels_last first.
        weight, bias: [C] of x's dtype or float32.
        groups: divides C.
        eps: added to the variance.
        scale, shift, addend: [N, C], any floating dtype; None means 0.
        silu: False leaves the activation out.
        x_bias: [C] of the weight's dtype, of the convolution that made x and has left it out; None means 0.

    Returns:
        [N, C, H, W] in x's dtype and layout; statistics are fp32 or better.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype that the kernels do not take.
    """
    arguments = x, weight, bias, groups, eps, scale, shift, addend, silu, x_bias
    if backend(x.device) == "reference":
        return group_norm_silu_reference(*arguments)
    if torch.compiler.is_compiling():
        return _forward_op(*arguments)[0]
    return _GroupNormSiLU.apply(*arguments)


def branching_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(silu(group_norm(x)), x), for an x that also goes past the norm: use the second x there.

    Arguments and errors as ``group_norm_silu``. In the backward pass the sum of both gradients of x costs one read.
    """
    if backend(x.device) == "reference" or torch.compiler.is_compiling():
        return group_norm_silu(x, weight, bias, groups, eps), x
    return _BranchingGroupNormSiLU.apply(x, weight, bias, groups, eps, None, None, None, True, None)
