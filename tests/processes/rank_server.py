"""Forks ranks of the trainer from one process that has imported everything: to start each anew takes five seconds.

Reads a line of JSON at a time. {"argv": [...], "ranks": N, "log": FILE, "before": PYTHON} starts N ranks of train.py
whose output goes to FILE and answers with their process ids; "before" is executed in each first, with ``rank`` at hand,
and stands for what goes wrong. {"wait": [ids], "seconds": S} answers with their exit statuses, null for one still
running, negative for the number of a signal that ended it.
"""

import gc
import json
import os
import socket
import sys
import time
import traceback

os.environ["DS_ACCELERATOR"] = "cpu"

# All that a rank would import later.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  by every engine at ZeRO 1 to 3, with the inductor
import matplotlib.pyplot  # noqa: F401
import ot  # noqa: F401
import torch
import torch._dynamo
import torch.utils.flop_counter

import rdmd_fast.engine.update_guard
import rdmd_fast.experiment
import rdmd_fast.metrics.exact_transport
import rdmd_fast.model_files.export_format
import rdmd_fast.monitoring.drawing
import rdmd_fast.planning.dry_run
import rdmd_fast.trainer  # noqa: F401
from rdmd_fast.processes.failures import end_process
from rdmd_fast.networks.flops import forward_flops
from rdmd_fast.networks.options import MLPOptions
from rdmd_fast.train import run_rank

torch.set_num_threads(1)
forward_flops(MLPOptions(kind="mlp", hidden=1, depth=1), (2,))


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


def wait(ids: list[int], seconds: float) -> list[int | None]:
    statuses = dict.fromkeys(ids)
    deadline = time.monotonic() + seconds
    while None in statuses.values() and time.monotonic() < deadline:
        for process in [each for each, status in statuses.items() if status is None]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return list(statuses.values())


if __name__ == "__main__":
    gc.freeze()  # or each rank would copy the pages of all these objects to mark them
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"], request["seconds"]) if "wait" in request else start(request)
        print(json.dumps(answer), flush=True)
    os._exit(0)
