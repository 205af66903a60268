"""What a GPU would have been asked, and by whom: waits of the host, copies, launches and their bytes, by place."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
WAIT, COPY, LAUNCH, BYTE = "wait", "copy", "launch", "byte"
KINDS = (WAIT, COPY, LAUNCH, BYTE)
"""A byte is one that a launch reads or writes."""
# Operations of the backward pass run in threads of PyTorch's own, below no frame of Python.
AUTOGRAD = "autograd"
ELSEWHERE = "elsewhere"


def place_of(frame: FrameType | None) -> str:
    """``file:function`` of the innermost frame that is ours or DeepSpeed's: what a reader could change.

    Functions, not lines: these change with every edit above them.

    Args:
        frame: of the caller, in the stand-in.
    """
    if frame.f_back is None:
        return AUTOGRAD
    while frame is not None:
        file = _named(frame.f_code.co_filename)
        if file:
            return f"{file}:{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back
    return ELSEWHERE


def _named(file: str) -> str | None:
    """The file's name in a place, None if it is neither ours nor DeepSpeed's, or the stand-in's own."""
    if "/site-packages/" in file:
        name = file.split("/site-packages/")[-1]
        return name if name.startswith("deepspeed/") else None
    if not file.startswith(f"{ROOT}/"):
        return None
    name = file[len(str(ROOT)) + 1 :]
    if name.startswith("rdmd_fast/kernels/"):  # a link in some checkouts
        name = name.removeprefix("rdmd_fast/")
    return None if name.startswith("tests/gpu_stand_in/") and not name.endswith("_cases.py") else name


class Log:
    """Counts while ``recording``.

    Attributes:
        counts: by (kind, place).
        operations: by (kind, operation, place), to find what one place asked.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[tuple[str, str, str]] = Counter()

    def add(self, kind: str, operation: str, place: str, count: int = 1) -> None:
        self.counts[kind, place] += count
        self.operations[kind, operation, place] += count

    def total(self, kind: str, counted: Callable[[str], bool] = lambda place: True) -> int:
        """Count what is of one kind, in places for which ``counted`` is true."""
        return sum(count for (its, place), count in self.counts.items() if its == kind and counted(place))

    def table(self, kind: str) -> dict[str, int]:
        """Counts by place, in the order of places."""
        return {place: count for (its, place), count in sorted(self.counts.items()) if its == kind}

    def lines(self, kind: str) -> list[str]:
        """One line for each operation at each place, for messages."""
        chosen = [(count, place, what) for (its, what, place), count in self.operations.items() if its == kind]
        return [f"{count} x {what} at {place}" for count, place, what in sorted(chosen, reverse=True)]


class Recorder:
    """Where reports go: to the log that is being kept, or nowhere.

    Attributes:
        refuses: whether the device may not be asked a kind of thing now, as a wait while a graph is captured.
    """

    def __init__(self) -> None:
        self._log: Log | None = None
        self.refuses: Callable[[str], bool] = lambda kind: False

    def __call__(self, kind: str, operation: str, size: int = 0) -> None:
        if self.refuses(kind):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation})")
        log = self._log
        if log is not None:
            place = place_of(sys._getframe())
            log.add(kind, operation, place)
            if size:
                log.add(BYTE, operation, place, size)

    @contextlib.contextmanager
    def recording(self, switch: Callable[[bool], None]) -> Iterator[Log]:
        """Keep a log; ``switch`` tells the device that somebody listens."""
        log = Log()
        self._log = log
        switch(True)
        try:
            yield log
        finally:
            switch(False)
            self._log = None
