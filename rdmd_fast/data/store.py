"""Memory for decoded samples: the whole set, shared by a node's processes, or a window of it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

UNKNOWN, GOOD, BAD = 0, 1, 2
"""What is known of a sample: nothing, that it was read, that it cannot be read."""

SHARED_FOLDER = Path("/dev/shm")
_held: set[int] = set()  # descriptors whose locks say that this process uses their files


class Store:
    """Rows of samples that processes fill side by side.

    Attributes:
        samples: [rows, *shape], of the dtype asked for.
        status: uint8 [rows], UNKNOWN at first. A row's samples are written before its status.
        shared: whether other jobs and ranks on this node may be using it too.
    """

    def __init__(self, memory: mmap.mmap, rows: int, shape: tuple[int, ...], dtype, shared: bool):
        self.samples = np.frombuffer(memory, dtype, rows * int(np.prod(shape))).reshape(rows, *shape)
        self.status = np.frombuffer(memory, np.uint8, rows, offset=self.samples.nbytes)
        self.shared = shared


def bytes_needed(rows: int, shape: tuple[int, ...], dtype) -> int:
    return rows * (int(np.prod(shape)) * np.dtype(dtype).itemsize + 1)


def private_store(rows: int, shape: tuple[int, ...], dtype) -> Store:
    """Memory of this process and of those it forks; pages are taken as samples come in."""
    return Store(mmap.mmap(-1, bytes_needed(rows, shape, dtype)), rows, shape, dtype, shared=False)


def shared_store(identity: str, rows: int, shape: tuple[int, ...], dtype, folder: Path | None = None) -> Store:
    """Memory that all of this user's processes on the node share which open the same set; private if there is none.

    It lasts until its last user exits, however that ends; leftovers of dead processes are removed here.

    Args:
        identity: text that differs between sets and between states of one.
    """
    folder = folder or SHARED_FOLDER
    size = bytes_needed(rows, shape, dtype)
    identity = f"{identity} {rows} {shape} {np.dtype(dtype)}"
    path = folder / f"{_prefix()}{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    try:
        with _lock(folder):
            _sweep(folder)
            descriptor = _open(path, size)
            # Mapped by a descriptor of its own: a map keeps its file open, and with it the lock that leaving gives up.
            with open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        print(
            f"warning: {folder} cannot hold {size / 2**20:.0f} MiB of decoded samples ({error.strerror}): each process "
            "keeps its own; enlarge it (docker: --shm-size) or lower data.cache_gib",
            file=sys.stderr,
        )
        return private_store(rows, shape, dtype)
    store = Store(memory, rows, shape, dtype, shared=True)
    _held.add(descriptor)
    weakref.finalize(store, _leave, path, descriptor, os.getpid())
    return store


def forget_users() -> None:
    """In a forked worker: it uses stores as long as its parent does, whose locks it must not keep alive."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


def _prefix() -> str:
    return f"rdmd_fast-{os.getuid()}-"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time opens, removes or sweeps."""
    descriptor = os.open(folder / f"{_prefix()}lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path, size: int) -> int:
    """A descriptor that holds a shared lock as long as this process lives: the mark of a user."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size != size:
            # Reserved now: a full /dev/shm would kill the run later, without a word.
            os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.unlink(path)
        os.close(descriptor)
        raise
    return descriptor


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{_prefix()}*"):
        if path.name.endswith("lock"):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody uses it
                os.unlink(path)
            finally:
                os.close(descriptor)


def _leave(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child leaves nothing
        return
    _held.discard(descriptor)
    os.close(descriptor)
    with contextlib.suppress(OSError), _lock(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)
