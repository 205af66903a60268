"""Signals at any moment, plainly and under the deepspeed launcher: the state is saved and no process stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from material import toy_rdmd

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "rdmd_fast/train.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
ZERO_1 = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
CONFIG = toy_rdmd(validation={"every": 0, "count": 16}, deepspeed=ZERO_1)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def write_config(folder):
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "run_dir": str(folder / "run")}))
    return ["--config", str(folder / "config.yaml")]


def latest(folder):
    return int((folder / "run/checkpoints/latest").read_text().strip().removeprefix("step_"))


# -- one process -------------------------------------------------------------------------------------------------------

HOLD = """
import time
from rdmd_fast.processes import signals
signals.REPEAT_SECONDS = {repeat}
with signals.StopSignal() as stop:
    print("ready", flush=True)
    while stop.requested is None: time.sleep(0.01)
    print(stop.requested.name, flush=True)
    time.sleep({then})
"""


@pytest.mark.parametrize("repeat,status", [(60, 0), (0.2, 128 + signal.SIGTERM)])
def test_a_repeat_is_ignored_for_seconds_and_then_ends_the_process(fork_python, repeat, status):
    process = fork_python(HOLD.format(repeat=repeat, then=1.5))
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == status


def test_signal_while_modules_are_imported_saves_and_exits_75(tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN, *write_config(tmp_path)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")

    def heeded():
        caught = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        return int(caught, 16) >> (signal.SIGTERM - 1) & 1

    assert until(heeded, 30)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped by SIGTERM at step 0" in output and latest(tmp_path) == 0


def test_a_run_outlives_those_who_read_what_it_says():
    script = (
        "import sys; from rdmd_fast.monitoring.telemetry import print_line; "
        "[print_line('x' * 100000) for _ in range(3)]; sys.exit(75)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(20) == 75 and process.stderr.read() == b""


# -- two ranks ---------------------------------------------------------------------------------------------------------

# A rank signals itself in the middle of something, ``insist`` times.
DURING = """
import os, signal, time
from rdmd_fast import trainer
from rdmd_fast.checkpoints import checkpoint
from rdmd_fast.processes import signals
owner, name = {{"save": (checkpoint, "write_state"), "validate": (trainer.Training, "_measure")}}["{what}"]
original, done = getattr(owner, name), []
def spoilt(*arguments, **keywords):
    if rank == {on} and not done:
        done.append(True)
        signals.REPEAT_SECONDS = 0.1
        for _ in range({insist}):
            os.kill(os.getpid(), signal.{signal})
            time.sleep(0.2)
    return original(*arguments, **keywords)
setattr(owner, name, spoilt)
"""


def test_signals_on_one_rank_stop_both_and_the_same_command_goes_on(rank_server, tmp_path):
    arguments, logs = [*write_config(tmp_path), "checkpoint.every=3"], []

    def job(*overrides, before=""):
        logs.append(tmp_path / f"log_{len(logs)}")
        return rank_server.start([*arguments, *overrides], 2, logs[-1], before)

    def check(ranks, statuses, resumed, saved):
        assert rank_server.wait(ranks, 240) == statuses, logs[-1].read_text()
        assert f"resumed {tmp_path}/run/checkpoints/step_{resumed:08d} at step {resumed}" in logs[-1].read_text()
        assert latest(tmp_path) == saved

    ranks = job("checkpoint.every=0")
    assert until((tmp_path / "run/metrics.jsonl").exists)
    os.kill(ranks[1], signal.SIGUSR1)
    assert rank_server.wait(ranks, 240) == [75, 75], logs[-1].read_text()
    first = latest(tmp_path)
    # In the middle of a save: it is finished, and no further iteration is.
    second = first + 3 - first % 3
    check(job(before=DURING.format(what="save", signal="SIGTERM", on=0, insist=1)), [75, 75], first, second)
    # Insisting then: this rank is gone at once, the other follows, the last checkpoint is whole.
    insisted = [1, 128 + signal.SIGTERM]
    check(job(before=DURING.format(what="save", signal="SIGTERM", on=1, insist=2)), insisted, second, second)
    # In the middle of the main rank's validation; the other rank waits for it.
    arguments[-1] = "checkpoint.every=0"
    during = DURING.format(what="validate", signal="SIGINT", on=0, insist=1)
    check(job("validation.every=4", before=during), [75, 75], second, second + 4 - second % 4)
    assert '"validation"' in (tmp_path / "run/metrics.jsonl").read_text()


# -- the deepspeed launcher --------------------------------------------------------------------------------------------


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(process):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


def check_launcher(folder, whom, number, status):
    """Signal one of the launcher's processes while it trains; all end, with the state saved."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", TRAIN, *write_config(folder)]
    command.append("deepspeed.zero_optimization.stage=0")  # whose engines start seconds sooner
    with open(folder / "log", "w") as log:
        runner = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    others = []
    try:
        assert until((folder / "run/metrics.jsonl").exists, 240), (folder / "log").read_text()
        (launcher,) = children(runner.pid)
        ranks = children(launcher)
        others = [launcher, *ranks]
        main_rank = int((folder / "run/.lock").read_text().split()[0])
        assert len(ranks) == 2 and main_rank in ranks
        target = {"main rank": main_rank, "runner": runner.pid, "launcher": launcher}[whom]
        os.kill(target, number)
        assert runner.wait(100) == status, (folder / "log").read_text()
        assert until(lambda: not any(map(is_alive, others)), 60), "orphans"
    finally:
        for process in filter(is_alive, [runner.pid, *others]):
            os.kill(process, signal.SIGKILL)
    output = (folder / "log").read_text()
    assert latest(folder) >= 1 and "state saved" in output and "Traceback" not in output
    return output


def test_the_deepspeed_launcher_compiles_nothing_and_leaves_no_orphan(tmp_path):
    output = check_launcher(tmp_path, "runner", signal.SIGKILL, -signal.SIGKILL)
    assert "built successfully" not in output and "ninja" not in output.lower()


@pytest.mark.slow
@pytest.mark.parametrize("whom,number,status", [
    ("main rank", signal.SIGUSR1, 75),
    ("runner", signal.SIGTERM, -signal.SIGTERM),
    ("launcher", signal.SIGTERM, 1),
    ("launcher", signal.SIGKILL, 0),
    ("launcher", signal.SIGUSR1, 0),
])  # fmt: skip
def test_every_process_of_the_launcher_can_be_signalled(tmp_path, whom, number, status):
    check_launcher(tmp_path, whom, number, status)
