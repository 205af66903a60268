"""What launchers tell their processes, in the words of `torchrun` and `deepspeed`: all of it is read here."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from rdmd_fast.errors import InputError, quoted

# Below the ports that Linux hands out to clients (32768 and up), so that nobody else is likely to hold it.
FIRST_PORT, PORTS = 10_000, 20_000


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where a launcher set its own.

    `torchrun` and `deepspeed` set RANK: then nothing is read from elsewhere. With RANK alone, as Kubeflow's PyTorchJob
    sets it, each rank has a machine for itself. `srun` counts inside a job step of several tasks alone: a batch script,
    and a shell inside an allocation, hold SLURM variables too. MASTER_ADDR and MASTER_PORT are kept if they are set.

    Raises:
        InputError: a variable is no number that it could be; ranks are set but not where they meet, or the launcher
            does not tell it.
    """
    if "RANK" in environment:
        found = {} if "LOCAL_RANK" in environment else _one_by_machine(environment)
    elif _number("SLURM_STEP_NUM_TASKS", environment, 1) > 1 and "SLURM_PROCID" in environment:
        found = _slurm(environment)
    elif _number("OMPI_COMM_WORLD_SIZE", environment, 1) > 1:
        found = _open_mpi(environment)
    else:
        found = {}
    if "LOCAL_SIZE" in environment:  # DeepSpeed's word
        environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
    for name, value in found.items():
        environment.setdefault(name, value)
    _check(environment)
    _choose_interface(environment)


def _one_by_machine(environment) -> dict[str, str]:
    """Of a rank that is told its number alone: the ranks share a machine where they meet on a loopback address."""
    if _is_here(environment.get("MASTER_ADDR", "")):
        return {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment.get("WORLD_SIZE", "1")}
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _slurm(environment) -> dict[str, str]:
    job = _number("SLURM_JOB_ID", environment) + _number("SLURM_STEP_ID", environment, 0)
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local, node = _number("SLURM_LOCALID", environment), _number("SLURM_NODEID", environment, most=len(counts) - 1)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        # With --gpus-per-task each task sees its own GPU alone, as number 0.
        "LOCAL_RANK": "0" if len(_visible_gpus(environment)) == 1 else str(local),
        "LOCAL_WORLD_SIZE": str(counts[node]),
        # Not SLURM_LAUNCH_NODE_IPADDR: that is where srun was typed, a login node perhaps.
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }


def _open_mpi(environment) -> dict[str, str]:
    size, local = (_number(f"OMPI_COMM_WORLD_{name}", environment, least=1) for name in ("SIZE", "LOCAL_SIZE"))
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(FIRST_PORT)} if local == size else {}
    return alone | {
        "RANK": str(_number("OMPI_COMM_WORLD_RANK", environment)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_number("OMPI_COMM_WORLD_LOCAL_RANK", environment)),
        "LOCAL_WORLD_SIZE": str(local),
    }


def _number(
    name: str, environment: Mapping[str, str], unset: int | None = None, least: int = 0, most: int = 2**32, why=""
) -> int:
    """The whole number that a variable holds, ``unset`` where it is not set.

    Raises:
        InputError: it holds no number from ``least`` to ``most``, or is not set and has to be; ``why`` ends the line.
    """
    text = environment.get(name)
    if text is None and unset is not None:
        return unset
    if text is not None and re.fullmatch(r"[0-9]{1,10}", text) and least <= int(text) <= most:
        return int(text)
    bounds = f"from {least}" if most == 2**32 else f"from {least} to {most}"
    found = "not set, but has to be" if text is None else f"{quoted(text)} is not"
    raise InputError(f"environment variable {name}: {found} a whole number {bounds}{why}, set it to one")


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This rank's number and how many there are, before they have met; (0, 1) as far as that cannot be told."""

    def told(name: str, unset: int) -> int:
        try:
            return _number(name, environment, unset)
        except InputError:
            return unset

    return told("RANK", 0), told("WORLD_SIZE", 1)


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    return _number("LOCAL_RANK", environment, 0)


def restarts_left(environment: Mapping[str, str] = os.environ) -> int:
    """How often `torchrun --max-restarts` would start ranks again that end with another status than 0."""
    done = _number("TORCHELASTIC_RESTART_COUNT", environment, 0)
    return max(0, _number("TORCHELASTIC_MAX_RESTARTS", environment, 0) - done)


def check_port_is_free(environment: Mapping[str, str] = os.environ) -> None:
    """Whether the main rank can open MASTER_PORT, where it is the one to do so; InputError if not."""
    rank, _ = place(environment)
    if rank or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the ranks meet at `torchrun` itself
        return
    port = _number("MASTER_PORT", environment)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(
                    f"environment variable MASTER_PORT: port {port} of this machine cannot be opened "
                    f"({error.strerror}), choose another (--master_port of a launcher)"
                ) from None


def cores_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Cores for this rank: those that `srun` has bound it to, else its share of what the node's ranks may all use.

    Slurm's variables count where its tasks are the ranks: `torchrun` and `deepspeed` inside a task or a batch script
    inherit them too.
    """
    cores = granted_cores()
    size = _number("WORLD_SIZE", environment, 1, least=1)
    if _number("SLURM_STEP_NUM_TASKS", environment, 0) == size and "SLURM_CPUS_PER_TASK" in environment:
        return min(cores, _number("SLURM_CPUS_PER_TASK", environment, least=1))
    return max(1, cores // _number("LOCAL_WORLD_SIZE", environment, size, least=1))


def granted_cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those it is bound to, or fewer by a container's quota of CPU time."""
    cores = len(os.sched_getaffinity(0))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join((control_group / name).read_text() for name in names).split())
            if quota > 0 < period:
                return min(cores, max(1, round(quota / period)))
    return cores


def busy_cores() -> str | None:
    """A line where others keep this machine's cores busy as this process begins; None where they do not."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 1.5 * cores:
        return None
    return f"warning: {load:.1f} processes compete for {cores} cores, steps on the CPU will take longer than alone"


def _visible_gpus(environment) -> list[str]:
    return [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]


def _check(environment) -> None:
    size = _number("WORLD_SIZE", environment, 1, least=1)
    if size > 1:
        if not environment.get("RANK"):
            raise InputError(f"environment variable RANK: not set, but WORLD_SIZE is {size}; set it, or unset that")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise InputError(
                f"{' and '.join(missing)}: not set, but WORLD_SIZE is {size}; "
                "set them to the first node's address and a free port there, on all nodes alike"
            )
        kubernetes = " (Kubernetes sets it for a service named `master`)"
        why = kubernetes if "://" in environment["MASTER_PORT"] else ""
        _number("MASTER_PORT", environment, least=1, most=2**16 - 1, why=why)
    for name in ("RANK", "LOCAL_RANK"):
        _number(name, environment, 0, most=size - 1, why=f" (WORLD_SIZE is {size})")
    _number("LOCAL_WORLD_SIZE", environment, size, least=1)
    restarts_left(environment)


def _choose_interface(environment) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would tell other nodes a loopback address.

    gloo takes the address that the host's own name means, and on Debian and Ubuntu /etc/hosts says 127.0.1.1. GPU runs
    use gloo too, for votes.
    """
    size, local = _number("WORLD_SIZE", environment, 1), _number("LOCAL_WORLD_SIZE", environment, 0)
    one_machine = size in (1, local) or _is_here(environment["MASTER_ADDR"])
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


def _is_here(host: str) -> bool:
    return host.startswith(("127.", "localhost"))


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
    """Slurm's run-length list written out: ``2(x3),1`` is [2, 2, 2, 1]; InputError if it is none."""
    runs = [re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", run) for run in counts.split(",")]
    if None in runs:
        raise InputError(f"environment variable SLURM_STEP_TASKS_PER_NODE: {quoted(counts)} is no list of Slurm's")
    return [int(run[1]) for run in runs for _ in range(int(run[2] or 1))]
