"""Clocks and bandwidth. On a GPU a round is timed by events on the device, with the L2 cache flushed before it."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
LARGE = CUDA and "GPU_STAND_IN" not in os.environ  # what stands in for a GPU computes as slowly as a CPU
DEVICE = torch.device("cuda" if CUDA else "cpu")


class _Instant:
    """A recorded event; the difference of two waits for the device and is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: _Instant) -> float:
        torch.cuda.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def clock():
    """The timer handed to pytest-benchmark: an event on a GPU, seconds elsewhere."""
    return _Instant() if CUDA else time.perf_counter()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty((256 if LARGE else 1) * 2**20, dtype=torch.int8, device=DEVICE)  # larger than any L2


def flush() -> None:
    """Evict the L2 cache, then keep the device busy while the host enqueues what is to be timed."""
    if CUDA:
        _flush_buffer().zero_()
        torch.cuda._sleep(5_000_000)  # some 2.5 ms: host time of a round, of 400 launches even, stays hidden


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """``function`` captured as a CUDA graph: what remains when launches cost the host nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying a tensor far larger than the caches."""
    source = torch.ones((512 if LARGE else 32) * 2**20, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20 if LARGE else 5):
        flush()
        start = clock()
        target.copy_(source)
        seconds.append(clock() - start)
    return 2 * source.numel() / sorted(seconds)[len(seconds) // 2]
