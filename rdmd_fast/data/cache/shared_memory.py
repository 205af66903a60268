"""Memory for decoded samples: the whole set, shared by a node's processes, or a window of it."""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

SHARED_FOLDER = Path("/dev/shm")


class Store:
    """Rows of samples that processes fill side by side.

    Args:
        descriptor: of the memory, from now on this one's.
        rows, shape, dtype: of the samples.
        leave: called when this is closed or collected or the process ends; given if others may use the memory too.

    Attributes:
        samples: [rows, *shape], of the dtype asked for.
        status: uint8 [rows], ``sample_reader.UNKNOWN`` at first. A row's samples are written before its status.
        memory: samples, then status, as bytes.
        descriptor: of the memory, for workers to map.
        shared: whether other jobs and ranks on this node may be using it too.
    """

    def __init__(
        self, descriptor: int, rows: int, shape: tuple[int, ...], dtype, leave: Callable[[], None] | None = None
    ):
        self.descriptor, self.shared = descriptor, leave is not None
        self.memory = mmap.mmap(descriptor, bytes_needed(rows, shape, dtype))
        self.samples = np.frombuffer(self.memory, dtype, rows * int(np.prod(shape))).reshape(rows, *shape)
        self.status = np.frombuffer(self.memory, np.uint8, rows, offset=self.samples.nbytes)
        self._release = weakref.finalize(self, _release, descriptor, leave)

    def close(self) -> None:
        """Give the memory back; ``samples`` and ``status`` are empty from now on."""
        self._release()
        self.memory, self.samples, self.status = None, self.samples[:0].copy(), self.status[:0].copy()


def bytes_needed(rows: int, shape: tuple[int, ...], dtype) -> int:
    return rows * (int(np.prod(shape)) * np.dtype(dtype).itemsize + 1)


def private_store(rows: int, shape: tuple[int, ...], dtype) -> Store:
    """Memory of this process and of its workers; pages are taken as samples come in."""
    descriptor = os.memfd_create("rdmd_fast-samples")
    os.ftruncate(descriptor, bytes_needed(rows, shape, dtype))
    return Store(descriptor, rows, shape, dtype)


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
            leave = partial(_leave, path, _open(path, size), os.getpid())
            # Mapped by a descriptor of its own: a map keeps its file open, and with it the lock that leaving gives up.
            store = Store(os.open(path, os.O_RDWR | os.O_CLOEXEC), rows, shape, dtype, leave)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        print(
            f"warning: {folder} cannot hold {size / 2**20:.0f} MiB of decoded samples ({error.strerror}): each process "
            "keeps its own; enlarge it (docker: --shm-size) or lower data.cache_gib",
            file=sys.stderr,
        )
        return private_store(rows, shape, dtype)
    return store


def _release(descriptor: int, leave: Callable[[], None] | None) -> None:
    os.close(descriptor)
    if leave is not None:
        leave()


def _prefix() -> str:
    return f"rdmd_fast-{os.getuid()}-"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time opens, removes or sweeps.

    Modes here are for one account, whatever its umask: everyone may write in /dev/shm, and what is mapped is trusted.
    """
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
    os.close(descriptor)
    with contextlib.suppress(OSError), _lock(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)
