"""Forks processes from one that has imported everything: to start each anew takes up to ten seconds.

Reads a line of JSON at a time. {"argv": [...], "ranks": N, "log": FILE, "before": PYTHON} starts N ranks of train.py
whose output goes to FILE and answers with their process ids; "before" is executed in each first, with ``rank`` at hand,
and stands for what goes wrong. {"wait": [ids], "seconds": S} answers with their exit statuses, null for one still
running, negative for the number of a signal that ended it. {"source": PYTHON, "argv": [...], "environment": {...},
"folder": F, "files": [three paths]} executes PYTHON as ``python -c`` would, its standard streams being those files, and
answers with its process id.

With the argument ``kernels`` only what tests of kernels in Triton's interpreter need is imported.
"""

import gc
import json
import os
import socket
import sys
import time
import traceback

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch._dynamo

if sys.argv[1:] == ["kernels"]:
    import pytest  # noqa: F401

else:  # all that a rank would import later
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  by any engine at ZeRO 1 to 3, with the inductor
    import matplotlib.pyplot  # noqa: F401
    import ot  # noqa: F401
    import torch.utils.flop_counter

    from rdmd_fast.networks.flops import forward_flops
    from rdmd_fast.networks.options import MLPOptions

    forward_flops(MLPOptions(kind="mlp", hidden=1, depth=1), (2,))
from rdmd_fast.processes.failures import end_process
from rdmd_fast.train import run_rank

torch.set_num_threads(1)
os.getloadavg = lambda: (0.0, 0.0, 0.0)  # what a run says must not depend on what else the machine does


def start(job: dict) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ids = []
    for rank in range(job["ranks"]):
        ids.append(os.fork())
        if ids[-1] == 0:
            try:
                live(job, rank, port)
            finally:
                traceback.print_exc()
                os._exit(99)
    return ids


def live(job: dict, rank: int, port: int):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["ranks"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    sys.argv = ["train.py", *job["argv"]]
    try:
        exec(job.get("before", ""), {"rank": rank})
        run_rank()
    except SystemExit as end:
        end_process(end.code)


def run(job: dict) -> int:
    files = [os.open(path, how) for path, how in zip(job["files"], (os.O_RDONLY, *[os.O_WRONLY] * 2), strict=True)]
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        return child
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    status = 1
    try:
        sys.stdin = os.fdopen(0, closefd=False)
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.argv, sys.path[0] = ["-c", *job["argv"]], ""
        exec(job["source"], {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        end_process(status)


def wait(ids: list[int], seconds: float) -> list[int | None]:
    statuses = dict.fromkeys(ids)
    deadline = time.monotonic() + seconds
    while True:
        for process in [each for each, status in statuses.items() if status is None]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)
        if None not in statuses.values() or time.monotonic() >= deadline:
            return list(statuses.values())
        time.sleep(0.02)


if __name__ == "__main__":
    gc.freeze()  # or each rank would copy the pages of all these objects to mark them
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        else:
            answer = run(request) if "source" in request else start(request)
        print(json.dumps(answer), flush=True)
    os._exit(0)
