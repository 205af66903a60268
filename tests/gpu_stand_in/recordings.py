"""Stands in for the CUDA graphs of torch.compile: which passes would be recorded, and what replaying them overwrites.

As in PyTorch's trees of graphs, a pass is recorded for each sequence of passes since the last mark (or since nothing of
an earlier one was held), and for each place of the parameters. At the first pass after a mark, all that earlier ones
have put out and that is still held becomes NaN: outputs, activations kept for a backward pass, gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

ALL_BITS = 255  # NaN in every floating-point type


class Recordings:
    """Of one process.

    Attributes:
        count: of passes that were recorded.
    """

    def __init__(self):
        self.count = 0
        self._numbers = itertools.count()
        self._first: dict = {}
        self._next = self._first  # passes that have followed on those since the last mark
        self._given: dict[int, StorageWeakRef] = {}  # by address
        self._copied: set[int] = set()  # a graph has copies of its inputs, at fixed places
        self._mark: int | None = None

    def cudagraphify(self, model: Callable, static_input_idxs: Sequence[int] = (), **_) -> Callable:
        """In the place of Inductor's function of that name: a compiled pass ``model``, as if recorded."""
        number, static = next(self._numbers), set(static_input_idxs)

        def run(inputs: list) -> Sequence:
            self._begin()
            places = {index: _place(each) for index, each in enumerate(inputs) if torch.is_tensor(each)}
            moving = {place for index, place in places.items() if index not in static}
            fixed = (place for index, place in places.items() if index in static)
            pass_ = number, *(place for place in fixed if place not in self._given and place not in self._copied)
            self.count += pass_ not in self._next
            self._next = self._next.setdefault(pass_, {})
            self._copied |= moving - self._given.keys()
            outputs = model(list(inputs))
            for output in outputs:
                if torch.is_tensor(output) and _place(output) not in places.values():
                    self._given[_place(output)] = StorageWeakRef(output.untyped_storage())
            return outputs

        return run

    def _begin(self) -> None:
        from torch._inductor.cudagraph_trees import MarkStepBox

        self._given = {place: each for place, each in self._given.items() if not each.expired()}
        if MarkStepBox.mark_step_counter != self._mark:
            self._mark = MarkStepBox.mark_step_counter
            for each in self._given.values():
                storage = torch.UntypedStorage._new_with_weak_ptr(each.cdata)
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).fill_(ALL_BITS)
            self._given.clear()
        if not self._given:
            self._next = self._first
            self._copied.clear()


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


recordings = Recordings()
