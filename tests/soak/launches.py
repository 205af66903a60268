"""Launches two ranks again and again on busy cores: each ends with the status it should, and none aborts.

    python tests/soak/launches.py --launches 200 --busy 2

Launchers (deepspeed, torchrun, srun) take turns, ZeRO stages 0 to 3 likewise. Of ten launches six reach their end (exit
status 0), two are stopped by a signal to one rank (75) and two meet bad input once all ranks are up (2). Exit status 1
if a launch ends otherwise. Needs root, and Slurm for srun: what is missing is left out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("", "cluster"))

import slurm
from material import toy_rdmd
from nodes import Node, refusal, two_nodes, wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DONE, STOPPED, BAD_INPUT = 0, 75, 2
ENDS = (DONE, DONE, STOPPED, DONE, BAD_INPUT, DONE, DONE, STOPPED, BAD_INPUT, DONE)
OPTIONS = {DONE: ["train.steps=3"], STOPPED: [], BAD_INPUT: ["train.dtype=fp16"]}  # which CPUs refuse, in the engine
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "srun": ["srun", "--nodes", "1", "--ntasks", "2", "--kill-on-bad-exit=1", sys.executable],
}
LIMIT_SECONDS = 300.0  # a launch that takes longer hangs
ABORTS = re.compile(r"terminate called|Aborted|SIGABRT|core dumped|Segmentation|Fatal Python")


def launch(node: Node, launcher: str, stage: int, end: int, folder: Path) -> str | None:
    """One run; returns how it ended otherwise than it should, None if it did not."""
    run_dir, log = folder / "run", folder / "log"
    config = folder / "config.json"
    config.write_text(json.dumps(toy_rdmd()))
    options = [f"run_dir={run_dir}", f"deepspeed.zero_optimization.stage={stage}", *OPTIONS[end]]
    command = [*LAUNCHERS[launcher], str(ROOT / "rdmd_fast/train.py"), "--config", str(config), *options]
    process = node.start(command, "/", log)
    try:
        if end == STOPPED:
            metrics = run_dir / "metrics.jsonl"
            wait_until(lambda: metrics.exists() and metrics.stat().st_size, LIMIT_SECONDS, "no iteration")
            os.kill(node.ranks()[-1], signal.SIGTERM)
        status = process.wait(LIMIT_SECONDS)
    except (AssertionError, RuntimeError, IndexError, subprocess.TimeoutExpired) as error:
        return f"{error!r}: {tail(log)}"
    said = log.read_text(errors="replace")
    left = node.ranks()
    if (aborts := ABORTS.search(said)) or status != expected(launcher, end) or left:
        return f"status {status}, {aborts and aborts[0]}, left running {left}: {tail(log)}"
    if launcher == "torchrun" and end and not re.search(rf"exitcode\s*: {end} ", said):
        return f"no rank's status was {end}: {tail(log)}"
    return None


def expected(launcher: str, end: int) -> int:
    """What the launcher makes of its ranks' status: torchrun knows 0 and 1 alone, and prints theirs."""
    return min(end, 1) if launcher == "torchrun" else end


def tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-12:])


@contextlib.contextmanager
def busy_loops(count: int):
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launches.py", description="Launch again and again on busy cores.")
    parser.add_argument("--launches", type=int, default=200, metavar="N", help="in all (200)")
    parser.add_argument("--busy", type=int, default=os.cpu_count(), metavar="N", help="busy loops beside (one a core)")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=[*LAUNCHERS], help="which (all)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if obstacle := refusal():
        print(f"launches.py: {obstacle}")
        return 2
    launchers = [name for name in arguments.launchers if shutil.which(LAUNCHERS[name][0])]
    for name in set(arguments.launchers) - {*launchers}:
        print(f"{name}: not installed, left out")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    wrong, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name, two_nodes(Path(name), environment) as nodes:
        if "srun" in launchers:
            slurm.start(nodes, Path(name))
        kinds = zip(itertools.cycle(itertools.product(range(4), launchers)), itertools.cycle(ENDS), strict=False)
        with busy_loops(arguments.busy):
            for number, ((stage, launcher), end) in enumerate(itertools.islice(kinds, arguments.launches), 1):
                folder = Path(name) / f"launch_{number}"
                folder.mkdir()
                problem = launch(nodes[0], launcher, stage, end, folder)
                wrong += [problem] if problem else []
                outcome = problem or f"ended with {end}"
                print(f"{number}/{arguments.launches} {launcher} ZeRO {stage}: {outcome}", flush=True)
                shutil.rmtree(folder)
    seconds = time.monotonic() - began
    print(f"{arguments.launches - len(wrong)} of {arguments.launches} ended as they should, {seconds:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
