"""Which tensors' memory is alive, operation by operation: on real tensors, or on shapes alone (the meta device)."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations make while this is active, from their making to their end.

    Memory that an operation takes inside and gives back is not seen (workspaces of convolutions).

    Attributes:
        live, peak: bytes now, and at the most since the start or ``reset_peak``.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """``known`` tensors, such as parameters, are not counted."""
        super().__init__()
        self.live = self.peak = 0
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._known = {storage._cdata for storage in self._kept}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in function._schema.returns):  # views and in-place results
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def reset_peak(self) -> None:
        self.peak = self.live
