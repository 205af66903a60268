"""Signals, the run folder's lock, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import InputError, WriteError

EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 2, 75

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


_held_locks: set[int] = set()


def _leave_locks_to_parent() -> None:
    """In a forked child: a lock lives as long as any process has its descriptor, and shall die with its owner."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_leave_locks_to_parent)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this job. The kernel drops the lock with the process, however that dies.

    ``RUN/.lock`` names that process, the main rank: its id, and in a second line its machine.

    Raises:
        InputError: the folder cannot be written, or another live job holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"run_dir {folder}: cannot be written ({error.strerror}), choose another") from None
    owner = os.getpid()
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run_dir {folder}: another job is training in it, choose another or stop that one"
            ) from None
        except OSError as error:  # some clusters mount Lustre without it
            reason = error.strerror
            print(
                f"warning: run_dir {folder}: no lock there ({reason}), see that no other job uses it", file=sys.stderr
            )
        _held_locks.add(descriptor)
        # For whoever wants to signal the job.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n{socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if os.getpid() == owner:
            _held_locks.discard(descriptor)
            os.close(descriptor)


def write_error(error: Exception, what: str | None = None) -> WriteError | None:
    """``error`` as a WriteError, one line, if it says that a file could not be written; else None.

    Args:
        what: names what was to be written; without it the error does.
    """
    number = error.errno if isinstance(error, OSError) else None
    foreign = type(error).__name__ == "SafetensorError"  # of its own, also for what the system says
    if foreign and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number is None and not foreign:
        return None
    what = what or getattr(error, "filename", None) or "the run folder"
    reason = os.strerror(number) if number else " ".join(str(error).split())[:120]
    remedy = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    return WriteError(f"{what}: cannot be written ({reason}), {remedy} or change run_dir")


def say(text: str) -> None:
    """Print a line; a run does not end because nobody reads what it says."""
    try:
        print(text, flush=True)
    except OSError:
        # What stays in the buffer would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders.
        if not (error.errno == errno.EINVAL and Path(path).is_dir()):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, whatever ends the process or the machine."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_path(partial)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    fsync_path(path.parent)


def append_line(path: Path, text: str) -> None:
    """Append a line; if the disk takes but a part of it, that is cut off again, or the next line would join it."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(f"{text}\n".encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Give ``partial``, whole and flushed, the name ``folder``.

    What has that name waits as ``.NAME.retired`` meanwhile: where a kill left ``folder`` missing, it is there.
    """
    retired = folder.with_name(f".{folder.name}.retired")
    if folder.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(folder, retired)
    try:
        os.replace(partial, folder)
    except OSError:
        if retired.exists() and not folder.exists():
            os.replace(retired, folder)
        raise
    fsync_path(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


def read_text(path: str | Path, most: int) -> str:
    """The text of a small file in UTF-8. Pipes and devices, on which reading may never end, are not opened.

    Raises:
        OSError, ValueError: not there, no regular file, more than ``most`` bytes, or no text.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > most:
        raise ValueError(f"larger than {most // 1024} KiB")
    with open(path, "rb") as file:
        content = file.read(status.st_size)
    return content.decode()
