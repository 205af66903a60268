"""Each kernel beside eager PyTorch and torch.compile of the same arithmetic; right before it is timed.

    pytest benchmarks/test_kernels.py --benchmark-json benchmarks/results/kernels.json [--compile]

On a GPU: device time, L2 flushed before each round; shapes that are bound by their launches are replayed as a CUDA
graph; torch.compile included. On the CPU: the reference path at small shapes; torch.compile with --compile.
"""

from __future__ import annotations

import platform

import pytest
import torch

from benchmarks.kernel_cases import operations
from benchmarks.timing import CUDA, clock, copy_bandwidth, flush, graphed

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.fixture(autouse=True)
def released_memory():
    yield
    torch.compiler.reset()
    if CUDA:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("implementation", ["ours", "eager", "compile"])
@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in operations()])
def test_kernel(benchmark, request, build, implementation):
    if implementation == "compile" and not (CUDA or request.config.getoption("--compile")):
        pytest.skip("on the CPU with --compile only")
    operation = build()
    operation.check()
    function = operation.implementation(implementation)
    for _ in range(3):
        function()
    if CUDA and operation.launch_bound:
        function = graphed(function)
    benchmark.group = f"{operation.name} {operation.case}"
    benchmark.pedantic(function, setup=flush, rounds=30 if CUDA else 5, warmup_rounds=3 if CUDA else 1)
    copy = copy_bandwidth()
    speed = operation.bytes / benchmark.stats.stats.median
    benchmark.extra_info.update(
        operation=operation.name,
        case=operation.case,
        implementation=implementation,
        bytes=operation.bytes,
        graph=CUDA and operation.launch_bound,
        GBps=speed / 1e9,
        copy_GBps=copy / 1e9,
        percent_of_copy=100 * speed / copy,
        device=torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        torch=torch.__version__,
    )
