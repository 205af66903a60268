"""Makes a CPU build of PyTorch believe in one NVIDIA H200: cuda:0, computed by the CPU.

``install`` must come before anything that looks for a GPU. It loads what device.cpp builds, and puts in the place of
functions of ``torch.cuda`` those that speak of this device.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch
import torch.autograd.profiler
import torch.cuda.nccl

from tests.gpu_stand_in import build
from tests.gpu_stand_in.log import LAUNCH, WAIT, Log, Recorder

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, total_memory=150754820096, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    L2_cache_size=62914560, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, memory_bus_width=6144, memory_clock_rate=3201000, clock_rate=1980000,
    gcnArchName="", is_integrated=0, is_multi_gpu_board=0, uuid="0", pci_bus_id=0,
)  # fmt: skip
CAPABILITY = (H200.major, H200.minor)

report = Recorder()
_library: ModuleType | None = None


def library() -> ModuleType:
    """What device.cpp exports, once installed."""
    assert _library is not None, "the stand-in is not installed"
    return _library


def install(count: int = 1) -> None:
    """Put the device in place, ``count`` times: all of them are this process's memory."""
    global _library
    if _library is not None:
        return
    _library = build.load()
    _library.listen(report)
    report.refuses = lambda kind: kind != LAUNCH and _library.capturing()
    _library.set_device_count(count)
    os.environ["GPU_STAND_IN"] = "1"  # for tests that would choose larger shapes on a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    _replace_device_functions(count)
    _replace_memory_functions()
    _replace_random_functions()
    _replace_functions_of_c()
    _replace_profiler()
    _replace_storage_clone()


@contextlib.contextmanager
def recording() -> Iterator[Log]:
    """Log waits, copies and launches."""
    with report.recording(library().record) as log:
        yield log


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Count what a GPU is asked and leave out most of the work: results of products and kernels are not written."""
    library().compute_values(False)
    try:
        yield
    finally:
        library().compute_values(True)


# -- streams and events ------------------------------------------------------------------------------------------------


class Event:
    """Of a device that has always finished."""

    def __init__(self, *_, **__):
        self._time: float | None = None

    def record(self, *_) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        report(WAIT, "Event.synchronize")

    def wait(self, *_) -> None:
        """Have a stream wait, not the host."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if self._time is None or end._time is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._time - self._time) * 1e3


class Stream:
    """The only one."""

    cuda_stream, device_index, device_type, stream_id = 0, 0, 1, 0
    device = torch.device("cuda", 0)

    def __init__(self, *_, **__):
        pass

    def synchronize(self) -> None:
        report(WAIT, "Stream.synchronize")

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def __eq__(self, other) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        pass


class _StreamContext(contextlib.nullcontext):
    """``torch.cuda.stream`` and ``torch.cuda.StreamContext``: there is no other stream to change to."""


class _DeviceContext:
    """``torch.cuda.device``."""

    def __init__(self, device):
        self.idx = _index(device, default=-1)

    def __enter__(self) -> None:
        self.prev_idx = library().exchange_device(self.idx)

    def __exit__(self, *_) -> bool:
        library().exchange_device(self.prev_idx)
        return False


class _DeviceOfContext(_DeviceContext):
    """``torch.cuda.device_of``."""

    def __init__(self, tensor):
        super().__init__(tensor.get_device() if tensor.is_cuda else -1)


def _index(device, default: int) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return default if index is None else index


# -- functions of torch ------------------------------------------------------------------------------------------------


def _replace(module, **functions) -> None:
    for name, function in functions.items():
        setattr(module, name, function)


def _always(value):
    return lambda *_, **__: value


def _replace_device_functions(count: int) -> None:
    exchange = library().exchange_device
    stream = Stream()
    _replace(
        torch.cuda, is_available=_always(True), device_count=_always(count), init=_always(None),
        _lazy_init=_always(None), _initialized=True, is_initialized=_always(True), _is_in_bad_fork=_always(False),
        current_device=library().current_device, set_device=lambda device: exchange(_index(device, 0)) and None,
        _exchange_device=exchange, _maybe_exchange_device=lambda index: exchange(index),  # Dynamo tells them apart
        device=_DeviceContext, device_of=_DeviceOfContext, get_device_name=_always(H200.name),
        get_device_capability=_always(CAPABILITY), get_device_properties=_always(H200),
        get_arch_list=_always(["sm_90"]), is_bf16_supported=_always(True),
        can_device_access_peer=_always(True), ipc_collect=_always(None), _sleep=_always(None),
        synchronize=lambda device=None: report(WAIT, "torch.cuda.synchronize"), Event=Event, Stream=Stream,
        current_stream=_always(stream), default_stream=_always(stream), set_stream=_always(None),
        stream=_StreamContext, StreamContext=_StreamContext,
    )  # fmt: skip
    torch.version.cuda = "13.0"
    torch.has_cuda = True
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.cuda.nccl.version = _always((2, 28, 9))


def _replace_memory_functions() -> None:
    allocated, peak, reset = (lambda device=None, read=read: read() for read in _memory_readers())
    functions = {
        "memory_allocated": allocated, "memory_reserved": allocated, "memory_cached": allocated,
        "max_memory_allocated": peak, "max_memory_reserved": peak, "max_memory_cached": peak,
        "reset_peak_memory_stats": reset, "reset_max_memory_allocated": reset, "reset_max_memory_cached": reset,
        "mem_get_info": lambda device=None: (H200.total_memory - allocated(), H200.total_memory),
        "memory_stats": lambda device=None: defaultdict(int), "memory_snapshot": _always([]),
        "empty_cache": _always(None),
    }  # fmt: skip
    _replace(torch.cuda, **functions)
    _replace(torch.cuda.memory, **functions)


def _memory_readers():
    return library().allocated, library().peak, library().reset_peak


def _replace_random_functions() -> None:
    """The device's generator is the host's, which seeding the host seeds."""
    _replace(
        torch.cuda, manual_seed=_always(None), manual_seed_all=_always(None), initial_seed=_always(0),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )  # fmt: skip


def _replace_functions_of_c() -> None:
    """Functions that only a CUDA build has, which the rest of PyTorch calls by these names."""
    exchange = library().exchange_device
    _replace(
        torch._C, _cuda_getCurrentRawStream=_always(0), _cuda_getDevice=library().current_device,
        _cuda_setDevice=exchange, _cuda_exchangeDevice=exchange, _cuda_maybeExchangeDevice=exchange,
        _cuda_canDeviceAccessPeer=_always(True),
        _cuda_cudaCachingAllocator_is_enabled=_always(True),
    )  # fmt: skip


class _Range(contextlib.ContextDecorator):
    """``torch.cuda.nvtx.range``."""

    def __init__(self, *_):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


def _replace_profiler() -> None:
    """The profiler has no kernels to show; without an activity of that name it would ask CUDA for events."""
    supported = {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA}
    _replace(torch.autograd.profiler, _supported_activities=_always(supported))
    _replace(torch.cuda.nvtx, range=_Range, range_push=_always(0), range_pop=_always(0), mark=_always(None))


def _replace_storage_clone() -> None:
    """``copy.deepcopy`` of tensors clones storages, by way of a function that only a CUDA build has."""
    of_host = torch.UntypedStorage.clone

    def clone(storage):
        if storage.device.type != "cuda":
            return of_host(storage)
        bytes_ = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (storage.nbytes(),), (1,))
        return bytes_.clone().untyped_storage()

    torch.UntypedStorage.clone = clone
