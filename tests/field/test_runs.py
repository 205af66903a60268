"""What a run tells of itself: steps once, a run of its own at Weights & Biases, rates that move, in any locale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.monitoring.telemetry import Telemetry, TelemetryOptions
from rdmd_fast.processes.entry import system_input_error
from rdmd_fast.processes.world import World
from rdmd_fast.trainer import main

ALONE = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[2]
VALUES = {
    "stage": "teacher",
    "data": {"target": {"toy": "8gaussians"}},
    "network": {"kind": "mlp", "hidden": 16, "depth": 1},
    "train": {"global_batch_size": 8},
    "telemetry": {"log_every": 1, "sample_every": 0, "tensorboard": False},
    "checkpoint": {"every": 0},
}


def telemetry(run_dir, **options):
    return Telemetry(TelemetryOptions(**options), ALONE, run_dir, 4, 8)


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def write_steps(run_dir, began, steps, validation=None, ended=False, anew=False):
    """One start of a run: it goes on at ``began``, writes lines of ``steps``, and validates at one of them."""
    writer = telemetry(run_dir)
    writer.drop_lines_after(-1 if anew else began, ended)
    writer.start(began, anew)
    for step in steps:
        writer.write({"step": step, "loss": 1.0})
    if validation:
        writer.write({"step": validation, "validation": {"cost": 2.0}})
    writer.close()


def shown(run_dir):
    """Steps by name as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {
        name: [event.step for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if events.Scalars(name)
    }


def test_tensorboard_has_no_step_twice(tmp_path):
    write_steps(tmp_path, 0, [1, 2, 3], anew=True)
    write_steps(tmp_path, 2, [3, 4], validation=4)  # killed after step 3, resumed at 2
    assert shown(tmp_path) == {"loss": [1, 2, 3, 4], "validation/cost": [4]}
    write_steps(tmp_path, 4, [], validation=4, ended=True)  # killed before its export: it validates again
    assert shown(tmp_path) == {"loss": [1, 2, 3, 4], "validation/cost": [4]}
    write_steps(tmp_path, 0, [1, 2], anew=True)  # --resume never
    assert shown(tmp_path) == {"loss": [1, 2]}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


# -- Weights & Biases --------------------------------------------------------------------------------------------------

LIBRARY = """
class UsageError(Exception): pass
calls, refuse = [], None
def init(**arguments):
    if refuse: raise UsageError(refuse)
    calls.append(arguments)
    class Run:
        def log(self, values, step): pass
        def finish(self): pass
    return Run()
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """``library(text)`` stands for wandb."""
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def install(text):
        (tmp_path / "stub/wandb").mkdir(parents=True)
        (tmp_path / "stub/wandb/__init__.py").write_text(text)

    yield install
    sys.modules.pop("wandb", None)


def begin(run_dir, anew=True):
    run_dir.mkdir(parents=True, exist_ok=True)
    telemetry(run_dir, tensorboard=False, wandb_project="p").start(0, anew)


def test_a_folder_has_a_run_of_its_own_at_wandb(library, tmp_path):
    library(LIBRARY)
    one, other = tmp_path / "λ_0.1/final", tmp_path / "λ_0.5/final"
    for folder, anew in ((one, True), (other, True), (one, False), (one, True), (one, False)):
        begin(folder, anew)
    calls = sys.modules["wandb"].calls
    first, second, resumed, new, again = (call["id"] for call in calls)
    assert first == resumed and new == again and len({first, second, new}) == 3
    assert (one / "wandb_id").read_text() == f"{new}\n" and new.isalnum()
    assert {(call["project"], call["name"], call["resume"]) for call in calls} == {("p", "final", "allow")}
    (one / "wandb_id").write_text("a/b")
    begin(one, False)
    assert calls[-1]["id"] != "a/b"


def refused(run_dir):
    with pytest.raises(InputError) as error:
        begin(run_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_wandb_refuses_is_one_line(library, tmp_path):
    library(LIBRARY.replace("refuse = [], None", "refuse = [], 'api_key not\\nconfigured'"))
    assert "wandb refuses to begin (UsageError: api_key not configured), see `wandb login`" in refused(tmp_path)


def test_a_broken_wandb_is_not_called_missing(library, tmp_path):
    library("import missing_dependency")
    assert "cannot be imported (ModuleNotFoundError: No module named 'missing_dependency')" in refused(tmp_path)


def test_a_missing_wandb(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb is not installed" in refused(tmp_path) or "halted" in refused(tmp_path)


# -- learning rates ----------------------------------------------------------------------------------------------------


def train(tmp_path, steps, *more):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(VALUES | {"run_dir": str(tmp_path / "run")}))
    return main(["--config", str(path), f"train.steps={steps}", *more])


def test_a_rate_that_leaves_its_course_is_told(tmp_path, capsys):
    cosine = "teacher_stage.optimizer={lr: 1.0e-3, decay: cosine}"
    assert train(tmp_path, 6, cosine) == 0 and train(tmp_path, 12, cosine) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    moved = "warning: lr/teacher goes on at 0.0005 from 6.7e-05 at step 6"
    assert told == [f"{moved}: train.steps is 12, of this checkpoint's run it was 6"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr/teacher"] for line in lines}
    assert rates[6] == pytest.approx(6.7e-5, rel=1e-2) and rates[7] == pytest.approx(5e-4)


def test_a_constant_rate_says_nothing(tmp_path, capsys):
    assert train(tmp_path, 2) == 0 and train(tmp_path, 3) == 0
    assert "warning" not in capsys.readouterr().out


# -- locales -----------------------------------------------------------------------------------------------------------

LATIN = {"PYTHONIOENCODING": "latin-1"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def rdmd(folder, environment, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "rdmd_fast.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60)


@pytest.mark.parametrize("environment", [LATIN, ASCII], ids=["latin-1", "ASCII"])
def test_commands_name_any_file_in_any_locale(tmp_path, environment):
    from PIL import Image

    from rdmd_fast.data.shards.shard_set import ShardSet

    assert rdmd(tmp_path, environment, "--help").returncode == 0
    (tmp_path / "λ/photos").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "λ/photos/é.png")
    done = rdmd(tmp_path / "λ", environment, "pack", "photos", "--out", "λset", "--resolution", "8", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert ShardSet(tmp_path / "λ/λset").keys == ["é"]
    assert ("λset".encode() if environment is ASCII else rb"\u03bbset") in done.stdout


def test_a_run_in_a_folder_that_its_log_cannot_name(rank_server, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(VALUES | {"run_dir": "λ"}), encoding="utf-8")
    before = (
        f"import io, os, sys; os.chdir({str(tmp_path)!r}); "
        "sys.stdout, sys.stderr = (io.TextIOWrapper(open(number, 'wb', closefd=False), 'latin-1') for number in (1, 2))"
    )
    words = ["--config", "config.yaml", "train.steps=2", "telemetry.tensorboard=true"]
    ids = rank_server.start(words, 1, tmp_path / "log", before)
    assert rank_server.wait(ids) == [0], (tmp_path / "log").read_text()
    assert r"done: \u03bb/export" in (tmp_path / "log").read_text()
    assert "run_dir: λ" in (tmp_path / "λ/config.yaml").read_text(encoding="utf-8")


def test_a_name_that_the_locale_has_not_is_bad_input(monkeypatch):
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "latin-1")
    with pytest.raises(UnicodeEncodeError) as error:
        "λ".encode("latin-1")
    told = str(system_input_error(UnicodeEncodeError("latin-1", *error.value.args[1:])))
    assert told.startswith("λ: is no file's name in this locale (latin-1)")
    assert system_input_error(UnicodeEncodeError("ascii", *error.value.args[1:])) is None
