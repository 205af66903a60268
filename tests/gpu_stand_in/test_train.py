import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu_stand_in import build
from tests.gpu_stand_in.iteration import NETWORK
from tests.gpu_stand_in.log import ROOT

pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    from benchmarks.step_cases import packed, sample_shape

    return packed(sample_shape("digits"), tmp_path_factory.mktemp("images"))


@pytest.fixture
def start(tmp_path, packed):
    """``start(run)`` starts a short training on the stand-in that goes to, or goes on in, a folder."""
    lacking = build.obstacle()
    if lacking:
        pytest.skip(lacking)
    config = tmp_path / "config.yaml"
    config.write_text("stage: teacher\n")
    options = [
        "train.dtype=bf16", "train.global_batch_size=4", "train.steps=3", "checkpoint.every=1", "validation.every=0",
        "telemetry.tensorboard=false", "telemetry.log_every=1", f"data.target={packed}", "network.kind=song_unet",
        *(f"network.{option}" for option in NETWORK),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}

    def start(run: Path) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "tests.gpu_stand_in.train",
            "--config",
            str(config),
            f"run_dir={run}",
            *options,
        ]
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    return start


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_that_was_killed_ends_as_one_that_was_not(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    process = start(killed)
    while not (killed / "checkpoints/step_00000001/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "export").exists()
    assert start(killed).wait() == 0
    assert losses(killed) == losses(whole) and len(losses(whole)) == 3
    files = [run / "export/teacher.safetensors" for run in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (killed / "samples/final.png").exists()
