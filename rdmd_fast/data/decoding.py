"""Decoding on worker processes, straight into memory that they share with this one.

Processes, not threads: at 64x64 most of a sample's time is spent under Python's lock.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import numpy as np

from rdmd_fast.data.store import BAD, GOOD, Store, forget_users
from rdmd_fast.errors import InputError

_CHUNK = 16  # samples a message asks for at most
_ORPHAN_SECONDS = 2.0  # how often an idle worker looks whether its parent lives


class Decoder:
    """Reads samples into a store's rows, ``workers`` processes at a time; 0 reads in line.

    Workers are forked at the first request. One that dies is replaced by this process.

    Args:
        read: sample ``index`` as an array, or InputError.
        store: where rows go; their status tells when.
        workers: processes.

    Attributes:
        faults: what was wrong with each sample that could not be read, by index.
    """

    def __init__(self, read: Callable[[int], np.ndarray], store: Store, workers: int):
        self._read, self._store, self._count = read, store, workers
        self._workers: dict[Connection, dict[int, tuple]] = {}  # the tasks that each has yet to do
        self._started = False
        self._tickets = 0
        self._open: set[int] = set()
        self.faults: dict[int, str] = {}

    def submit(self, indices: np.ndarray, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Start on samples ``indices``, each to its row; returns tickets to wait for, each with its samples."""
        if self._count and not self._started and len(indices):
            self._start()
        if not self._workers:
            self._do(indices, rows)
            return []
        size = min(_CHUNK, -(-len(indices) // len(self._workers)))
        chunks = [slice(at, at + size) for at in range(0, len(indices), size or 1)]
        return [(self._send((indices[chunk], rows[chunk])), indices[chunk]) for chunk in chunks]

    def wait(self, tickets: list[int]) -> None:
        """Until these are done."""
        while any(ticket in self._open for ticket in tickets):
            for connection in wait(list(self._workers)):
                self._receive(connection)

    def poll(self) -> None:
        """Take note of what has been done, without waiting."""
        for connection in wait(list(self._workers), timeout=0) if self._open else ():
            self._receive(connection)

    def _do(self, indices: np.ndarray, rows: np.ndarray) -> None:
        self.faults |= _decode(self._read, self._store, indices, rows)

    def _send(self, task: tuple) -> int:
        self._tickets += 1
        self._open.add(self._tickets)
        while self._workers:
            connection = min(self._workers, key=lambda each: len(self._workers[each]))
            self._workers[connection][self._tickets] = task
            try:
                connection.send((self._tickets, *task))
                return self._tickets
            except OSError:
                del self._workers[connection][self._tickets]
                self._bury(connection)
        self._do(*task)
        self._open.discard(self._tickets)
        return self._tickets

    def _receive(self, connection: Connection) -> None:
        if connection not in self._workers:
            return
        try:
            ticket, faults = connection.recv()
        except (EOFError, OSError):
            self._bury(connection)
            return
        self.faults |= faults
        del self._workers[connection][ticket]
        self._open.discard(ticket)

    def _bury(self, connection: Connection) -> None:
        print("warning: a decoding worker died (out of memory?); its work is done in line", file=sys.stderr)
        for ticket, task in self._workers.pop(connection).items():
            self._do(*task)
            self._open.discard(ticket)

    def _start(self) -> None:
        self._started = True
        pids: list[int] = []
        for _ in range(self._count):
            ours, theirs = multiprocessing.Pipe()
            parent = os.getpid()
            with warnings.catch_warnings():
                # The child runs nothing but this loop: no lock of another thread is taken in it.
                warnings.simplefilter("ignore", DeprecationWarning)
                try:
                    pid = os.fork()
                except OSError as error:
                    print(f"warning: no more decoding workers ({error.strerror}), fewer do", file=sys.stderr)
                    break
            if pid == 0:
                _work(theirs, self._read, self._store, parent)
            theirs.close()
            self._workers[ours] = {}
            pids.append(pid)
        weakref.finalize(self, _end, pids, os.getpid())


def _decode(read, store: Store, indices: np.ndarray, rows: np.ndarray) -> dict[int, str]:
    """Fill rows; returns what was wrong with those that could not be read."""
    faults = {}
    for index, row in zip(indices.tolist(), rows.tolist(), strict=True):
        try:
            store.samples[row] = read(index)
            store.status[row] = GOOD
        except InputError as error:
            faults[index] = str(error)
            store.status[row] = BAD
    return faults


def _work(connection: Connection, read, store: Store, parent: int) -> None:
    """A worker's life. It ends with its parent and leaves signals to it: one for the group must not stop both."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        forget_users()
        while os.getppid() == parent:
            if connection.poll(_ORPHAN_SECONDS):
                ticket, indices, rows = connection.recv()
                connection.send((ticket, _decode(read, store, indices, rows)))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _end(pids: list[int], owner: int) -> None:
    if os.getpid() != owner:
        return
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
