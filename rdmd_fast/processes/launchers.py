"""What `srun` and `mpirun` tell their processes, in the words of `torchrun` and `deepspeed`."""

import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping, MutableMapping

from rdmd_fast.errors import InputError

# Below the ports that Linux hands out to clients (32768 and up), so that nobody else is likely to hold it.
FIRST_PORT, PORTS = 10_000, 20_000


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where a launcher set its own.

    `torchrun` and `deepspeed` set RANK: then nothing is read from elsewhere. `srun` counts inside a job step of
    several tasks alone: a batch script, and a shell inside an allocation, hold SLURM variables too. MASTER_ADDR and
    MASTER_PORT are kept if they are set.

    Raises:
        InputError: ranks are set but not where they meet, or the launcher does not tell it.
    """
    if "RANK" not in environment:
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
            found = _slurm(environment)
        elif int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
            found = _open_mpi(environment)
        else:
            return
        for name, value in found.items():
            environment.setdefault(name, value)
    if "LOCAL_SIZE" in environment:  # DeepSpeed's word
        environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
    _check_complete(environment)
    _choose_interface(environment)


def _slurm(environment) -> dict[str, str]:
    local, node = environment["SLURM_LOCALID"], int(environment["SLURM_NODEID"])
    job = int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", 0))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        # With --gpus-per-task each task sees its own GPU alone, as number 0.
        "LOCAL_RANK": "0" if len(_visible_gpus(environment)) == 1 else local,
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        # Not SLURM_LAUNCH_NODE_IPADDR: that is where srun was typed, a login node perhaps.
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }


def _open_mpi(environment) -> dict[str, str]:
    local, size = environment["OMPI_COMM_WORLD_LOCAL_SIZE"], environment["OMPI_COMM_WORLD_SIZE"]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(FIRST_PORT)} if local == size else {}
    return alone | {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_WORLD_SIZE": local,
    }


def cores_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Cores for this rank: those that `srun` has bound it to, else its share of what the node's ranks may all use.

    Slurm's variables count where its tasks are the ranks: `torchrun` and `deepspeed` inside a task or a batch script
    inherit them too.
    """
    cores = len(os.sched_getaffinity(0))
    size = environment.get("WORLD_SIZE", "1")
    if environment.get("SLURM_STEP_NUM_TASKS") == size and "SLURM_CPUS_PER_TASK" in environment:
        return min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", size)))


def _visible_gpus(environment) -> list[str]:
    return [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]


def _check_complete(environment) -> None:
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise InputError(
            f"{' and '.join(missing)}: not set, but WORLD_SIZE is {environment['WORLD_SIZE']}; "
            "set them to the first node's address and a free port there, on all nodes alike"
        )


def _choose_interface(environment) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would tell other nodes a loopback address.

    gloo takes the address that the host's own name means, and on Debian and Ubuntu /etc/hosts says 127.0.1.1. GPU runs
    use gloo too, for votes.
    """
    size, local = int(environment.get("WORLD_SIZE", 1)), int(environment.get("LOCAL_WORLD_SIZE", 0))
    one_machine = size in (1, local) or environment["MASTER_ADDR"].startswith(("127.", "localhost"))
    if one_machine or "GLOO_SOCKET_IFNAME" in environment:
        return
    if not _is_loopback(_address_of(socket.gethostname())):
        return
    there = _address_of(environment["MASTER_ADDR"])
    names = {address: name for name, address in interfaces().items() if not _is_loopback(address)}
    source = None if _is_loopback(there) else _source_address(there)
    if source in names:
        environment["GLOO_SOCKET_IFNAME"] = names[source]
    elif len(names) == 1:  # on the main node its name may mean loopback
        environment["GLOO_SOCKET_IFNAME"] = next(iter(names.values()))


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.")


def _source_address(target: str) -> str | None:
    """This host's address on the way to ``target``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
            return probe.getsockname()[0]
        except OSError:
            return None


def interfaces() -> dict[str, str]:
    """IPv4 addresses of this host's network interfaces, by name."""
    found, query = {}, 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, query, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def first_host(nodes: str) -> str:
    """The first of Slurm's node list: ``gpu[07-09,12],login1`` begins with gpu07."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry)


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's run-length list written out: ``2(x3),1`` is [2, 2, 2, 1]."""
    runs = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in counts.split(","))
    return [int(run[1]) for run in runs for _ in range(int(run[2] or 1))]
