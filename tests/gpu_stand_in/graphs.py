"""CUDA graphs: a capture runs each operation and keeps it with its addresses; a replay runs them again in that memory.

Whatever lies at these addresses by then is read and overwritten, as on a GPU; memory that was freed meanwhile is an
error. Waits and copies between host and device are refused in a capture.
"""

from __future__ import annotations

import itertools

import torch

from tests.gpu_stand_in import device
from tests.gpu_stand_in.log import LAUNCH

_numbers = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(_numbers)


class CUDAGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False):
        self._number, self._pool, self._captured = next(_numbers), graph_pool_handle(), False

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode="global", **_) -> None:
        self._pool = pool or self._pool
        device.library().begin_capture(self._number, self._pool[1])

    def capture_end(self) -> None:
        device.library().end_capture()
        self._captured = True

    def replay(self) -> None:
        if not self._captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        device.report(LAUNCH, "cuda::graph")
        device.library().replay(self._number)

    def reset(self) -> None:
        device.library().forget(self._number)
        self._captured = False

    def pool(self) -> tuple[int, int]:
        return self._pool


def install() -> None:
    """In the place of what ``torch.cuda.graph`` and ``make_graphed_callables`` use."""
    torch.cuda.CUDAGraph = torch.cuda.graphs.CUDAGraph = CUDAGraph
    torch.cuda.graph_pool_handle = torch.cuda.graphs.graph_pool_handle = graph_pool_handle
    torch._C._host_emptyCache = lambda: None
    capturing = device.library().capturing
    torch.cuda.is_current_stream_capturing = torch._C._cuda_isCurrentStreamCapturing = capturing
