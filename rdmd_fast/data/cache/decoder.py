"""Decoding into a store's rows, by worker processes and by the process that waits for them.

Processes, not threads: at 64x64 most of a sample's time is spent under Python's lock.
"""

import sys
from collections import deque
from collections.abc import Collection

from rdmd_fast.data.cache.shared_memory import Store
from rdmd_fast.data.cache.worker_pool import WorkerPool
from rdmd_fast.data.cache.worker_process import TASK_SAMPLES
from rdmd_fast.data.shards.sample_reader import fill
from rdmd_fast.data.shards.shard_set import ShardSet

_TASK_BYTES = 1 << 18  # decoded, that a task holds at most, but for one larger sample
_DEATHS = 3  # of workers, after which none is started any more
_LOOK_SECONDS = 0.1  # how often a process that waits looks whether its workers live


class Decoder:
    """Reads samples into a store's rows on ``workers`` processes; 0 reads in line.

    Workers start at the first request. Who waits for samples decodes what no worker has begun: until they have
    started, that is everything.

    Args:
        shards: the samples.
        store: where rows go; their status tells when.
        workers: processes.

    Attributes:
        faults: what was wrong with each sample that could not be read, by index.
    """

    def __init__(self, shards: ShardSet, store: Store, workers: int):
        self._shards, self._store, self._count = shards, store, workers
        self._pool: WorkerPool | None = None
        self._deaths = 0
        self._tickets = 0
        self._open: dict[int, list[tuple[int, int]]] = {}  # tasks that are not done, by ticket
        self._unsent: deque[int] = deque()  # tickets of those for which the queue had no room yet
        row = store.samples[0].nbytes if len(store.samples) else 1
        self._task_samples = max(1, min(TASK_SAMPLES, _TASK_BYTES // max(1, row)))
        self.faults: dict[int, str] = {}

    def submit(self, pairs: list[tuple[int, int]]) -> dict[int, int]:
        """Start on samples, each with its row; returns, by sample, the tickets to wait for: none if all is done."""
        if not pairs:
            return {}
        if self._count and self._pool is None:
            self._start()
        if self._pool is None:
            self._fill(pairs)
            return {}
        tickets = {}
        for at in range(0, len(pairs), self._task_samples):
            task = pairs[at : at + self._task_samples]
            self._tickets += 1
            self._open[self._tickets] = task
            self._unsent.append(self._tickets)
            tickets |= dict.fromkeys((index for index, _ in task), self._tickets)
        self.poll()
        return tickets

    def wait(self, tickets: Collection[int]) -> None:
        """Until these are done; meanwhile this process decodes what no worker has begun."""
        while not self._open.keys().isdisjoint(tickets):
            self._hand_out()
            if self._note():
                continue
            task = self._pool.take()
            if task is not None:
                ticket, pairs = task
                self._fill(pairs)
                del self._open[ticket]
            elif not self._unsent and not self._note(_LOOK_SECONDS):
                self._look_after_workers()

    def poll(self) -> None:
        """Take note of what has been done and hand out what has not, without waiting."""
        if self._pool is None:
            return
        self._note()
        self._hand_out()
        self._look_after_workers()

    def close(self) -> None:
        """End the workers; what they have not done stays undone."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._count = 0
        self._open.clear()
        self._unsent.clear()

    def _fill(self, pairs: list[tuple[int, int]]) -> None:
        faults = fill(self._shards.reader, self._store.memory, len(self._store.status), pairs)
        for index, fault in faults.items():
            self._blame(index, fault)

    def _hand_out(self) -> None:
        """Queue what the queue has room for."""
        while self._unsent and self._pool.put(self._unsent[0], self._open[self._unsent[0]]):
            self._unsent.popleft()

    def _blame(self, index: int, fault: str) -> None:
        self.faults[index] = f"{self._shards.where(index)} {fault}"

    def _note(self, seconds: float = 0.0) -> bool:
        """Take in reports; whether there were any."""
        reports = self._pool.reports(seconds)
        for ticket, index, fault in reports:
            if fault is None:
                self._open.pop(ticket, None)
            else:
                self._blame(index, fault)
        return bool(reports)

    def _start(self) -> None:
        try:
            self._pool = WorkerPool(self._shards.reader, self._store, self._count)
        except OSError as error:
            print(f"warning: no decoding worker could be started ({error.strerror}), decoding in line", file=sys.stderr)
            self._count = 0

    def _look_after_workers(self) -> None:
        """Where one has died, nobody knows what it had begun: all of them end, and what is open is done here."""
        status = self._pool.dead()
        if status is None:
            return
        self._pool.close()
        self._pool = None
        self._deaths += 1
        if self._deaths == _DEATHS:
            self._count = 0
        print(
            f"warning: a decoding worker died (status {status}; out of memory?); its work is done in line, "
            + ("new workers go on" if self._count else "as is all that follows"),
            file=sys.stderr,
        )
        self._unsent.clear()
        while self._open:
            self._fill(self._open.popitem()[1])
