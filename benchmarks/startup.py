"""Seconds from a command to the end of its first iteration: the digits demo's distillation, by launcher.

    python -m benchmarks.startup [--launcher python deepspeed torchrun] [--rounds 3] [--json FILE]

Caches are warm: each launcher runs once before it is timed. Launchers take turns, and each one's median counts. The
floor is what a process takes that imports torch and deepspeed and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil  # DeepSpeed needs it, too
import torch

from benchmarks.communication import prepare_digits
from benchmarks.step_cases import ROOT
from benchmarks.step_measurements import processor
from rdmd_fast import cli

BIN = Path(sys.executable).parent
TRAIN = [str(ROOT / "rdmd_fast/train.py"), "--config", str(ROOT / "configs/digits/rdmd_2to3.yaml")]
LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "1"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "1"],
}
FLOOR = [sys.executable, "-c", "import torch, deepspeed"]
PATIENCE = 300.0


def prepare(folder: Path) -> list[str]:
    """Overrides of the demo's config: digits packed as `make demo` does, and a teacher as initialised."""
    values = prepare_digits(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        if cli.main(["pack", "digits", "--out", str(folder / "digits")]):
            raise RuntimeError("the digits could not be packed")
    data = {"source": "2/train", "source_holdout": "2/test", "target_holdout": "3/test"}
    return [
        *(f"data.{key}={folder}/digits/{name}" for key, name in data.items()),
        f"validation.judge={folder}/digits", f"teacher={values['teacher']}", "telemetry.log_every=1",
    ]  # fmt: skip


def to_first_iteration(launcher: list[str], overrides: list[str], run_dir: Path) -> float:
    """Seconds until the line of the first iteration is printed; the run is then killed with all it started.

    Raises:
        RuntimeError: no such line came within PATIENCE seconds.
    """
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # the launchers ask for python
    command = [*launcher, *TRAIN, *overrides, f"run_dir={run_dir}", "--resume", "never"]
    start, said = time.perf_counter(), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        patience = threading.Timer(PATIENCE, _kill_all, [process.pid])
        patience.start()
        try:
            for line in process.stdout:
                said.append(line)
                if "step 1/" in line:
                    return time.perf_counter() - start
        finally:
            patience.cancel()
            _kill_all(process.pid)
    raise RuntimeError(f"{' '.join(command)}:\n{''.join(said[-20:])}")


def _kill_all(leader: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        started = psutil.Process(leader).children(recursive=True)  # torchrun's have sessions of their own
        os.killpg(leader, signal.SIGKILL)
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(started)


def floor() -> float:
    start = time.perf_counter()
    subprocess.run(FLOOR, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="(all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in ("floor", *arguments.launcher)}
    with tempfile.TemporaryDirectory(prefix="rdmd-startup-") as name:
        folder = Path(name)
        overrides = prepare(folder)
        for number in range(arguments.rounds + 1):  # the first warms the caches
            times["floor"].append(floor())
            for launcher in arguments.launcher:
                run_dir = folder / f"{launcher}{number}"
                times[launcher].append(to_first_iteration(LAUNCHERS[launcher], overrides, run_dir))
    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} cores, {processor()}"
    print(f"command to first iteration of configs/digits/rdmd_2to3.yaml, {device}, torch {torch.__version__}")
    for side, column in times.items():
        warm = sorted(column[1:])
        label = "import torch, deepspeed" if side == "floor" else side
        print(f"  {label:<24}{warm[len(warm) // 2]:7.2f} s   ({warm[0]:.2f} to {warm[-1]:.2f})")
    if arguments.json:
        record = {"device": device, "torch": torch.__version__, "seconds": {k: v[1:] for k, v in times.items()}}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
