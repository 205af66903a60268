"""Host synchronisations, counted without a GPU: reads on the host of what a GPU would have computed.

Every tensor that is computed from a tensor on the device is on the device. Told which tensors are there at first
(parameters, buffers, optimizer states, data), a dispatch mode follows their descendants, and counts the operations by
which the host would have to wait for one: reading numbers (`.item()`, `float(t)`, `bool(t)`, `.tolist()`), sizes that
depend on values (nonzero, masks as indices), `torch.equal`, copies to the host (`.cpu()` and `.to("cpu")` by that
name, any other when it is read from) and blocking copies from there (`torch.tensor(…, device=…)`, `copy_`). Code that
asks for a GPU's name first is not run, and its waits are not seen.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.network_passes import count_passes, passes_of

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2", "_unique2")


def _always(*_, **__) -> bool:
    return True


def _names_the_host(*arguments, **keywords) -> bool:
    """By the string: a device that a variable holds would be the GPU, as would DeepSpeed's name of the accelerator."""
    if "/deepspeed/" in sys._getframe(2).f_code.co_filename:
        return False
    return "cpu" in [value for value in (*arguments, *keywords.values()) if isinstance(value, str)]


class HostSyncs(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        on_device: tensors that a GPU run would have on the device.

    Attributes:
        counts: synchronisations by who waits: the name given to ``inside``, else "ours".
        places: (file:line of the innermost frame outside torch) of each, for messages.
        launches: operations that would launch a kernel: those that write a tensor on the device.
        operations: all of ATen's, and registered ones, that PyTorch dispatches: views and the host's own too.
    """

    def __init__(self, on_device: Iterable[torch.Tensor]):
        super().__init__()
        # A weak reference keeps the address from being used again, and none of the memory.
        self._storages: dict[int, StorageWeakRef] = {}
        self.counts: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.launches = self.operations = 0
        self._who = "ours"
        for tensor in on_device:
            self.mark(tensor)

    def __enter__(self):
        # These read memory without any operation that a mode would see.
        self._patches = contextlib.ExitStack()
        for name, waits in (("tolist", _always), ("numpy", _always), ("cpu", _always), ("to", _names_the_host)):
            self._patches.enter_context(unittest.mock.patch.object(torch.Tensor, name, self._reading(name, waits)))
        for name in ("tensor", "as_tensor"):
            self._patches.enter_context(unittest.mock.patch.object(torch, name, self._sending(name)))
        return super().__enter__()

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def _reading(self, name: str, waits: Callable[..., bool]):
        method = getattr(torch.Tensor, name)

        def read(tensor, *arguments, **keywords):
            if self._is_marked(tensor) and waits(*arguments, **keywords):
                self.wait()
            return method(tensor, *arguments, **keywords)

        return read

    def _sending(self, name: str):
        make = getattr(torch, name)

        def send(data, *arguments, device=None, **keywords):
            made = make(data, *arguments, device=device, **keywords)
            if device in (None, "cpu") or self._is_marked(data):
                return made
            self.wait()
            return self.mark(made)

        return send

    @contextlib.contextmanager
    def inside(self, who: str):
        """What waits in here is ``who``."""
        before, self._who = self._who, who
        try:
            yield
        finally:
            self._who = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        name = function.overloadpacket.__name__
        reads_device = any(self._is_marked(leaf) for leaf in tree_leaves((args, kwargs)))
        result = function(*args, **kwargs)
        if reads_device and (name in WAITING or self._index_by_mask(name, args) or self._blocking_copy(name, *args)):
            self.wait()
        if reads_device:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            for leaf in outputs:
                self.mark(leaf)
            self.launches += bool(outputs) and not function.is_view and not name.startswith(("empty", "new_empty"))
        return result

    def totals(self) -> dict[str, int]:
        """Give what was counted, for the results."""
        counts = {"host_syncs": sum(self.counts.values()), "launches": self.launches}
        return {**counts, "operations": self.operations}

    def wait(self, *_) -> None:
        """The host waits here. DeepSpeed waits in its hooks too, around what is ours."""
        place = self._place()
        who = "DeepSpeed (passes)" if self._who == "ours" and "/deepspeed/" in place else self._who
        self.counts[who] += 1
        self.places[f"{who}: {place}"] += 1

    def _index_by_mask(self, name: str, args) -> bool:
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return False
        return any(leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if leaf is not None)

    def _blocking_copy(self, name: str, to=None, source=None, non_blocking: bool = False, *_) -> bool:
        from_host = name == "copy_" and not non_blocking and self._is_marked(to) and not self._is_marked(source)
        # Collectives of CPUs copy by themselves.
        return from_host and not any("/torch/distributed/" in frame.filename for frame in traceback.extract_stack())

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Say that ``tensor`` is on the device."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def _is_marked(self, leaf) -> bool:
        if not isinstance(leaf, torch.Tensor):
            return False
        reference = self._storages.get(leaf.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    @staticmethod
    def _place() -> str:
        frames = traceback.extract_stack()
        frame = next(f for f in reversed(frames) if "/torch/" not in f.filename and f.filename != __file__)
        return f"{frame.filename}:{frame.lineno} {frame.name}"


# -- an iteration ------------------------------------------------------------------------------------------------------


def count_host(ours) -> dict:
    """Host synchronisations and launches of one iteration of ``benchmarks.step_sides.Ours``, without a GPU."""
    from deepspeed.accelerator import get_accelerator

    syncs = HostSyncs(ours.on_device())
    stage = ours.stage
    given = [(stage.source, "batch")]
    given += [(part, "draw") for part in (stage.generator_process, stage.fake_process, stage.transport_weights)]
    with contextlib.ExitStack() as stack:
        # DeepSpeed does not wait for a CPU: here it shall believe that it runs beside a device.
        accelerator, stream = type(get_accelerator()), Stream(syncs)
        for name, value in (
            ("synchronize", syncs.wait), ("resolves_data_dependency", lambda _: False),
            ("current_stream", lambda *_: stream), ("default_stream", lambda *_: stream),
        ):  # fmt: skip
            stack.enter_context(unittest.mock.patch.object(accelerator, name, value))
        for name, engine in ours.state.engines.items():
            for attribute in ("reduce_and_partition_stream", "reduction_stream"):
                if hasattr(engine.optimizer, attribute):
                    stack.enter_context(unittest.mock.patch.object(engine.optimizer, attribute, stream))
            who = _deepspeeds(name)
            stack.enter_context(_stepping_inside(engine, lambda who=who: syncs.inside(who)))
        for owner, name in given:
            stack.enter_context(returning_marked(syncs, owner, name))
        passes = stack.enter_context(count_passes(ours.networks()))
        stack.enter_context(syncs)
        ours.iteration()
    of = {"host_syncs_of": dict(syncs.counts), "places": dict(syncs.places)}
    return {**syncs.totals(), **of, "passes": passes_of(passes)}


class Stream:
    """Of DeepSpeed's on a device: the host waits in ``synchronize``, streams for each other without it."""

    def __init__(self, syncs: HostSyncs):
        self.synchronize = syncs.wait

    def wait_stream(self, _) -> None:
        pass


def _deepspeeds(engine: str) -> str:
    return f"DeepSpeed ({engine})"


@contextlib.contextmanager
def returning_marked(syncs: HostSyncs, owner, name: str):
    """What the method gives would be on the device."""
    method = getattr(owner, name)

    def giving(*arguments):
        result = method(*arguments)
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                syncs.mark(leaf)
        return result

    with unittest.mock.patch.object(owner, name, giving):
        yield


@contextlib.contextmanager
def _stepping_inside(engine, context: Callable):
    """Each step of ``engine`` inside a new ``context()``."""
    step = engine.step

    def stepping():
        with context():
            step()

    with unittest.mock.patch.object(engine, "step", stepping):
        yield


def count_on_gpu(run) -> dict:
    """The same by the profiler, on a GPU. Bytes are counted on a CPU, where every kernel is seen."""
    activities = torch.profiler.supported_activities()  # without CUDA's, as on the stand-in, there is nothing to count
    with contextlib.ExitStack() as stack:
        engines = run.state.engines if hasattr(run, "state") else {}  # the plain formulation has none
        for name, engine in engines.items():
            who = _deepspeeds(name)
            stack.enter_context(_stepping_inside(engine, lambda who=who: torch.profiler.record_function(who)))
        profiler = stack.enter_context(torch.profiler.profile(activities=activities))
        with torch.profiler.record_function(COUNTED):
            run.iteration()
    return counts_of(profiler.events())


COUNTED = "counted iteration"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def counts_of(events) -> dict:
    """Waits and kernels among the profiler's ``events``. The profiler itself waits for the device as it ends."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    counted = next(event for event in on_host if event.name == COUNTED)
    steps = [event for event in on_host if event.name.startswith("DeepSpeed (")]
    waits = Counter(
        next((step.name for step in steps if _holds(step, event)), "ours")
        for event in on_host
        if event.name in WAITS and _holds(counted, event)
    )
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return {"host_syncs": sum(waits.values()), "host_syncs_of": dict(waits), "launches": len(kernels)}


def _holds(outer, event) -> bool:
    return outer.time_range.start <= event.time_range.start < outer.time_range.end
