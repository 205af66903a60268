"""What goes wrong around a run: full disks, damaged checkpoints, changed configurations, two runs in one folder.

Each ends with status 2 and one line, or goes on; none leaves less than the last checkpoint, and a run that went on ends
as if nothing had happened. Checkpoints are damaged in every way in test_checkpoint_files.py.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rdmd_fast.checkpoints.manifest import Defect, check_hashes, checkpoint_folders, read_manifest
from rdmd_fast.monitoring import telemetry
from rdmd_fast.monitoring.telemetry import TIME_KEYS, Telemetry, TelemetryOptions
from rdmd_fast.processes.world import World
from rdmd_fast.trainer import main

STEPS = 6
VALUES = {
    "stage": "teacher",
    "data": {"target": {"toy": "8gaussians"}},
    "network": {"kind": "mlp", "hidden": 16, "depth": 1},
    "train": {"steps": STEPS, "global_batch_size": 8},
    "telemetry": {"log_every": 1, "sample_every": 0, "tensorboard": False},
    "checkpoint": {"every": 2, "keep": 3},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(json.dumps(VALUES))
    return path


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main(["--config", str(config), f"run_dir={run}"]) == 0
    return run


@pytest.fixture
def train(config, capsys):
    """``train(run_dir, *arguments)``: (exit status, what was printed, the lines of standard error)."""

    def start(run_dir, *arguments):
        capsys.readouterr()
        status = main(["--config", str(config), f"run_dir={run_dir}", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, [line for line in printed.err.splitlines() if not line.startswith("[20")]

    return start


def refused(outcome):
    """The one line of a run that must have ended with status 2."""
    status, _, lines = outcome
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome
    return lines[0]


def end_of(run):
    """Weights of the export and metrics but for times."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]
    weights = load_file(run / "export/teacher.safetensors")
    return lines, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def whole_steps(run):
    """Steps of checkpoints with every byte in place, newest first."""
    found = []
    for folder in checkpoint_folders(run / "checkpoints"):
        try:
            check_hashes(folder, read_manifest(folder)["files"])
            found.append(int(folder.name[5:]))
        except Defect:
            pass
    return found


def contents(run):
    """Every file's bytes."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


# -- full and unwritable disks -----------------------------------------------------------------------------------------


@pytest.fixture
def one_checkpoint(unbroken):
    """KiB that hold one checkpoint and the small files of a run, but no second checkpoint."""
    files = (unbroken / "checkpoints/step_00000006").rglob("*")
    return sum(path.stat().st_blocks // 2 for path in files) + 24


@pytest.mark.parametrize("told", [True, False], ids=["free space known", "quota"])
def test_a_full_disk_ends_the_run_and_leaves_its_last_checkpoint_whole(
    train, unbroken, small_disk, one_checkpoint, monkeypatch, told
):
    run = small_disk(one_checkpoint)
    with monkeypatch.context() as patch:
        if not told:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
        line = refused(train(run))
    assert "step_00000004: cannot be written" in line and "change run_dir" in line and ("MiB" in line) == told
    assert whole_steps(run) == [2] and not list((run / "checkpoints").glob(".*"))
    small_disk(one_checkpoint * 6)
    status, printed, _ = train(run)
    assert status == 0 and "at step 2" in printed
    assert end_of(run) == end_of(unbroken)


def test_a_full_disk_is_a_warning_where_the_config_says_so(train, small_disk, one_checkpoint):
    run = small_disk(one_checkpoint)
    outcome = train(run, "checkpoint.on_failure=warn")
    assert "step_00000006" in refused(outcome)  # the last one must succeed
    assert outcome[1].count("warning: checkpoint") == 1 and "training goes on" in outcome[1]
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("failed_checkpoints") for line in lines] == [None] * 4 + [1, 1]
    assert whole_steps(run) == [2]


def failing_at(steps, function):
    """``function(path, text)`` that finds no space while ``steps`` are written."""

    def write(path, text):
        if json.loads(text)["step"] in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        function(path, text)

    return write


def test_metrics_on_a_full_disk(train, unbroken, tmp_path, monkeypatch):
    append = telemetry.append_line
    monkeypatch.setattr(telemetry, "append_line", failing_at([3, 4], append))
    assert "metrics" in refused(train(tmp_path / "stop"))
    status, printed, _ = train(tmp_path / "warn", "checkpoint.on_failure=warn")
    assert status == 0 and printed.count("warning: metrics") == 2
    (lines, weights), (all_lines, all_weights) = end_of(tmp_path / "warn"), end_of(unbroken)
    assert weights == all_weights and lines == [line for line in all_lines if line["step"] not in (3, 4)]
    monkeypatch.setattr(telemetry, "append_line", append)
    assert train(tmp_path / "stop")[0] == 0
    assert end_of(tmp_path / "stop") == end_of(unbroken)


def test_a_line_is_appended_whole_or_not_at_all(fork_python, tmp_path):
    """In a process with a limit on file sizes, which cuts writes short as a full disk does."""
    script = (
        "import resource, sys; from pathlib import Path; from rdmd_fast.files import append_line\n"
        "path = Path(sys.argv[1]); append_line(path, 'one')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 100))\n"
        "try: append_line(path, 'x' * 20)\n"
        "except OSError as error: print(error.errno)\n"
        "append_line(path, 'two')\n"
    )
    assert fork_python(script, tmp_path / "file").finish() == (f"{errno.EFBIG}\n", "")
    assert (tmp_path / "file").read_text() == "one\ntwo\n"


def test_pictures_that_cannot_be_written(tmp_path, capsys):
    toy = ["--config", str(Path(__file__).parents[2] / "configs/toy/gaussian_to_gaussian.yaml")]
    small = ["train.steps=2", "validation.every=0", "validation.count=20", "rdmd.fake_warmup=0"]
    small += ["telemetry.sample_every=1", "telemetry.tensorboard=false", "network={kind: mlp, hidden: 8, depth: 1}"]
    for name, policy, status in (("stop", "stop", 2), ("warn", "warn", 0)):
        run = tmp_path / name
        run.mkdir()
        (run / "samples").write_text("a file where a folder should be")
        capsys.readouterr()
        assert main([*toy, *small, f"run_dir={run}", f"checkpoint.on_failure={policy}"]) == status
        printed = capsys.readouterr()
        told = printed.err if status else printed.out
        assert "step_00000001.png: cannot be written" in told and "Traceback" not in printed.err
        assert (run / "export").exists() == (status == 0)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk(train, tmp_path, small_disk):
    """Its writer works in a thread of its own, whose errors must not be a traceback either."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("a file where a folder should be")
    line = refused(train(tmp_path / "run", "telemetry.tensorboard=true"))
    assert "tensorboard" in line
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").symlink_to(small_disk(8))
    longer = ["telemetry.tensorboard=true", "train.steps=60"]
    line = refused(train(tmp_path / "run", *longer))
    assert "tensorboard" in line and "No space left" in line
    for path in small_disk(8).iterdir():
        path.unlink()
    status, printed, lines = train(tmp_path / "run", *longer, "checkpoint.on_failure=warn")
    assert status == 0 and printed.count("warning: ") == 1 and not lines
    steps = [json.loads(text)["step"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


# -- damaged checkpoints -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_ends_the_same(train, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "export")
    truncated, flipped = (run / f"checkpoints/step_0000000{step}" for step in (6, 4))
    victims = [sorted(folder.rglob("*.safetensors"))[0] for folder in (truncated, flipped)]
    os.truncate(victims[0], victims[0].stat().st_size - 1)
    content = bytearray(victims[1].read_bytes())
    content[len(content) // 2] ^= 16
    victims[1].write_bytes(content)
    (run / "checkpoints/latest").write_text("step_00000099\n")
    status, printed, _ = train(run)
    assert status == 0 and "resumed" in printed and "at step 2" in printed
    told = [line for line in printed.splitlines() if "passed over" in line]
    assert [str(victim.relative_to(run / "checkpoints").relative_to(f"step_0000000{step}")) in line
            for victim, step, line in zip(victims, (6, 4), told, strict=True)] == [True, True]  # fmt: skip
    assert "has" in told[0] and "SHA-256" in told[1] and "'step_00000099'" in printed
    assert end_of(run) == end_of(unbroken) and whole_steps(run) == [6, 4, 2]
    assert (run / "checkpoints/latest").read_text() == "step_00000006\n"


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(train, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    folder = run / "checkpoints/step_00000004"
    os.truncate(folder / "manifest.json", 100)
    before = contents(run)
    line = refused(train(run, "--resume", str(folder)))
    assert str(folder) in line and "manifest.json cannot be read" in line
    assert str(tmp_path / "none") in refused(train(run, "--resume", str(tmp_path / "none")))
    assert contents(run) == before


def test_a_changed_configuration_is_refused_and_changes_nothing(train, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    before = contents(run)
    changes = ["seed=1", "network.hidden=17", "teacher_stage.optimizer.lr=1e-3", "train.global_batch_size=4"]
    for change in changes:
        line = refused(train(run, "train.steps=9", change))
        key, value = change.split("=")
        assert key in line and str(float(value) if "e" in value else value) in line
    assert contents(run) == before


# -- a run that ended, and one that was about to -----------------------------------------------------------------------


def test_a_run_killed_between_its_last_checkpoint_and_its_export_ends_the_same(config, train, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    (run / "export/config.json").write_text("{}")
    assert train(run)[0] == 0
    assert end_of(run) == end_of(unbroken)
    # An export of fewer steps is there, the checkpoint is of more: that run has not ended either.
    assert train(run, "train.steps=8", "checkpoint.every=0")[0] == 0
    shutil.rmtree(run / "export")
    shutil.copytree(unbroken / "export", run / "export")
    status, printed, _ = train(run, "train.steps=8", "checkpoint.every=0")
    assert status == 0 and "nothing to do" not in printed
    assert json.loads((run / "export/config.json").read_text())["step"] == 8
    assert "nothing to do" in train(run, "train.steps=8")[1]


def test_lines_that_a_resumed_run_writes_again_are_cut(tmp_path):
    lines = [{"step": 1}, {"step": 2}, {"step": 2, "validation": {}}, {"step": 3}, {"step": 3, "validation": {}}]
    world = World(0, 1, torch.device("cpu"))
    for step, ended, kept in ((2, False, 3), (3, True, 4), (3, False, 5), (0, False, 0)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text + '{"step": 1, "lo')
        Telemetry(TelemetryOptions(), world, tmp_path, 3, 8).drop_lines_after(step, ended)
        written = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in written] == lines[:kept]


# -- two runs in one folder --------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from rdmd_fast.errors import InputError
from rdmd_fast.processes.run_lock import run_lock
try:
    with run_lock(Path(sys.argv[1])):
        worker = os.fork() if len(sys.argv) > 2 else None
        if worker != 0:
            print("holds", worker, flush=True)
        time.sleep(60)
except InputError as error:
    print(error)
    sys.exit(2)
"""


def test_a_second_run_is_refused_and_a_dead_one_holds_no_lock(fork_python, tmp_path):
    first = fork_python(HOLDER, tmp_path / "run", "with a worker")
    _, worker = first.stdout.readline().split()
    try:
        second = fork_python(HOLDER, tmp_path / "run")
        line, _ = second.finish()
        assert second.returncode == 2 and line.count("\n") == 1 and "another job is training in it" in line
        first.kill()
        first.wait(30)
        # A decoding worker, forked while the lock was held, lives on for a while.
        os.kill(int(worker), 0)
        third = fork_python(HOLDER, tmp_path / "run")
        assert third.stdout.readline().startswith("holds")
        third.kill()
        third.wait(30)
    finally:
        os.kill(int(worker), signal.SIGKILL)
        first.kill()


def test_a_run_beside_a_running_one_changes_nothing(fork_python, train, config, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    holder = fork_python(HOLDER, run)
    try:
        assert holder.stdout.readline().startswith("holds")
        before = contents(run)
        assert "another job is training in it" in refused(train(run, "train.steps=9"))
        assert contents(run) == before
    finally:
        holder.kill()
        holder.wait(30)
    assert train(run, "train.steps=9")[0] == 0


def test_a_rank_ends_with_its_status_whatever_the_interpreter_would_do_on_its_way_out():
    """A gloo thread that lets go of a tensor while the interpreter is taken down aborts: here an object does so."""
    program = """
import atexit, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
class Late:
    def __del__(self):
        os.abort()
late = Late()
atexit.register(print, "exit handlers run")
from rdmd_fast import trainer
from rdmd_fast.train import run_rank
trainer.main = lambda stop: 75
threading.Thread(target=lambda: (time.sleep(0.5), print("threads end"))).start()
idle = ThreadPoolExecutor(1)
idle.submit(int).result()
run_rank()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines() == ["threads end", "exit handlers run"]
