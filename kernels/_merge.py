"""The last step of sums over programs or samples: partial sums of fp32 become sums in the dtype that is wanted."""

from torch import Tensor

from rdmd_fast.kernels._dispatch import jit, tl, triton

TILE_PROGRAMS, TILE_COLUMNS = 64, 32


@jit
def merge_kernel(partials, sums, programs, columns, TILE_P: tl.constexpr, TILE_C: tl.constexpr):
    """sums [columns] of partials [programs, columns], in the order of programs."""
    column = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)[None, :]
    total = tl.zeros((TILE_P, TILE_C), tl.float32)
    for first in range(0, programs, TILE_P):
        program = first + tl.arange(0, TILE_P)[:, None]
        mask = (program < programs) & (column < columns)
        total += tl.load(partials + program * columns + column, mask=mask, other=0)
    column = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    tl.store(sums + column, tl.sum(total, 0).to(sums.dtype.element_ty), mask=column < columns)


def merge(partials: Tensor, sums: Tensor) -> None:
    """Write sums, in any dtype, of partials [programs, …] fp32, both dense; the device is the current one."""
    grid = (triton.cdiv(sums.numel(), TILE_COLUMNS),)
    merge_kernel[grid](partials, sums, partials.shape[0], sums.numel(), TILE_PROGRAMS, TILE_COLUMNS, num_warps=4)
