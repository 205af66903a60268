"""How a rank ends when something breaks: the error that came first stands on top, and nobody waits for the dead."""

import atexit
import contextlib
import hashlib
import os
import re
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import NoReturn

from rdmd_fast.errors import EXIT_BAD_INPUT
from rdmd_fast.processes.launchers import place

EXIT_BROKEN = 1

MEETING_SECONDS = 5.0  # that ranks with bad input wait for others to find the same
_SILENCE = re.compile(r"timed out|timeout", re.IGNORECASE)
# What gloo and NCCL say of a peer that is gone, unlike what they say of an interface or a GPU that is wrong here.
_LOST_PEER = re.compile(
    r"gloo|Connection (closed|reset)|Broken pipe|timed? ?out|ncclRemoteError|remote process", re.IGNORECASE
)


def end_after_error(error: Exception) -> NoReturn:
    """End this process after an error that nobody foresaw, or that another rank has caused. Exit status 1.

    Raises:
        Exception: ``error`` itself where there is no other rank.
    """
    rank, size = place()
    if size == 1:
        raise error
    if is_lost_peer(error):
        time.sleep(1.0)  # over several machines, the culprit's own words may take longer than its end
        print(f"rank {rank}: {_loss(error)}", file=sys.stderr)
    else:
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        print("\n".join(f"rank {rank}: {line}" for line in lines), file=sys.stderr)
    end_at_once(EXIT_BROKEN)


def end_on_bad_input(error: Exception) -> int:
    """Print one line, on the first rank that finds it; returns the exit status where every rank has found bad input.

    A rank that is alone with it ends here: the others wait in a collective, and learn by its end.
    """
    rank, size = place()
    if size == 1 or not _joined():
        if rank == 0 or os.environ.get("LOCAL_RANK") == "0":  # one of each machine: files may lack on one of them
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    if rank:
        time.sleep(0.5)  # the main rank speaks first if it has the same to say
    if _is_first(str(error)):
        print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
    if not _all_meet(rank, size):
        end_at_once(EXIT_BAD_INPUT)
    return EXIT_BAD_INPUT


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone or silent."""
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))


def end_process(status: int) -> NoReturn:
    """End with ``status``: join threads, run exit handlers (process groups last), flush output, leave.

    The interpreter is not taken down: a thread of gloo that lets go of a tensor meanwhile would abort the process.
    """
    # As the interpreter begins its own end: pools are told to stop and threads are joined, then exit handlers run.
    threading._shutdown()
    atexit._run_exitfuncs()
    end_at_once(status)


def end_at_once(status: int) -> NoReturn:
    """End without a farewell to process groups: in one, this rank would wait for others that wait for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _loss(error: Exception) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 400 else f"{reason[:120]} … {reason[-260:]}"  # NCCL's own words stand at the end
    if _SILENCE.search(reason):
        return (
            f"no answer from another rank within train.collective_timeout ({reason}); it hangs or is gone: its own log "
            "says more"
        )
    return (
        f"lost another rank, or could not reach it ({reason}); the first error above, or in that rank's own log, is "
        "the cause"
    )


def _joined() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()


def _store():
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def _is_first(message: str) -> bool:
    """Whether no other rank has printed this message; yes where the ranks' store is gone."""
    try:
        return _store().add(f"rdmd/error/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except RuntimeError:
        return True


def _all_meet(rank: int, size: int) -> bool:
    """Whether every rank comes here within seconds."""
    try:
        store = _store()
        for stage in ("came", "saw"):  # the first rank keeps the store: it must not leave before all have looked
            store.set(f"rdmd/{stage}/{rank}", "")
            if stage == "came" or rank == 0:
                store.wait([f"rdmd/{stage}/{other}" for other in range(size)], timedelta(seconds=MEETING_SECONDS))
        return True
    except RuntimeError:
        return False
