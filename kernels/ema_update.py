"""Exponential moving average of many tensors in one launch.

    ema <- ema + weight (source - ema)                      weight < 1/2
    ema <- source - (1 - weight) (source - ema)             weight >= 1/2, where the first would cancel

as ``torch.lerp`` does, each with one fused multiply-add: coefficient (source - ema) + base, with coefficient
weight or weight - 1 rounded to fp32. Traffic is the least there is, 12 bytes an element.

The kernel finds its tensors by a table of addresses on the device, a row for every 4,096 elements, made when a list
of tensors is first seen. So it makes no difference whether they are two flat shards or five hundred parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, jit, tl

BLOCK = 4096
_TABLES: OrderedDict[tuple, tuple[Tensor, bool]] = OrderedDict()
_TABLES_KEPT = 8  # three engines' worth and room


def ema_update_reference(ema: Sequence[Tensor], source: Sequence[Tensor], weight: float) -> None:
    """``ema_update`` in plain torch, on any device."""
    torch._foreach_lerp_(list(ema), list(source), weight)


@jit
def _ema_update_kernel(table, coefficient, FROM_SOURCE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 3
    ema_address, source_address, count = tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    ema = ema_address.to(tl.pointer_type(tl.float32))
    source = source_address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        ema, source = tl.multiple_of(ema, 16), tl.multiple_of(source, 16)
    offset = tl.arange(0, BLOCK)
    if count == BLOCK:  # no mask, so that accesses stay wide
        old, new = tl.load(ema + offset), tl.load(source + offset)
        tl.store(ema + offset, tl.fma(new - old, coefficient, new if FROM_SOURCE else old))
    else:
        mask = offset < count
        old, new = tl.load(ema + offset, mask=mask), tl.load(source + offset, mask=mask)
        tl.store(ema + offset, tl.fma(new - old, coefficient, new if FROM_SOURCE else old), mask=mask)


def _table(ema: Sequence[Tensor], source: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """int64 [blocks, 3]: addresses of a block of ema and of source, and its elements; whether all are 16-byte aligned.

    Addresses are all that it holds, so memory that was freed and taken again by the like is no harm.
    """
    key = (ema[0].device, *((e.data_ptr(), s.data_ptr(), e.numel(), s.dtype) for e, s in zip(ema, source, strict=True)))
    if key in _TABLES:
        _TABLES.move_to_end(key)
        return _TABLES[key]
    _check(ema, source)
    rows = []
    for ema_address, source_address, count, _ in key[1:]:
        starts = torch.arange(0, count, BLOCK, dtype=torch.int64)
        ends = (count - starts).clamp_max_(BLOCK)
        rows.append(torch.stack((ema_address + 4 * starts, source_address + 4 * starts, ends), dim=1))
    table = torch.cat(rows)
    aligned = not bool((table[:, :2] % 16).any())
    _TABLES[key] = table.to(ema[0].device), aligned
    while len(_TABLES) > _TABLES_KEPT:
        _TABLES.popitem(last=False)
    return _TABLES[key]


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _check(ema: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for index, (average, value) in enumerate(zip(ema, source, strict=True)):
        if average.dtype != torch.float32 or value.dtype != torch.float32:
            raise TypeError(f"tensor {index}: {average.dtype} and {value.dtype}, want torch.float32")
        if average.shape != value.shape or average.stride() != value.stride() or average.device != value.device:
            raise ValueError(f"tensor {index}: shape, strides or device of average and source differ")
        if not _dense(average) or average.device != ema[0].device:
            raise ValueError(f"tensor {index}: want dense memory and one device for all")


def ema_update_triton(ema: Sequence[Tensor], source: Sequence[Tensor], weight: float) -> None:
    """``ema_update`` by Triton."""
    if len(ema) != len(source):
        raise ValueError(f"{len(ema)} averages of {len(source)} sources")
    if not any(average.numel() for average in ema):
        return
    table, aligned = _table(ema, source)
    from_source = weight >= 0.5
    with torch.cuda.device_of(ema[0]):
        _ema_update_kernel[(len(table),)](
            table, weight - 1 if from_source else weight, from_source, aligned, BLOCK, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip


@torch.library.custom_op("rdmd_fast::ema_update", mutates_args=("ema",))
def _ema_update_op(ema: Sequence[Tensor], source: Sequence[Tensor], weight: float) -> None:
    ema_update_triton(ema, source, weight)


_ema_update_op.register_fake(lambda ema, source, weight: None)


@torch.no_grad()
def ema_update(ema: Sequence[Tensor], source: Sequence[Tensor], weight: float) -> None:
    """Move each average towards its source by ``weight``, in place.

    Args:
        ema: float32 tensors, or flat shards of them, dense, all on one device.
        source: as many tensors with the shapes and strides of ``ema``.
        weight: 1 - decay, in [0, 1].

    Raises:
        TypeError, ValueError: on a GPU, tensors that are not as described; on the CPU ``torch._foreach_lerp_`` decides.
    """
    implementation = backend(ema[0].device) if ema else "reference"
    if implementation == "reference":
        if ema or source:
            ema_update_reference(ema, source, weight)
    elif implementation == "shapes":
        return
    elif torch.compiler.is_compiling():
        _ema_update_op(ema, source, weight)
    else:
        ema_update_triton(ema, source, weight)
