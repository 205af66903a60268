"""Each kernel beside eager PyTorch and torch.compile of the same arithmetic; right before it is timed.

    pytest benchmarks/test_kernels.py [--rows FILE] [--largest N] [--compile]
    python -m benchmarks.report FILE

On a GPU: device time, L2 flushed before each round; shapes that are bound by their launches are replayed as a CUDA
graph; torch.compile included. On the CPU: the reference path at small shapes; torch.compile with --compile. Ours comes
first at every shape, and FILE is written after each measurement.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cases import operations
from benchmarks.timing import CUDA, LARGE, clock, copy_bandwidth, flush, graphed

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.fixture(autouse=True)
def released_memory():
    yield
    torch.compiler.reset()
    if CUDA:
        torch.cuda.empty_cache()


def pytest_generate_tests(metafunc):
    metafunc.parametrize("implementation", ["ours", "eager", "compile"])
    chosen = operations(metafunc.config.getoption("--largest"))
    metafunc.parametrize("build", [pytest.param(build, id=name) for name, build in chosen])


def test_kernel(benchmark, request, build, implementation):
    if implementation == "compile" and not (LARGE or request.config.getoption("--compile")):
        pytest.skip("on the CPU with --compile only")
    operation = build()
    operation.check()
    function = operation.implementation(implementation)
    for _ in range(3):
        function()
    graph = LARGE and operation.launch_bound
    if graph:
        function = graphed(function)
    benchmark.group = f"{operation.name} {operation.case}"
    benchmark.pedantic(function, setup=flush, rounds=30 if LARGE else 5, warmup_rounds=3 if LARGE else 1)
    copy = copy_bandwidth()
    speed = operation.bytes / benchmark.stats.stats.median
    benchmark.extra_info.update(
        operation=operation.name,
        case=operation.case,
        implementation=implementation,
        bytes=operation.bytes,
        graph=graph,
        GBps=speed / 1e9,
        copy_GBps=copy / 1e9,
        percent_of_copy=100 * speed / copy,
        device=torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        torch=torch.__version__,
    )
    keep(request.config, {"extra_info": dict(benchmark.extra_info), "stats": {"median": benchmark.stats.stats.median}})


def keep(config, row: dict) -> None:
    """Add a measurement to FILE, which is laid out as pytest-benchmark's own."""
    config.kernel_rows.append(row)
    if file := config.getoption("--rows"):
        Path(file).write_text(json.dumps({"benchmarks": config.kernel_rows}, indent=1) + "\n")
