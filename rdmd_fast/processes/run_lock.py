"""The run folder's lock."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.files import make_folder, owner_of

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
    descriptor = _open_lock(folder)
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


def _open_lock(folder: Path) -> int:
    """The lock's file, open to every account that the folder's modes let train there."""
    lock = folder / ".lock"
    try:
        make_folder(folder)
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if isinstance(error, PermissionError) and os.access(folder, os.W_OK | os.X_OK):
            # To lock it, reading would do; but it must name the job that holds it.
            owner = owner_of(lock)
            raise InputError(
                f"run_dir {folder}: its lock may be taken by {owner} alone (mode {lock.stat().st_mode & 0o777:04o}), "
                f"let {owner} run `chmod g+w {lock}`, or remove it while no job trains there"
            ) from None
        raise InputError(f"run_dir {folder}: cannot be written ({error.strerror}), choose another") from None
