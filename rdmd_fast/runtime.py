"""Signals, the run folder's lock and atomic writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 2, 75

# Launchers deliver a signal twice (once to the group, once by themselves): a repeat this soon is the same request.
REPEAT_SECONDS = 5.0


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask for a stop after the running iteration; insisting ends the process at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        self._first = 0.0

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._first = signal.Signals(number), now
        elif now - self._first > REPEAT_SECONDS:
            # The last published checkpoint is whole whatever is being written now.
            os._exit(128 + number)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this job. The kernel drops the lock with the process, however that dies.

    Raises:
        InputError: the folder cannot be written, or another live job holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"run_dir {folder}: cannot be written ({error.strerror}), choose another") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run_dir {folder}: another job is training in it, choose another or stop that one"
            ) from None
        yield
    finally:
        os.close(descriptor)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync_path(partial)
    os.replace(partial, path)


def read_text(path: str | Path, most: int) -> str:
    """The text of a small file in UTF-8. Pipes and devices, on which reading may never end, are not opened.

    Raises:
        OSError, ValueError: not there, no regular file, more than ``most`` bytes, or no text.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most // 1024} KiB")
    return content.decode()
