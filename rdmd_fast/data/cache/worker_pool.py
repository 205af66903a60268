"""Decoding workers: fresh, small processes that share one queue with the process that started them.

They are never forks of it: a training process is large, holds threads and a CUDA context. They inherit open shards,
the table of samples and the store's memory by descriptor; the queue is a pipe of fixed records, from which whoever is
idle takes the next, the starting process as well.
"""

import os
import select
import signal
import subprocess
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path

from rdmd_fast.data.cache.shared_memory import Store
from rdmd_fast.data.cache.worker_process import REPORT, TASK, read_task, task_record
from rdmd_fast.data.shards.sample_reader import SampleReader

# Signals are for the training process: one for the whole group must not end its workers before it has saved.
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PACKAGE_PARENT = str(Path(__file__).parents[3])
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(10)); from rdmd_fast.data.cache.worker_process import main; "
    "main(*map(int, sys.argv[2:]))"
)


class WorkerPool:
    """Workers that fill a store's rows.

    Args:
        reader: of the samples.
        store: where rows go.
        count: of the workers. They are starting when this returns; fewer if the system has no room.

    Raises:
        OSError: not one could be started.
    """

    def __init__(self, reader: SampleReader, store: Store, count: int):
        self._unread = b""
        self._processes: list[subprocess.Popen] = []
        descriptors: list[int] = []  # open until the end
        self._end = weakref.finalize(self, _end, self._processes, descriptors, os.getpid())
        with ExitStack() as starting:  # what is open until the workers have it
            try:
                descriptors += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                self._tasks, self._tasks_in = descriptors
                self._reports, reports_in = os.pipe2(os.O_CLOEXEC)
                descriptors.append(self._reports)
                starting.callback(os.close, reports_in)
                table = reader.to_descriptor()
                starting.callback(os.close, table)
                for _ in range(count):
                    self._processes.append(_start(reader, store, table, self._tasks, reports_in))
            except OSError as error:
                if not self._processes:
                    self.close()
                    raise
                print(
                    f"warning: {len(self._processes)} of {count} decoding workers started ({error.strerror})",
                    file=sys.stderr,
                )
        os.set_blocking(self._reports, False)
        self._poll = select.poll()  # select.select takes no descriptor from 1024 up
        self._poll.register(self._reports, select.POLLIN)

    def put(self, ticket: int, pairs: list[tuple[int, int]]) -> bool:
        """Queue a task of at most TASK_SAMPLES (sample, row); False if the queue is full."""
        try:
            return os.write(self._tasks_in, task_record(ticket, pairs)) == TASK.size
        except BlockingIOError:
            return False

    def take(self) -> tuple[int, list[tuple[int, int]]] | None:
        """The queue's oldest task that no worker has begun, now the caller's."""
        try:
            return read_task(os.read(self._tasks, TASK.size))
        except BlockingIOError:
            return None

    def reports(self, seconds: float = 0.0) -> list[tuple[int, int, str | None]]:
        """What came within ``seconds``: (ticket, sample, what is wrong with it), (ticket, 0, None) of a done task."""
        if seconds:
            self._poll.poll(1000 * seconds)
        try:
            self._unread += os.read(self._reports, 1 << 16)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at + REPORT.size <= len(self._unread):
            ticket, index, length = REPORT.unpack_from(self._unread, at)
            end = at + REPORT.size + max(length, 0)
            if end > len(self._unread):
                break
            text = None if length < 0 else self._unread[at + REPORT.size : end].decode(errors="replace")
            found.append((ticket, index, text))
            at = end
        self._unread = self._unread[at:]
        return found

    def dead(self) -> int | None:
        """Exit status of a worker that has ended, by Popen's signs; None if all live."""
        return next((status for process in self._processes if (status := process.poll()) is not None), None)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._end()


def _start(reader: SampleReader, store: Store, table: int, tasks: int, reports: int) -> subprocess.Popen:
    inherited = [table, store.descriptor, tasks, reports]
    numbers = [table, store.descriptor, len(store.status), tasks, reports, os.getpid()]
    path = "\n".join([*(each for each in sys.path if isinstance(each, str)), _PACKAGE_PARENT])
    # Blocked before the start, so that there is no moment at which a signal finds a worker unprepared.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_PARENT)
    try:
        return subprocess.Popen(
            # Without site's search for packages, whose result is in the path: it is half of the start.
            [sys.executable, "-S", "-c", _PROGRAM, path, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[*inherited, *(file for file in reader.files if file is not None)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: list[subprocess.Popen], descriptors: list[int], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner has nothing to end
        return
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for descriptor in descriptors:
        os.close(descriptor)
