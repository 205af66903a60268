"""Small kernels for the interpreter's own tests."""

from __future__ import annotations

import numpy as np

from tests.gpu_stand_in.ptx.machine import Kernel

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry case({parameters})
.reqntid {threads}
{{
    .reg .pred %p<99>;
    .reg .b16 %h<99>;
    .reg .b32 %r<99>;
    .reg .b64 %d<99>;
    mov.u32 %r98, %tid.x;
    cvt.u64.u32 %d98, %r98;
{body}
    ret;
}}
"""
_PREFIX = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}  # of registers, by bytes of what they hold


def launch(
    body: str, *arrays: np.ndarray, threads: int = 32, grid=(1, 1, 1), shared: int = 0, sizes=None, copies=False
) -> None:
    """Run ``body`` on arrays, whose addresses are in %d90, %d91 and so on; %r98 is the thread's number, as is %d98.

    Args:
        sizes: bytes of each array that the device knows of; all unless given.
    """
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 case_param_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"    ld.param.b64 %d{90 + i}, [case_param_{i}];" for i in range(len(arrays)))
    kernel = Kernel(HEAD.format(parameters=parameters, threads=threads, body=f"{loads}\n{body}"), copies)
    addresses = [array.ctypes.data for array in arrays]
    allocations = zip(addresses, sizes or [array.nbytes for array in arrays], strict=True)
    kernel.launch(grid, threads, addresses, shared, allocations)


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy in memory that begins at a multiple of 512, as the device's does."""
    memory = np.empty(values.nbytes + 512, np.uint8)
    first = -memory.ctypes.data % 512
    copy = memory[first : first + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def evaluate(instruction: str, inputs: list[np.ndarray], out: np.dtype, more: str = "") -> np.ndarray:
    """What ``instruction`` makes of ``inputs`` in each of up to 1,024 threads.

    Args:
        instruction: its name, or a whole one with ``{out}``, ``{0}``, ``{1}`` for its operands.
        more: operands that it has beside.
    """
    count = len(inputs[0])
    threads = -(-count // 32) * 32
    padded = [aligned(np.concatenate([each, np.repeat(each[:1], threads - count)])) for each in inputs]
    result, out = aligned(np.zeros(threads, out)), np.dtype(out)
    registers = [f"{_PREFIX[each.itemsize]}{place}" for place, each in enumerate(padded)]
    target = f"{_PREFIX[out.itemsize]}50"
    if "{" not in instruction:
        operands = ", ".join([target, *registers, *([more] if more else [])])
        instruction = f"{instruction} {operands};"
    body = [_access("ld", each, place, registers[place]) for place, each in enumerate(padded)]
    body += [instruction.format(*registers, out=target), _access("st", result, len(padded), target)]
    launch("\n".join(body), *padded, result, threads=threads)
    return result[:count]


def _access(name: str, array: np.ndarray, place: int, register: str) -> str:
    address = f"mul.lo.s64 %d97, %d98, {array.itemsize};\n add.s64 %d97, %d97, %d{90 + place};\n"
    kind = f"b{8 * array.itemsize}"
    return address + (
        f"ld.global.{kind} {{ {register} }}, [ %d97 + 0 ];" if name == "ld"
        else f"st.global.{kind} [ %d97 + 0 ], {{ {register} }};"
    )  # fmt: skip
