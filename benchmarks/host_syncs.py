"""Host synchronisations, counted without a GPU: reads on the host of what a GPU would have computed.

Every tensor that is computed from a tensor on the device is on the device. Told which tensors are there at first
(parameters, buffers, optimizer states, data), a dispatch mode follows their descendants, and counts the operations by
which the host would have to wait for one: reading numbers (`.item()`, `float(t)`, `bool(t)`, `.tolist()`), sizes that
depend on values (nonzero, masks as indices), `torch.equal`, and copies to the host: `.cpu()` and `.to("cpu")` by that
name, any other when it is read from. Code that asks for a GPU's name first is not run, and its waits are not seen.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """

    def __init__(self, on_device: Iterable[torch.Tensor]):
        super().__init__()
        # A weak reference keeps the address from being used again, and none of the memory.
        self._storages: dict[int, StorageWeakRef] = {}
        self.counts: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.launches = 0
        self._who = "ours"
        for tensor in on_device:
            self.mark(tensor)

    def __enter__(self):
        # These read memory without any operation that a mode would see.
        self._patches = contextlib.ExitStack()
        for name, waits in (("tolist", _always), ("numpy", _always), ("cpu", _always), ("to", _names_the_host)):
            self._patches.enter_context(unittest.mock.patch.object(torch.Tensor, name, self._reading(name, waits)))
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
        name = function.overloadpacket.__name__
        reads_device = any(self._is_marked(leaf) for leaf in tree_leaves((args, kwargs)))
        result = function(*args, **kwargs)
        if reads_device and (name in WAITING or self._index_by_mask(name, args)):
            self.wait()
        if reads_device:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            for leaf in outputs:
                self.mark(leaf)
            self.launches += bool(outputs) and not function.is_view and not name.startswith(("empty", "new_empty"))
        return result

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
