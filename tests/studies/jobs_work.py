"""Work of the points in test_jobs.py: what their processes import by name."""

import json
import os
import signal
import time
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.studies.jobs import train_run

TOY = Path(__file__).parents[2] / "configs/toy/gaussian_to_gaussian.yaml"


def square(folder: Path, settings: dict) -> dict:
    with open(folder / "calls", "a") as calls:
        calls.write("x")
    print("squaring")
    os.system("echo from a child")
    return {"value": settings["x"] ** 2, "threads": os.environ["OMP_NUM_THREADS"], "infinite": float("inf")}


def refuse(folder: Path, settings: dict) -> dict:
    raise InputError("no such thing")


def vanish(folder: Path, settings: dict) -> dict:
    os._exit(9)


def train_toy(folder: Path, settings: dict) -> dict:
    overrides = ["train.steps=2", "rdmd.fake_warmup=0", "validation.count=20", "checkpoint.every=0"]
    train_run(str(TOY), [*overrides, f"seed={settings['seed']}"], folder / "run")
    return json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])


def fail(folder: Path, settings: dict) -> dict:
    raise RuntimeError("CUDA out of memory\nand more")


def save_and_stop(folder: Path, settings: dict) -> dict:
    """As a training does: a signal is caught, the state saved."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: caught.append(1))
    (folder / "process").write_text(str(os.getpid()))
    while not caught:
        time.sleep(0.02)
    time.sleep(0.5)
    raise KeyboardInterrupt


def sleep(folder: Path, settings: dict) -> dict:
    (folder / "process").write_text(str(os.getpid()))
    time.sleep(60)
    return {}
