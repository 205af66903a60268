"""A Triton driver for the stand-in: kernels are specialised and compiled for sm_90 as on an H200, up to their PTX.

NVIDIA's assembler is left out, which benchmarks/static.py runs for every kernel; the PTX is interpreted instead.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import torch
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from tests.gpu_stand_in import build, device
from tests.gpu_stand_in.log import LAUNCH
from tests.gpu_stand_in.ptx.machine import Kernel

TARGET = GPUTarget("cuda", 90, 32)
GRID_LIMITS = (2**31 - 1, 65535, 65535)
loaded: list[Kernel] = []  # all of this process


def install() -> None:
    """Have Triton compile for the stand-in's device and launch there."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(build.CACHE / "triton"))
    triton.backends.backends["nvidia"] = triton.backends.Backend(compiler=PtxBackend, driver=StandInDriver)
    driver.set_active(StandInDriver())


class PtxBackend(CUDABackend):
    """Triton's compiler for NVIDIA, with PTX as what is loaded."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


class _Utils:
    """What Triton otherwise has in C: loading, and limits of the device."""

    @staticmethod
    def load_binary(name: str, ptx: bytes, shared: int, index: int) -> tuple[Kernel, Kernel, int, int, int]:
        """(module, function, registers, spills, most threads of a block); without a module Triton loads again."""
        if not device.library().values_are_computed():
            return None, None, 0, 0, device.H200.max_threads_per_block
        kernel = Kernel(ptx.decode(), copies=name.startswith("triton_"))  # Inductor's work in place
        loaded.append(kernel)
        return kernel, kernel, 0, 0, device.H200.max_threads_per_block

    @staticmethod
    def unload_module(module) -> None:
        pass

    @staticmethod
    def get_device_properties(index: int) -> dict[str, int]:
        return {
            "max_shared_mem": device.H200.shared_memory_per_block_optin, "warpSize": device.H200.warp_size,
            "multiprocessor_count": device.H200.multi_processor_count, "sm_clock_rate": device.H200.clock_rate,
            "max_num_regs": device.H200.regs_per_multiprocessor, "mem_clock_rate": device.H200.memory_clock_rate,
            "mem_bus_width": device.H200.memory_bus_width,
        }  # fmt: skip


class Launcher:
    """Launches one compiled kernel, with arguments as Triton passes them."""

    def __init__(self, source, metadata):
        self._names, self._kinds = list(source.signature), list(source.signature.values())
        self._threads, self._shared = metadata.num_warps * TARGET.warp_size, metadata.shared
        self._name = metadata.name
        if metadata.global_scratch_size:
            raise NotImplementedError(f"{self._name} wants scratch memory on the device")

    def __call__(
        self, x: int, y: int, z: int, stream: int, kernel: Kernel, packed, metadata, on_enter, on_exit, *arguments
    ) -> None:
        grid = (x, y, z)
        if any(size > limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
            raise RuntimeError(f"{self._name}: CUDA error: invalid argument, a grid of {grid}")
        if 0 in grid:
            return
        values = [_bits(value, kind) for value, kind in zip(arguments, self._kinds, strict=True) if kind != "constexpr"]
        device.report(LAUNCH, f"triton::{self._name}", self._bytes(arguments))
        if not device.library().values_are_computed():
            return

        def launch() -> None:
            kernel.launch(grid, self._threads, values, self._shared, device.library().blocks())

        launch()
        if device.library().capturing():
            device.library().add_step(launch)

    def _bytes(self, arguments) -> int:
        """Of all tensors once; Inductor says in its names what a kernel reads and writes."""
        return sum(
            value.numel() * value.element_size() * (2 if name.startswith("in_out") else 1)
            for name, value in zip(self._names, arguments, strict=True)
            if isinstance(value, torch.Tensor)
        )


def _bits(value, kind: str) -> int:
    """An argument as the bits that a kernel reads."""
    if kind.startswith("*"):
        return _pointer(value, kind)
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return int(value)


def _pointer(value, kind: str) -> int:
    if value is None:
        return 0
    if isinstance(value, torch.Tensor) and not value.is_cuda:
        raise ValueError(f"Pointer argument ({kind}) cannot be accessed from Triton (cpu tensor?)")
    return value.data_ptr() if hasattr(value, "data_ptr") else int(value)


class StandInDriver(DriverBase):
    """What Triton asks about the device."""

    launcher_cls = Launcher
    utils = _Utils()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return device.library().current_device()

    def set_current_device(self, index: int) -> None:
        device.library().exchange_device(index)

    def get_current_stream(self, index: int = 0) -> int:
        return 0

    def get_device_capability(self, index: int = 0) -> tuple[int, int]:
        return device.CAPABILITY

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.get_current_device())

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError("there are no times to measure on the stand-in")
