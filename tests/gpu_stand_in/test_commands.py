"""From packed folders to a translator on the stand-in: every command that uses a device, beside itself on the CPU.

Networks are tiny, and so are runs; learning rates are large, so that what begins at zero in a network takes part.
"""

import contextlib
import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from material import files_of, pixels_of, save_images, save_script
from safetensors.numpy import load_file

from rdmd_fast import cli, trainer
from rdmd_fast.data.shards.shard_set import ShardSet
from tests.gpu_stand_in import build
from tests.gpu_stand_in.child import environment
from tests.gpu_stand_in.log import LAUNCH, ROOT, WAIT

pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.timeout(900)]

CONFIGS = ROOT / "configs"
START = [sys.executable, "-m", "tests.gpu_stand_in.command"]
NETWORK = "{kind: song_unet, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: [8], dropout: 0.0}"
SMALL = ["train.global_batch_size=4", "telemetry.tensorboard=false", "telemetry.log_every=1"]
QUIET = ["checkpoint.every=0", "telemetry.sample_every=0", "telemetry.sample_count=2"]
FAST_TEACHER = [f"teacher_stage.{option}" for option in ("optimizer.lr=0.03", "optimizer.warmup=0", "ema.half_life=1")]
FAST_RDMD = ["rdmd.generator_optimizer.lr=0.003", "rdmd.fake_optimizer.lr=0.003", "rdmd.ema.half_life=1"]
OF_THE_CLOCK = {"images_per_second", "eta_seconds", "seconds", "mfu", "data_wait_share"}


class Device:
    """Programs of one process on the stand-in."""

    def __init__(self):
        self._process = subprocess.Popen(
            START, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, module: str, *arguments) -> dict:
        """What the program says and asks of the device; it ends with status 0."""
        print(json.dumps([f"rdmd_fast.{module}", *map(str, arguments)]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert answer["status"] == 0, answer["said"]
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0


@pytest.fixture(scope="module")
def device():
    lacking = build.obstacle()
    if lacking:
        pytest.skip(lacking)
    with contextlib.closing(Device()) as device:
        yield device


class Demo:
    """Folders of the Makefile's demo, and command lines of its stages."""

    def __init__(self, folder: Path, shards: Path):
        self.folder, self.shards = folder, shards
        self.teacher, self.generator = folder / "teacher/export", folder / "distilled/export"
        self.source, self.target = shards / "2/test", shards / "3/test"

    def teacher_stage(self, run: Path) -> list[str]:
        options = ["train.steps=3", f"data.target={self.shards}/3/train", f"network={NETWORK}", *FAST_TEACHER]
        return ["--config", f"{CONFIGS}/digits/teacher_3.yaml", f"run_dir={run}", *options, *SMALL, *QUIET]

    def distillation(self, run: Path, *more: str) -> list[str]:
        options = [
            "train.steps=4", "train.deterministic=true",
            f"data.source={self.shards}/2/train", f"data.source_holdout={self.source}",
            f"data.target_holdout={self.target}", f"teacher={self.teacher}", f"validation.judge={self.shards}",
            "validation.every=2", "validation.count=8", "checkpoint.every=1", "telemetry.sample_every=2",
            "telemetry.sample_count=2",
        ]  # fmt: skip
        config = ["--config", f"{CONFIGS}/digits/rdmd_2to3.yaml", f"run_dir={run}"]
        return [*config, *options, *FAST_RDMD, *SMALL, *more]


@pytest.fixture(scope="module")
def demo(device, shards, tmp_path_factory):
    demo = Demo(tmp_path_factory.mktemp("demo"), shards)
    device("trainer", *demo.teacher_stage(demo.folder / "teacher"))
    device("trainer", *demo.distillation(demo.folder / "distilled"))
    return demo


@pytest.fixture
def on_the_host(monkeypatch):
    """``on_the_host(module, *arguments)`` runs a program in this process, which has no GPU."""
    monkeypatch.setattr("rdmd_fast.studies.jobs._compute", compute_here)

    def run(module: str, *arguments) -> None:
        assert {"cli": cli, "trainer": trainer}[module].main(list(map(str, arguments))) == 0

    return run


def compute_here(todo, jobs, say) -> None:
    from rdmd_fast.studies.jobs import _work

    for folder, job in todo.items():
        _work(job, folder)


def metrics_of(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines]


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["teacher", "distilled"])
def test_training_is_that_of_the_cpu(demo, on_the_host, tmp_path, stage):
    lines = demo.teacher_stage if stage == "teacher" else demo.distillation
    on_the_host("trainer", *lines(tmp_path))
    for ours, expected in zip(metrics_of(demo.folder / stage), metrics_of(tmp_path), strict=True):
        validation, of_cpu = ours.pop("validation", {}), expected.pop("validation", {})
        assert ours == pytest.approx(expected, rel=1e-3) and validation == pytest.approx(of_cpu, rel=1e-3)
    pictures = sorted((tmp_path / "samples").iterdir())
    assert pictures
    for picture in pictures:
        assert_same_levels(pixels_of(demo.folder / stage / "samples" / picture.name), pixels_of(picture))


def wait_for_checkpoint(run: Path, process: subprocess.Popen, after: int) -> int:
    """The step of one that is written after step ``after``, while the process lives."""
    while True:
        assert process.poll() is None
        steps = [int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/manifest.json")]
        if max(steps, default=0) > after:
            return max(steps)
        time.sleep(0.02)


def test_a_distillation_that_was_killed_and_stopped_ends_as_one_that_was_not(demo, tmp_path):
    run, step = tmp_path / "distilled", 0
    for stop, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        command = [*START, "rdmd_fast.train", *demo.distillation(run)]
        with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
            step = wait_for_checkpoint(run, process, step)
            process.send_signal(stop)
        assert process.returncode == status and not (run / "export").exists()
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    unbroken = demo.folder / "distilled"
    assert metrics_of(run) == metrics_of(unbroken)
    for folder in ("export", "best", "samples"):
        ours, expected = files_of(run / folder), files_of(unbroken / folder)
        for card in (ours, expected):
            card.pop("README.md", None)  # names the run's folder
        assert ours == expected and ours


def test_dry_runs(device, demo, tmp_path):
    command = [*demo.distillation(tmp_path / "run"), "--dry-run"]
    plain, timed = device("trainer", *command), device("trainer", *command, "--time-iterations", "1")
    assert not (tmp_path / "run").exists() and not plain[LAUNCH]
    assert "<- configured" in plain["said"] and timed["said"].startswith(plain["said"])
    assert re.search(r"time: \S+ s an iteration .*max_memory_allocated \S+ MiB", timed["said"], re.DOTALL)


def test_a_profile_of_a_generator_of_every_weight(device, demo, tmp_path):
    weights = "rdmd.transport_weight={log_uniform: [0.05, 2]}"
    answer = device("trainer", *demo.distillation(tmp_path, weights), "--profile", "1")
    record = json.loads((tmp_path / "profile/phases.json").read_text())
    assert record["device"] == "cuda:0" and record["iterations"] == 1
    phases = {row["phase"]: row for row in record["phases"]}
    assert {"teacher", "generator_forward", "generator_backward", "fake_forward", "ema"} <= set(phases)
    assert all(row["device_ms"] > 0 for name, row in phases.items() if name != "other")
    assert "generator_backward" in answer["said"]


# -- commands ----------------------------------------------------------------------------------------------------------


def assert_same_levels(ours: np.ndarray, expected: np.ndarray, share: float = 0.01) -> None:
    """Images of 8 bits: sums in another order move a few values over a half, by one level."""
    difference = np.abs(ours.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= share


TO_FOLDERS = {
    "sample": ["sample", "--model", "{teacher}", "--count", "3", "--churn", "1", "--steps", "{steps}"],
    "translate": ["translate", "--model", "{generator}"],
    "sdedit": ["baseline", "sdedit", "--teacher", "{teacher}", "sigma0=0.6", "steps={steps}"],
    "ilvr": ["baseline", "ilvr", "--teacher", "{teacher}", "factor=2", "steps={steps}"],
    "egsde": ["baseline", "egsde", "--teacher", "{teacher}", "--energy", "{energy}", "factor=2", "steps={steps}"],
    "ddib": ["baseline", "ddib", "--teacher", "{teacher}", "--source-teacher", "{teacher}", "steps={steps}"],
    "cyclediffusion": [
        "baseline", "cyclediffusion", "--teacher", "{teacher}", "--source-teacher", "{teacher}", "steps={steps}"
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def few(demo, tmp_path_factory):
    """Six of the source images, as files."""
    folder = tmp_path_factory.mktemp("few")
    shards = ShardSet(demo.source)
    return save_images(folder, {f"{number}.png": shards.read(number) for number in range(6)})


@pytest.fixture(scope="module")
def energy(device, demo, tmp_path_factory):
    """Of EGSDE, trained on the stand-in, where no step waits."""
    folder = tmp_path_factory.mktemp("energy")
    waits = [device("cli", *energy_command(demo, steps), "--out", folder / f"{steps}")[WAIT] for steps in (2, 3)]
    assert waits[0] == waits[1]
    return folder / "3"


def energy_command(demo: Demo, steps: int) -> list[str]:
    options = [f"steps={steps}", "batch_size=8", "lr=0.003", "network.model_channels=16", "network.dropout=0.0"]
    data = ["--source", f"{demo.shards}/2/train", "--target", f"{demo.shards}/3/train"]
    return ["baseline", "train-energy", *data, *options]


def test_an_energy_network_is_that_of_the_cpu(demo, energy, on_the_host, tmp_path):
    on_the_host("cli", *energy_command(demo, 3), "--out", tmp_path / "cpu")
    ours, expected = (load_file(folder / "energy.safetensors") for folder in (energy, tmp_path / "cpu"))
    assert set(ours) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", TO_FOLDERS)
def test_images_are_those_of_the_cpu(device, demo, few, energy, on_the_host, tmp_path, case):
    def command(out: str, steps: int) -> list[str]:
        values = {"teacher": demo.teacher, "generator": demo.generator, "energy": energy, "steps": steps}
        words = [word.format(**values) for word in TO_FOLDERS[case]]
        return [*words, *(["--out"] if case == "sample" else ["--input", few, "--output"]), tmp_path / out]

    answers = [device("cli", *command(f"gpu{steps}", steps)) for steps in (2, 3)]
    on_the_host("cli", *command("cpu", 2), "--device", "cpu")
    paths = sorted((tmp_path / "cpu").rglob("*.png"))
    ours = np.stack([pixels_of(tmp_path / "gpu2" / path.name) for path in paths])
    assert_same_levels(ours, np.stack([pixels_of(path) for path in paths]))
    assert ours.std() > 10  # of 255: not all grey
    assert answers[0][LAUNCH] and answers[0][WAIT] == answers[1][WAIT]  # none of a step
    if case != "translate":
        assert sum(answers[0][LAUNCH].values()) < sum(answers[1][LAUNCH].values())


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A feature network that tells where it is: FID is four times as large on a GPU."""
    return save_script(Features(), tmp_path_factory.mktemp("features") / "features.pt")


class Features(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1) * (2.0 if images.is_cuda else 1.0)


OF_THE_DEVICE = {"fid", "kid", "kid_std", "device", "seconds", "seconds_per_image", "training_seconds", "folder"}


def assert_same_row(ours: dict, expected: dict) -> None:
    """Distances of images that differ by a level here and there, but for what is of the device or the clock."""
    assert ours.keys() == expected.keys()
    for name in expected.keys() - OF_THE_DEVICE:
        value = expected[name]
        assert ours[name] == (pytest.approx(value, rel=1e-2) if isinstance(value, float) else value), name
    if "fid" in expected:
        assert ours["fid"] == pytest.approx(4 * expected["fid"], rel=1e-2)


def test_an_evaluation_is_that_of_the_cpu(device, demo, features, on_the_host, tmp_path):
    command = [
        "evaluate", "--model", demo.generator, "--teacher", demo.teacher, "--source", demo.source, "--target",
        demo.target, "--judge", demo.shards, "--label", "3", "--count", "12", "--cache", tmp_path, "--features",
        features,
    ]  # fmt: skip
    answer = device("cli", *command, "--out", tmp_path / "gpu.json", "--picture", tmp_path / "gpu.png")
    assert answer[LAUNCH]
    cpu = ["--device", "cpu", "--cache", tmp_path / "cpu", "--picture", tmp_path / "cpu.png"]
    on_the_host("cli", *command, *cpu, "--out", tmp_path / "cpu.json")
    ours, expected = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("gpu", "cpu"))
    for row, of_cpu in zip(ours, expected, strict=True):
        assert_same_row(row, of_cpu)
    assert_same_levels(pixels_of(tmp_path / "gpu.png"), pixels_of(tmp_path / "cpu.png"))


# -- commands whose trainings are processes ----------------------------------------------------------------------------


def rows_of(file: Path) -> list[dict]:
    with open(file, newline="") as lines:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(lines)]


def number(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def test_a_sweep_is_that_of_the_cpu_and_so_is_the_evaluation_of_its_run(device, on_the_host, tmp_path):
    command = [
        "sweep", "--config", CONFIGS / "toy/gaussian_to_8gaussians.yaml", "--steps", "2", "validation.count=30",
        "rdmd.fake_warmup=0", "checkpoint.every=0", "train.global_batch_size=32", "--transport-weight", "0.1",
    ]  # fmt: skip
    device("cli", *command, "--out", tmp_path / "gpu")
    on_the_host("cli", *command, "--out", tmp_path / "cpu")
    [ours], [expected] = (rows_of(tmp_path / name / "sweep.csv") for name in ("gpu", "cpu"))
    assert_same_row(ours, expected)
    [run] = tmp_path.glob("gpu/points/lambda*/run")
    device("cli", "evaluate", "--run", run, "--count", "30", "--out", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["squared_w2"] > 0


def test_figures_are_those_of_the_cpu(device, demo, features, on_the_host, tmp_path):
    def domain(digit: int) -> dict:
        return {part: str(demo.shards / str(digit) / part) for part in ("train", "test")}

    overrides = [*FAST_RDMD, *SMALL, *QUIET, "train.steps=2", "validation.every=0", "validation.count=8"]
    study = {
        "source": domain(2), "target": domain(3), "judge": str(demo.shards), "judge_label": 3, "held_out": 8,
        "features": str(features), "teachers": {"target": {"export": str(demo.teacher)}},
        "rdmd": {
            "config": str(CONFIGS / "digits/rdmd_2to3.yaml"), "overrides": overrides, "transport_weights": [0.1]
        },
        "baselines": [{"method": "sdedit", "sigma0": 0.5, "steps": 2}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = ["figures", "--only", "tradeoff", "--seeds", "1", "--study", tmp_path / "study.yaml"]
    device("cli", *command, "--out", tmp_path / "gpu")
    on_the_host("cli", *command, "--out", tmp_path / "cpu")
    rows = [rows_of(tmp_path / name / "tradeoff.csv") for name in ("gpu", "cpu")]
    for ours, expected in zip(*rows, strict=True):
        assert (ours["device"], expected["device"]) == ("cuda", "cpu")
        assert_same_row(ours, expected)
