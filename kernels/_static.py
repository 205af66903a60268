"""What the ahead-of-time gate compiles: one specialisation of one kernel, as its launcher would ask for it.

Each kernel file lists its own in ``static_cases()``, one for every branch of its heuristics at real shapes and
dtypes; ``python -m benchmarks.static`` compiles them for every architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StaticCase:
    """One specialisation of a Triton kernel.

    Attributes:
        name: unique over all files, such as ``noise_forward/bf16/3x64x64``.
        kernel: the function that ``_dispatch.jit`` made.
        signature: every argument in order, by name, to its Triton type (``*fp32``, ``*bf16``, ``*i64``, ``i32``,
            ``fp32``) or ``constexpr``.
        constants: values of the ``constexpr`` arguments.
        divisible_by_16: arguments known to be multiples of 16: pointers to aligned memory, and the sizes and
            strides that are so at these shapes. What the launcher's own specialisation would see.
        num_warps: as launched.
        vector_pointers: 16-byte global accesses must appear, loads and stores alike where the kernel has both.
        num_stages: as launched.
        enable_fp_fusion: as launched; False in every kernel that draws noise.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    vector_pointers: bool = True
    num_stages: int = 3
    enable_fp_fusion: bool = False
