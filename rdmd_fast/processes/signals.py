"""Signals, the run folder's lock, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

# Launchers deliver a signal twice (once to the group, once by themselves): a repeat this soon is the same request.
REPEAT_SECONDS = 5.0
WATCH_SECONDS = 1.0  # between looks at whether the launcher lives


class StopRequest(NamedTuple):
    """Why a run is to stop: the name of a signal, or what has happened."""

    name: str


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask for a stop after the running iteration; insisting ends the process at once.

    Args:
        launched: a launcher started this process: its end, however it comes, asks for a stop too, since nobody would
            be left to signal.
    """

    def __init__(self, launched: bool = False):
        self.requested: StopRequest | None = None
        self._first = 0.0
        self._ancestors = _launchers() if launched else []

    def __enter__(self) -> StopSignal:
        return self.hold()

    def __exit__(self, *exception) -> None:
        self.release()

    def hold(self) -> StopSignal:
        """From now on signals are requests."""
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        if self._ancestors:
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()
        return self

    def release(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """The exit status is decided: a launcher that signals a process on its way out shall not change it."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number, frame) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._first = StopRequest(signal.Signals(number).name), now
        elif now - self._first > REPEAT_SECONDS:
            # The last published checkpoint is whole whatever is being written now.
            os._exit(128 + number)

    def _watch(self) -> None:
        while self._launchers_live():
            time.sleep(WATCH_SECONDS)
        if self.requested is None:
            self.requested, self._first = StopRequest("the end of its launcher"), time.monotonic()

    def _launchers_live(self) -> bool:
        parent, *runner = self._ancestors
        if os.getppid() != parent:
            return False
        # Unknown is not dead: /proc may not be readable for a moment.
        return not runner or _parent_of(parent) in (*runner, None)


def _launchers() -> list[int]:
    """The process that started this one, and what started that if both are DeepSpeed's (or a login over ssh's).

    `deepspeed` runs a launcher on each machine that outlives it. Other ancestors may go: with nohup, a shell does.
    """
    parent = os.getppid()
    if b"deepspeed.launcher" not in _command(parent):
        return [parent]
    grandparent = _parent_of(parent)
    started_by = _command(grandparent)
    return [parent, grandparent] if b"deepspeed" in started_by or started_by.startswith(b"sshd") else [parent]


def _parent_of(process: int) -> int | None:
    """None where /proc does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The command's name, in brackets, may hold anything; after it come state and parent.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _command(process: int | None) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""
