"""Ranks from the environments that Slurm 22.05 and Open MPI 4.1 gave on two nodes (shortened)."""

import socket

import material
import pytest

from rdmd_fast.errors import InputError
from rdmd_fast.processes import launchers
from rdmd_fast.processes.launchers import adopt_launcher, cores_of_rank, first_host, tasks_per_node

ALLOCATION = {"SLURM_JOB_ID": "25017", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "node-a,node-b"}
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = ALLOCATION | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node-a,node-b",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.213.77.9",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def named_host(monkeypatch):
    """A host whose own name means an address that others reach."""
    monkeypatch.setattr(launchers, "_address_of", lambda host: "10.0.0.1")


def adopted(environment):
    environment = dict(environment)
    adopt_launcher(environment)
    return tuple(environment.get(name) for name in NAMES)


def test_a_slurm_step_of_several_tasks_is_a_world():
    assert adopted(STEP) == ("1", "2", "0", "1", "node-a", "15017")


@pytest.mark.parametrize("environment", [
    {},
    ALLOCATION,  # a shell of salloc
    BATCH,  # the batch script itself
    BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 --pty bash
])  # fmt: skip
def test_one_process_inside_an_allocation_is_alone(environment):
    assert adopted(environment) == (None,) * 6


def test_torchrun_inside_srun_is_left_as_it_is():
    inner = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert adopted(STEP | inner) == ("5", "8", "1", None, "10.0.0.1", "29500")
    assert adopted(inner | {"LOCAL_SIZE": "4"})[3] == "4"  # the deepspeed launcher's word


def test_uneven_nodes_and_steps_of_one_job_have_their_own_numbers():
    third = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "6"}
    uneven = STEP | third | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2),1", "SLURM_STEP_ID": "3"}
    assert adopted(uneven) == ("5", "6", "1", "2", "node-a", "15020")


def test_a_task_that_sees_one_gpu_uses_number_0():
    second = STEP | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    assert adopted(second | {"CUDA_VISIBLE_DEVICES": "1"})[2] == "0"
    assert adopted(second | {"CUDA_VISIBLE_DEVICES": "0,1"})[2] == "1"


def test_the_meeting_place_can_be_named():
    assert adopted(STEP | {"MASTER_ADDR": "ib-a", "MASTER_PORT": "4000"})[4:] == ("ib-a", "4000")


def test_mpirun_needs_a_meeting_place_on_several_nodes_alone():
    assert adopted(MPI | {"MASTER_ADDR": "node-a", "MASTER_PORT": "4000"}) == ("3", "4", "1", "2", "node-a", "4000")
    assert adopted(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})[4] == "127.0.0.1"
    with pytest.raises(InputError, match="MASTER_ADDR and MASTER_PORT: not set, but WORLD_SIZE is 4"):
        adopted(MPI)


def test_ranks_that_cannot_meet_are_refused():
    with pytest.raises(InputError, match="MASTER_PORT: not set, but WORLD_SIZE is 2"):
        adopted({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node-a"})


@pytest.mark.parametrize("nodes,first", [
    ("node-a", "node-a"),
    ("node-a,node-b", "node-a"),
    ("gpu[07-09,12],login1", "gpu07"),
    ("gpu[07,12]-ib", "gpu07-ib"),
    ("rack[1-2]node[03-04].site", "rack1node03.site"),
])  # fmt: skip
def test_first_host_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first


def test_tasks_per_node_are_written_out():
    assert tasks_per_node("4") == [4] and tasks_per_node("2(x3),1") == [2, 2, 2, 1]


PAIR = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "main", "MASTER_PORT": "4000"}


@pytest.mark.parametrize("own,main,cards,chosen", [
    ("10.0.0.2", "10.0.0.1", {"eth0": "10.0.0.2"}, None),  # gloo finds its way
    ("127.0.1.1", "10.0.0.1", {"ib0": "10.0.0.2", "docker0": "172.17.0.1"}, "ib0"),  # on the way to the main node
    (None, "10.0.0.1", {"ib0": "10.0.0.2", "docker0": "172.17.0.1"}, "ib0"),  # a name that means nothing
    ("127.0.1.1", "127.0.1.1", {"eth0": "10.0.0.2"}, "eth0"),  # the main node itself, by name
    ("127.0.1.1", "127.0.1.1", {"eth0": "10.0.0.2", "docker0": "172.17.0.1"}, None),  # who could tell
])  # fmt: skip
def test_gloo_gets_the_interface_that_nodes_share(monkeypatch, own, main, cards, chosen):
    monkeypatch.setattr(launchers, "_address_of", lambda host: main if host == "main" else own)
    monkeypatch.setattr(launchers, "interfaces", lambda: {"lo": "127.0.0.1", **cards})
    monkeypatch.setattr(launchers, "_source_address", lambda target: "10.0.0.2")
    environment = dict(PAIR)
    adopt_launcher(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == chosen


def test_one_machine_and_the_users_choice_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(launchers, "_address_of", lambda host: "127.0.1.1")
    monkeypatch.setattr(launchers, "interfaces", lambda: {"eth0": "10.0.0.2"})
    alone = [PAIR | {"LOCAL_WORLD_SIZE": "2"}, PAIR | {"MASTER_ADDR": "127.0.0.1"}, {"RANK": "0", "WORLD_SIZE": "1"}]
    for environment in (*alone, PAIR | {"GLOO_SOCKET_IFNAME": "ib0"}):
        before = environment.get("GLOO_SOCKET_IFNAME")
        adopt_launcher(environment)
        assert environment.get("GLOO_SOCKET_IFNAME") == before


def test_interfaces_are_this_hosts():
    addresses = launchers.interfaces()
    assert addresses["lo"] == "127.0.0.1"
    assert launchers._source_address("127.0.0.1") == "127.0.0.1"
    for address in addresses.values():
        with socket.socket() as probe:
            probe.bind((address, 0))  # only an address of this host can be bound


@pytest.mark.parametrize(("environment", "cores"), [
    ({}, 8),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 4),
    ({"WORLD_SIZE": "2"}, 4),
    ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "16"}, 1),
    # srun's tasks are the ranks: bound to cores of their own, or told how many of the node's are theirs.
    (STEP | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "8"}, 8),
    (STEP | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "3"}, 3),
    (STEP | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 4),
    # torchrun in each task, deepspeed in a batch script: the task's cores are for all of their ranks.
    (STEP | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "8"}, 2),
    (BATCH | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "8"}, 2),
])  # fmt: skip
def test_cores_are_divided_once(monkeypatch, environment, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert cores_of_rank(environment) == cores


@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, 8),
    ({"cpu.max": "1600000 100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu.max": "nonsense"}, 8),
    ({}, 8),
])  # fmt: skip
def test_a_containers_quota_bounds_the_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    material.write_files(tmp_path, {name: text.encode() for name, text in files.items()})
    assert launchers.granted_cores(tmp_path) == cores


@pytest.mark.parametrize(("load", "said"), [(2.9, None), (3.1, "3.1 processes compete for 2 cores")])
def test_cores_that_others_keep_busy_are_said(monkeypatch, load, said):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    line = launchers.busy_cores()
    assert line is None if said is None else said in line
