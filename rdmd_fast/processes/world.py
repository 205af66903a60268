"""This rank among its peers: votes, sums, and actions that stop all ranks or none."""

import atexit
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rdmd_fast.errors import InputError, quoted, write_error
from rdmd_fast.processes.host_memory import keep_freed_memory
from rdmd_fast.processes.launchers import adopt_launcher, check_port_is_free, cores_of_rank, local_rank, place


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Hosts agree over ``host_group`` (gloo): a vote by way of the GPU would wait for all the work queued there.
    """

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: every decision that changes what a rank does next goes through here."""
        if self.size == 1:
            return flag
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(vote.item())

    def broadcast(self, value):
        """Rank 0's plain value (strings, numbers, None) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather(self, value) -> list:
        """Every rank's plain value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values


def on_all_ranks(world: World, action: Callable[[], object], what: str | None = None):
    """Run ``action`` on every rank and return this rank's value; what stops one rank stops all, so that none waits.

    Collective calls inside ``action`` must come before anything that can fail on some ranks alone.

    Args:
        what: names what ``action`` writes; without it the file's name does.

    Raises:
        InputError: as ``action`` raised it on the first rank where it did.
        WriteError: a rank could not write a file.
    """
    value = problem = None
    try:
        value = action()
    except InputError as error:
        problem = error
    except Exception as error:
        problem = write_error(error, what)
        if problem is None:
            raise
    problem = next((other for other in world.gather(problem) if other is not None), None)
    if problem is not None:
        raise problem from None
    return value


def on_main(world: World, action: Callable[[], object], what: str | None = None):
    """``on_all_ranks`` of an action for the main rank; returns its value, which must be plain, on every rank."""
    return world.broadcast(on_all_ranks(world, action if world.is_main else lambda: None, what))


def join_world(timeout: float = 1800.0) -> World:
    """Join the processes that `deepspeed`, `torchrun`, `srun` or `mpirun` started; alone under plain `python`.

    Args:
        timeout: seconds that a collective waits for other ranks.

    Raises:
        InputError: a variable of the launcher's or of DeepSpeed's is wrong, or the port to meet at is not free.
    """
    adopt_launcher()
    level = _log_level()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a search and a warning
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(level)
    if on_gpu:
        torch.cuda.set_device(_gpu_of_rank())
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks on one machine share its cores; without this each would start a thread for every core.
            torch.set_num_threads(cores_of_rank())
        # DeepSpeed would compile a shared-memory collective at the first start, a minute long; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        # Until the process ends: DeepSpeed keeps groups that do not outlive a destroyed world.
        atexit.register(leave_world)
        backend = "nccl" if on_gpu else "gloo"
        if place()[1] > 1:
            check_port_is_free()
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        else:
            # Alone there is nobody to meet: no port is opened.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    alone = dist.get_world_size() == 1
    if alone:  # DeepSpeed wants them
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=str(local_rank()))
    with contextlib.redirect_stdout(None):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    host_group = None if alone or not on_gpu else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return World(dist.get_rank(), dist.get_world_size(), device, host_group)


def _log_level() -> str:
    """What DS_LOG_LEVEL names, of Python's levels."""
    level, known = os.environ.get("DS_LOG_LEVEL", "warning"), ("debug", "info", "warning", "error", "critical")
    if level.lower() not in known:
        raise InputError(f"environment variable DS_LOG_LEVEL: {quoted(level)} is none of {', '.join(known)}")
    return level.upper()


def _gpu_of_rank() -> int:
    """This rank's, by its number on the machine; InputError where there are fewer."""
    rank, there = local_rank(), torch.cuda.device_count()
    if rank >= there:
        raise InputError(
            f"environment variable LOCAL_RANK: {rank}, but this machine shows {there} GPUs: start as many ranks on it"
        )
    return rank


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
