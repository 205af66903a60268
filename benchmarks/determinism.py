"""With train.deterministic=true two runs end bit for bit alike, and so does one that was killed and went on.

    python -m benchmarks.determinism [--case songunet64] [--batch 16] [--steps 4] [--json FILE]

Three runs of ``train.py`` at once, in bf16; the third is killed once it has saved, and started again. What is compared:
each metric of each step, and the bytes of the exported generator. Exit status 1 if something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.networks import CUDA
from benchmarks.step_cases import BATCHES, ROOT, run_config
from benchmarks.step_measurements import processor
from rdmd_fast.config import dump_config

TIMES = {"images_per_second", "eta_seconds", "seconds", "mfu"}


def starter(arguments: argparse.Namespace, folder: Path) -> Callable[[str], subprocess.Popen]:
    """Prepare data and a teacher; returns what starts the run of a name, or has it go on."""
    overrides = [
        "train.deterministic=true", f"train.steps={arguments.steps}",
        f"checkpoint.every={max(1, arguments.steps // 2)}", "checkpoint.keep=1", "telemetry.log_every=1",
        "rdmd.fake_warmup=0",
    ]  # fmt: skip
    config = folder / "resolved.yaml"
    config.write_text(dump_config(run_config(arguments.case, "bf16", folder, overrides, arguments.batch)))

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "rdmd_fast/train.py", "--config", str(config), f"run_dir={folder / name}"]
        with (folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    return start


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for the end of a run.

    Raises:
        RuntimeError: it failed.
    """
    if process.wait():
        raise RuntimeError(f"train.py ended with {process.returncode}:\n{log.read_text()[-2000:]}")


def kill_once_saved(process: subprocess.Popen, run: Path) -> None:
    """Kill a run that has published a checkpoint.

    Raises:
        RuntimeError: it ended first.
    """
    while not list(run.glob("checkpoints/step_*/manifest.json")):
        if process.poll() is not None:
            raise RuntimeError(f"the run that was to be killed ended first:\n{Path(f'{run}.log').read_text()[-2000:]}")
        time.sleep(0.01)
    process.kill()
    process.wait()
    if (run / "export").exists():
        raise RuntimeError("the run that was to be killed ended first: give it more --steps")


def outcome(run: Path) -> dict:
    """Metrics of each step but for times, and the digest of the exported generator."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    metrics = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    export = (run / "export/generator.safetensors").read_bytes()
    return {"metrics": metrics, "export": hashlib.sha256(export).hexdigest()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", choices=BATCHES, default="songunet64", help="(songunet64)")
    add("--batch", type=int, default=16, help="samples of an iteration (16)")
    add("--steps", type=int, default=4, help="iterations of each run (4)")
    add("--json", metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    entry = {
        "device": torch.cuda.get_device_name() if CUDA else processor(), "torch": torch.__version__,
        "case": arguments.case, "batch": arguments.batch, "steps": arguments.steps,
    }  # fmt: skip

    def keep(**more) -> None:
        entry.update(more)
        print(", ".join(f"{name}: {value}" for name, value in more.items()), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(entry, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="rdmd-determinism-") as name:
        folder = Path(name)
        start = starter(arguments, folder)
        started = {run: start(run) for run in ("first", "second", "killed")}
        try:
            kill_once_saved(started["killed"], folder / "killed")
            for run in ("first", "second"):
                finish(started[run], folder / f"{run}.log")
            first = outcome(folder / "first")
            keep(export=first["export"], alike=outcome(folder / "second") == first)
            started["killed"] = start("killed")
            finish(started["killed"], folder / "killed.log")
            keep(resumed_alike=outcome(folder / "killed") == first)
        finally:
            for process in started.values():
                process.kill()
    return 0 if entry["alike"] and entry["resumed_alike"] else 1


if __name__ == "__main__":
    sys.exit(main())
