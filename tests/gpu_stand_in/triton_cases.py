"""Faults that a Triton kernel can have, and what the stand-in says of them.

Not collected by itself: test_kernels.py runs it in a process of its own, where the stand-in is in place.
"""

import pytest
import torch
import triton
import triton.language as tl

from tests.gpu_stand_in.device import recording
from tests.gpu_stand_in.log import LAUNCH
from tests.gpu_stand_in.ptx.faults import Fault, UnknownInstruction


@triton.jit
def scale_kernel(x, y, n, factor, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < n
    value = tl.load(x + element, mask=inside) if MASKED else tl.load(x + element)
    tl.store(y + element, value * factor, mask=inside)


@triton.jit
def sum_kernel(x, total, n, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + element, mask=element < n, other=0.0))
    if ATOMIC:
        tl.atomic_add(total, part)
    else:
        tl.store(total, part)


@triton.jit
def product_kernel(x, y, out):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(out + rows * 16 + columns, tl.dot(tl.load(x + rows * 16 + columns), tl.load(y + rows * 16 + columns)))


def values(n=1000, dtype=torch.float32):
    return torch.linspace(-1, 1, n).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_kernel_computes(dtype):
    x = values(dtype=dtype)
    y = torch.empty_like(x)
    with recording() as log:
        scale_kernel[(4,)](x, y, len(x), 3.0, MASKED=True, BLOCK=256)
    assert torch.equal(y, x * 3) and log.total(LAUNCH) == 1


def test_an_unmasked_load_beyond_the_end():
    x = values()
    y = torch.empty_like(x)
    with pytest.raises(Fault, match=r"scale_kernel: .*ld\.global.*: out of bounds: "):
        scale_kernel[(4,)](x, y, len(x), 3.0, MASKED=False, BLOCK=256)
    scale_kernel[(2,)](x, y, len(x), 3.0, MASKED=False, BLOCK=256)  # all inside


def test_a_size_that_is_too_large():
    x, y = values(), torch.empty(1000, device="cuda")
    with pytest.raises(Fault, match="out of bounds"):
        scale_kernel[(4,)](x, y, len(x) + 1, 3.0, MASKED=True, BLOCK=256)


def test_memory_that_was_freed():
    x = values()
    address = x.data_ptr()
    del x

    class Dangling:
        dtype = torch.float32

        def data_ptr(self):
            return address

    with pytest.raises(Fault, match="out of bounds"):
        scale_kernel[(1,)](Dangling(), torch.empty(300, device="cuda"), 256, 3.0, MASKED=True, BLOCK=256)


def test_sums_of_blocks_without_and_with_atomics():
    x, total = values(), torch.zeros(1, device="cuda")
    sum_kernel[(1,)](x, total, len(x), ATOMIC=False, BLOCK=1024)
    torch.testing.assert_close(total.cpu()[0], x.sum().cpu(), rtol=0, atol=1e-4)
    with pytest.raises(Fault, match="race: writes what other threads wrote"):
        sum_kernel[(4,)](x, total, len(x), ATOMIC=False, BLOCK=256)
    with pytest.raises(UnknownInstruction, match=r"(atom|red)\..*order of threads"):
        sum_kernel[(4,)](x, total, len(x), ATOMIC=True, BLOCK=256)


def test_an_instruction_that_nobody_has_tested():
    x = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(UnknownInstruction, match=r"unknown instruction: (w?mma|wgmma)"):
        product_kernel[(1,)](x, x, torch.empty(16, 16, device="cuda"))


def test_tensors_of_the_host():
    with pytest.raises(ValueError, match="cpu tensor"):
        scale_kernel[(1,)](torch.ones(256), torch.ones(256, device="cuda"), 256, 3.0, MASKED=True, BLOCK=256)


def test_what_a_kernel_leaves_out_shows():
    x = values()
    y = torch.empty_like(x)
    scale_kernel[(3,)](x, y, len(x), 3.0, MASKED=True, BLOCK=256)
    assert y[:768].isfinite().all() and y[768:].isnan().all()


@pytest.mark.parametrize("grid", [(1, 65536, 1), (1, 1, 65536)])
def test_grids_have_limits(grid):
    with pytest.raises(RuntimeError, match="invalid argument"):
        scale_kernel[grid](values(), values(), 1000, 3.0, MASKED=True, BLOCK=256)
