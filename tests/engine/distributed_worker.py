"""Runs many short trainings in one group of processes: launching each alone would cost ten seconds a case.

usage: torchrun --nproc_per_node N distributed_worker.py CASES.json, or by conftest.launch_ranks

CASES.json lists {"values": plain config, "stop_after": iterations or null} and optionally "loss_scaling", changes to
fp16's. Every case resumes what its run_dir holds.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from rdmd_fast.config import validate_config
from rdmd_fast.engine import engine
from rdmd_fast.monitoring import drawing
from rdmd_fast.processes.failures import end_process
from rdmd_fast.processes.world import join_world
from rdmd_fast.trainer import run


class StopAfter:
    """Stands in for a signal during iteration ``count``; ``requested`` is read once before the first one."""

    def __init__(self, count):
        self.left = count

    @property
    def requested(self):
        if self.left is None:
            return None
        self.left -= 1
        return SimpleNamespace(name="SIGTERM") if self.left < 0 else None


def main():
    world = join_world()
    from deepspeed.accelerator import get_accelerator

    # The CPU computes in fp16, slowly, but says that it cannot: let it stand in for a GPU.
    get_accelerator().is_fp16_supported = lambda: True
    drawing.toy_picture = lambda *_: None  # a second each, and nothing here is about pictures
    statuses = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = validate_config(case["values"], "case")
        engine.LOSS_SCALING.update(case.get("loss_scaling", {}))
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        statuses.append(run(config, "auto", world, Path(config.run_dir), StopAfter(case["stop_after"])))
    if world.is_main:
        print("statuses", json.dumps(statuses), flush=True)
    world.barrier()
    end_process(0)


if __name__ == "__main__":
    main()
