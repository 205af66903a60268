"""What the nodes of a run must have in common."""

import os
import secrets
import socket
import time
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.processes.world import World, on_main

# A client of a network file system may go on seeing a folder as it was for up to a minute (NFS's acdirmax).
STALE_SECONDS = 60.0


def check_shared(world: World, run_dir: Path) -> None:
    """That every rank writes into the main rank's run folder, since checkpoints have files of all; a collective call.

    Raises:
        InputError: on every rank, when some rank does not see a file that the main one has written there, or
            the folder cannot be written.
    """
    if world.size == 1:
        return
    token = run_dir / f".shared-{world.broadcast(secrets.token_hex(8))}"
    on_main(world, token.touch, f"run_dir {run_dir}")
    own = run_dir.resolve()
    places = world.gather(None if _appears(own / token.name) else f"{socket.gethostname()} ({own})")
    if world.is_main:
        token.unlink(missing_ok=True)
    others = list(dict.fromkeys(place for place in places if place))
    if others:
        main = world.broadcast(f"{socket.gethostname()} ({own})")
        count = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"run_dir: {main} is not the same folder on {others[0]}{count}; "
            "name one on a file system that all nodes share"
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + STALE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        for folder in (path.parent.parent, path.parent):
            if folder.is_dir():
                os.listdir(folder)  # a network file system looks at the server anew
        time.sleep(0.1)
    return True
