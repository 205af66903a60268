"""Ranks however they are started, and surroundings in which they cannot be: one line and status 2."""

import errno
import json
import os
import resource
import socket
from types import SimpleNamespace

import pytest

from rdmd_fast import cli
from rdmd_fast.errors import InputError
from rdmd_fast.processes import launchers
from rdmd_fast.processes.entry import prepare_process, system_input_error
from rdmd_fast.processes.launchers import adopt_launcher, check_port_is_free, cores_of_rank, place, restarts_left
from rdmd_fast.processes.signals import StopRequest
from rdmd_fast.processes.world import join_world
from rdmd_fast.trainer import main, parse_arguments

VALUES = {
    "stage": "teacher",
    "data": {"target": {"toy": "8gaussians"}},
    "network": {"kind": "mlp", "hidden": 16, "depth": 1},
    "train": {"steps": 2, "global_batch_size": 8},
    "telemetry": {"log_every": 1, "sample_every": 0, "tensorboard": False},
    "checkpoint": {"every": 0},
}
# Kubeflow's PyTorchJob: one process a pod.
POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SLURM = {
    "SLURM_JOB_ID": "25017", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
KUBERNETES = "tcp://10.0.0.1:29500"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(VALUES | {"run_dir": str(tmp_path / "run")}))
    return path


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Variables of launchers as the test sets them, and afterwards as they were."""
    monkeypatch.setattr(launchers, "_address_of", lambda host: "10.0.0.1")
    for name in (*POD, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def adopted(environment):
    environment = dict(environment)
    adopt_launcher(environment)
    return environment


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_a_process_a_pod_has_its_machine_for_its_own(monkeypatch):
    found = adopted(POD)
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("0", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert cores_of_rank(found) == 8
    found = adopted(POD | {"MASTER_ADDR": "127.0.0.1"})
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert adopted(POD | {"LOCAL_RANK": "1"})["LOCAL_RANK"] == "1"


def test_ranks_without_local_rank_train(rank_server, config, tmp_path):
    unset = "import os; del os.environ['LOCAL_RANK']"
    ids = rank_server.start(["--config", config], 2, tmp_path / "log", unset)
    assert rank_server.wait(ids) == [0, 0], (tmp_path / "log").read_text()


def test_either_spelling_of_the_launchers_argument():
    for word in ("--local-rank", "--local_rank"):
        assert parse_arguments(["--config", "a.yaml", f"{word}=3", "key=1"]).local_rank == "3"


# -- variables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "auto"}, "WORLD_SIZE: 'auto' is not a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is not"),
        ({"WORLD_SIZE": "2"}, "RANK: not set, but WORLD_SIZE is 2"),
        (POD | {"RANK": "2"}, r"RANK: '2' is not a whole number from 0 to 1 \(WORLD_SIZE is 2\)"),
        (POD | {"RANK": ""}, "RANK"),
        (POD | {"LOCAL_RANK": "first"}, "LOCAL_RANK: 'first' is not"),
        (POD | {"MASTER_PORT": KUBERNETES}, f"MASTER_PORT: '{KUBERNETES}' is not .*Kubernetes sets it"),
        (POD | {"MASTER_PORT": "70000"}, "MASTER_PORT: '70000' is not a whole number from 1 to 65535"),
        (POD | {"LOCAL_RANK": "0", "LOCAL_SIZE": "all"}, "LOCAL_WORLD_SIZE: 'all' is not"),
        (POD | {"TORCHELASTIC_MAX_RESTARTS": "x"}, "TORCHELASTIC_MAX_RESTARTS: 'x' is not"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2(x2)"}, r"SLURM_STEP_NUM_TASKS: '2\(x2\)' is not"),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID: '2' is not a whole number from 0 to 1"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE: 'two' is no list of Slurm's"),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_LOCALID"}, "SLURM_LOCALID: not set, but has to be"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_SIZE: not set"),
    ],
)
def test_a_variable_that_is_no_number_is_named_with_its_value(environment, told):
    with pytest.raises(InputError, match=told):
        adopted(environment)


def test_a_process_alone_ignores_where_others_would_meet():
    assert "LOCAL_RANK" not in adopted({"MASTER_PORT": KUBERNETES})
    adopted({"MASTER_PORT": KUBERNETES, "RANK": "0", "WORLD_SIZE": "1"})


def test_the_command_ends_with_one_line(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "auto")
    assert place() == (0, 1)
    assert main(["--config", str(config)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "WORLD_SIZE: 'auto'" in printed


def test_a_level_that_deepspeed_does_not_know(monkeypatch):
    monkeypatch.setenv("DS_LOG_LEVEL", "quiet")
    with pytest.raises(InputError, match="DS_LOG_LEVEL: 'quiet' is none of debug, info"):
        join_world()


def test_a_port_in_use_is_told_by_the_rank_that_would_open_it():
    with socket.create_server(("", 0)) as other:
        taken = POD | {"RANK": "0", "MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(InputError, match=f"MASTER_PORT: port {taken['MASTER_PORT']} .* in use"):
            check_port_is_free(taken)
        check_port_is_free(taken | {"RANK": "1"})
        check_port_is_free(taken | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    check_port_is_free(taken)


# -- restarts and limits -----------------------------------------------------------------------------------------------


def test_a_stop_says_that_torchrun_will_start_again(config, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    stop = SimpleNamespace(requested=StopRequest("SIGUSR1"))
    assert restarts_left() == 2
    assert main(["--config", str(config)], stop=stop) == 75
    assert "starts the ranks again (2 of its --max-restarts are left)" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert main(["--config", str(config)], stop=stop) == 75
    assert "again" not in capsys.readouterr().out


def test_the_limit_of_open_files_is_raised_or_named(monkeypatch, capsys):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        prepare_process()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    lacking = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert str(system_input_error(lacking)) == f"Too many open files: raise the limit of {before[0]} (`ulimit -n`)"
    assert system_input_error(OSError(errno.EIO, "names no file")) is None

    def run(arguments):
        raise lacking

    monkeypatch.setattr("rdmd_fast.commands.sweep.run", run)
    assert cli.main(["sweep", "--config", "none", "--out", "none"]) == 2
    assert "Too many open files: raise" in capsys.readouterr().err
