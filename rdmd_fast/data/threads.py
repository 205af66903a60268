"""Work on threads, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rdmd_fast.processes.launchers import granted_cores

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """``function(job)`` of each job in order, computed on ``workers`` threads, ``ahead`` (2 a worker) at most ahead.

    Threads, not processes: Pillow decodes, resizes and encodes outside Python's lock.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    most = 2 * workers if ahead is None else ahead
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            # A bounded window: pool.map would hold every result at once.
            if len(pending) > most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """One thread a core that this process may use, 16 at most."""
    return min(16, granted_cores())
