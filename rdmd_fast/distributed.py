"""Processes, and DeepSpeed engines for the three networks."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError

from .errors import InputError
from .guard import GuardOptions, UpdateGuard
from .host_memory import keep_freed_memory
from .launchers import adopt_launcher, cores_of_rank
from .master_adam import MasterAdam
from .masters import master_shards, pieces, whole_masters
from .options import Options
from .runtime import write_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# DeepSpeed's defaults, but for a hysteresis of 1: its ZeRO 0 has none, and all stages shall do the same.
LOSS_SCALING = {
    "enabled": True,
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 1,
}
# DeepSpeed's floor is a whole number, but losses here are sums over a sample: large images may need a scale below 1.
LOSS_SCALE_FLOOR = 2.0**-16


class OptimizerOptions(Options):
    """Adam for one engine."""

    lr: float = Field(
        1e-4,
        gt=0,
        le=100,
        description="learning rate (ours; EDM trains at 2e-4 to 1e-3, DMD2 distils at 2e-6 to 5e-5)",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Adam's moments (EDM)"
    )
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon (EDM)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; 0 is plain Adam (EDM)")
    grad_clip: float = Field(
        0.0,
        ge=0,
        description="global gradient norm is cut to this, 0 for never; it grows with the sample's size (ours)",
    )
    warmup: int = Field(0, ge=0, description="updates over which the learning rate rises from 0 (ours)")
    decay: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="course of the learning rate to 0 at train.steps (EDM: constant)"
    )


class TrainOptions(Options):
    """Length, batch and precision."""

    steps: int = Field(10_000, ge=0, description="iterations: generator updates (rdmd) or teacher updates (ours)")
    global_batch_size: int = Field(
        64, ge=1, le=2**24, description="samples an update averages over, all ranks together (ours)"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples a rank holds at once; unset: global_batch_size / ranks (ours)"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="dtype of weights and activations; masters are fp32. fp16, with dynamic loss scaling, is for GPUs "
        "without bf16 (ours)",
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute activations inside blocks again in the backward pass instead of keeping them: about a "
        "third more FLOPs, far less memory, the same result up to rounding (ours)",
    )
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = Field(
        None,
        description="torch.compile of the networks, its mode; reduce-overhead and max-autotune replay passes as CUDA "
        "graphs on a GPU; null runs them as written. Below ZeRO 3 (ours)",
    )
    guard: GuardOptions = Field(default_factory=GuardOptions)
    collective_timeout: float = Field(
        1800.0,
        gt=0,
        description="seconds that a rank waits for the others before the job ends; must exceed what the main rank does "
        "alone, such as validation and pictures (ours)",
    )


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


def together(world: World, action: Callable[[], object], what: str | None = None):
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
    """``together`` of an action for the main rank; returns its value, which must be plain, on every rank."""
    return world.broadcast(together(world, action if world.is_main else lambda: None, what))


def join_world(timeout: float = 1800.0) -> World:
    """Join the processes that `deepspeed`, `torchrun`, `srun` or `mpirun` started; alone under plain `python`.

    Args:
        timeout: seconds that a collective waits for other ranks.

    Raises:
        InputError: there are other ranks, but not where they meet.
    """
    adopt_launcher()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a search and a warning
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks on one machine share its cores; without this each would start a thread for every core.
            torch.set_num_threads(cores_of_rank())
        # DeepSpeed would compile a shared-memory collective at the first start, a minute long; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        # Until the process ends: DeepSpeed keeps groups that do not outlive a destroyed world.
        atexit.register(leave_world)
        backend = "nccl" if on_gpu else "gloo"
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        else:
            # Alone there is nobody to meet: no port is opened.
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.redirect_stdout(None):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    alone = dist.get_world_size() == 1
    host_group = None if alone or not on_gpu else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return World(dist.get_rank(), dist.get_world_size(), device, host_group)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch, the positions first .. first + global_batch - 1, falls on ranks and micro-batches."""

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @classmethod
    def of(cls, options: TrainOptions, world: World) -> BatchLayout:
        total, ranks = options.global_batch_size, world.size
        if total % ranks:
            raise InputError(
                f"train.global_batch_size {total} does not divide by {ranks} ranks: choose a multiple of {ranks}"
            )
        micro = options.micro_batch_size or total // ranks
        if (total // ranks) % micro:
            raise InputError(
                f"train.micro_batch_size {micro} does not divide the {total // ranks} samples a rank has "
                f"(train.global_batch_size {total} over {ranks} ranks)"
            )
        return cls(total, micro, total // ranks // micro, world.rank, ranks)

    def positions(self, first: int, micro: int) -> torch.Tensor:
        """Positions of this rank's micro-batch number ``micro`` in the global batch that starts at ``first``: int64."""
        start = first + (micro * self.world_size + self.rank) * self.micro_batch
        return torch.arange(start, start + self.micro_batch, dtype=torch.int64)


# DeepSpeed allocates its bucket whole, 5e8 elements unless told: more than most networks here and all their optimizers.
LARGEST_BUCKET = 50_000_000


def reduce_bucket_size(deepspeed_section: dict, parameters: int) -> int:
    """Elements of the buffer in which an engine of so many parameters reduces gradients at ZeRO 1 to 3."""
    zero = deepspeed_section.get("zero_optimization", {})
    return zero.get("reduce_bucket_size", min(LARGEST_BUCKET, parameters))


def zero_stage(deepspeed_section: dict) -> int:
    return deepspeed_section.get("zero_optimization", {}).get("stage", 0)


def _deepspeed_config(section: dict, layout: BatchLayout, dtype: str) -> dict:
    """Gradients are clipped by ``engine.guard``, and it is the one that looks for what is not finite."""
    return {
        "steps_per_print": None,
        # DeepSpeed's clock waits for the device at every forward pass and step; telemetry has its own, which does not.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **section,
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": 0.0,  # the default is 1
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": False},
        "fp16": LOSS_SCALING if dtype == "fp16" else {"enabled": False},
    }


def initialize_engine(
    network: torch.nn.Module,
    optimizer: OptimizerOptions,
    layout: BatchLayout,
    train: TrainOptions,
    section: dict,
):
    """A DeepSpeed engine that trains ``network`` (consumed: its parameters may be sharded in place).

    Raises:
        InputError: this device or network cannot do what ``train`` asks for, or DeepSpeed refuses ``section``.
    """
    _check_dtype(train.dtype)
    if train.activation_checkpointing:
        if not hasattr(network, "checkpointing"):
            raise InputError(f"train.activation_checkpointing: {type(network).__name__} cannot do it, remove the key")
        network.checkpointing = True
    _compile(network, train)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    config = _deepspeed_config(section, layout, train.dtype)
    config["zero_optimization"] = {
        **config.get("zero_optimization", {}),
        "reduce_bucket_size": reduce_bucket_size(section, sum(parameter.numel() for parameter in parameters)),
    }
    adam_of, exact = partial(_fused_adam, optimizer), {}
    if _has_master_adam(train, section):
        master_adam = MasterAdam(parameters, adam_of)
        adam, given = master_adam.optimizer, lambda _: master_adam
        # To DeepSpeed these are weights and a gradient of some dtype, and an optimizer.
        config = {"communication_data_type": "bf16", **config, "bf16": {"enabled": False}}
    else:
        adam = given = adam_of(parameters)
        if train.dtype != "fp32":
            exact = {name: parameter.detach().cpu().flatten() for name, parameter in network.named_parameters()}
    engine = _initialize(model=network, optimizer=given, model_parameters=parameters, config=config)
    _clear_padding(engine)
    if layout.world_size == 1 and not zero_stage(section):
        engine.enable_backward_allreduce = False  # it would flatten all gradients, send them to nobody, copy them back
    if train.dtype == "fp16":
        if hasattr(engine.optimizer, "fp32_groups"):
            _undo_empty_step(engine.optimizer)
        _lower_loss_scale_floor(engine.optimizer)
    _restore_masters(engine, exact)
    for _, master in whole_masters(engine):
        dist.broadcast(master.detach(), 0)  # each rank steps its own: they must begin alike to the bit
    engine.guard = UpdateGuard(train.guard, engine, adam, engine.device, optimizer.grad_clip)
    _bound_waiting(train.collective_timeout)
    return engine


def _compile(network: torch.nn.Module, train: TrainOptions) -> None:
    """In place: names of parameters and modules stay. Not at ZeRO 3, see ``config``."""
    if train.compile is not None:
        network.compile(mode=train.compile)


def _fused_adam(options: OptimizerOptions, parameters: list[torch.Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(
        parameters,
        lr=options.lr,
        betas=tuple(options.betas),
        eps=options.eps,
        weight_decay=options.weight_decay,
        decoupled_weight_decay=True,
        fused=True,
    )


def _has_master_adam(train: TrainOptions, section: dict) -> bool:
    """Whether the masters are ours: in bf16 without ZeRO."""
    return train.dtype == "bf16" and not zero_stage(section)


@torch.no_grad()
def _restore_masters(engine, exact: dict[str, torch.Tensor]) -> None:
    """DeepSpeed casts weights before it copies its masters from them; ``exact`` has what they were, flat, by name."""
    if exact:
        shards = master_shards(engine)
        for piece in pieces(engine):
            piece.of(shards).copy_(exact[piece.name][piece.start : piece.stop])


def _initialize(**arguments):
    """``deepspeed.initialize``; what it refuses of the section is an InputError."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return deepspeed.initialize(**arguments, dist_init_required=False)[0]
    except (ValidationError, DeepSpeedConfigError, NotImplementedError, AssertionError) as error:
        raise InputError(f"deepspeed: {_first_line(error)}") from None


def _bound_waiting(seconds: float) -> None:
    """DeepSpeed makes groups of its own, with torch's default timeouts."""
    c10d = dist.distributed_c10d
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _undo_empty_step(optimizer) -> None:
    """In fp16 at ZeRO 0 DeepSpeed has stepped on zero gradients: bias correction and decay would count it."""
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()


def _lower_loss_scale_floor(optimizer) -> None:
    if hasattr(optimizer, "loss_scale_config"):  # ZeRO 0
        optimizer.loss_scale_config.min_loss_scale = LOSS_SCALE_FLOOR
    else:
        optimizer.loss_scaler.min_scale = LOSS_SCALE_FLOOR


def _check_dtype(dtype: str) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if dtype == "fp16" and not accelerator.is_fp16_supported():
        raise InputError("train.dtype: fp16 is not supported on this device, use bf16 or fp32")
    if dtype == "bf16" and not accelerator.is_bf16_supported():
        raise InputError("train.dtype: bf16 is not supported on this device, use fp16 or fp32")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}"
    return " ".join(str(error).split())


@torch.no_grad()
def _clear_padding(engine) -> None:
    """Zero what fills ZeRO-3's last partitions up: DeepSpeed leaves it unset, and the guard looks at whole shards."""
    flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or []
    for flat, group in zip(flats, getattr(engine.optimizer, "fp16_groups", []), strict=False):
        end = 0
        for parameter in group:
            size = parameter.ds_tensor.ds_numel
            valid = min(max(parameter.ds_numel - dist.get_rank() * size, 0), size)
            flat[end + valid : end + size].zero_()
            end += size


def freeze(network: torch.nn.Module, layout: BatchLayout, train: TrainOptions, section: dict, device: torch.device):
    """The frozen teacher: sharded by an engine without optimizer at ZeRO-3, replicated as a plain module below."""
    network.requires_grad_(False).eval()
    if zero_stage(section) < 3:
        _compile(network, train)
        # Weights in the layout of activations are not copied at every call. Engines want theirs contiguous.
        return network.to(device=device, dtype=DTYPES[train.dtype], memory_format=torch.channels_last)
    zero = {key: value for key, value in section["zero_optimization"].items() if key != "offload_optimizer"}
    config = _deepspeed_config({**section, "zero_optimization": zero}, layout, train.dtype)
    return _initialize(model=network, config=config)


def set_learning_rate(engine, options: OptimizerOptions, update: int, total: int) -> float:
    """Learning rate of update number ``update``: a function of it alone, so that resuming needs no state."""
    rate = options.lr * min(1.0, (update + 1) / options.warmup) if options.warmup else options.lr
    remaining = max(0.0, 1 - update / total) if total else 1.0
    if options.decay == "linear":
        rate *= remaining
    elif options.decay == "cosine":
        rate *= 0.5 - 0.5 * math.cos(math.pi * remaining)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    return rate


def loss_scale(engine) -> float:
    """The factor of fp16's gradients at this update; 1 for other dtypes. No synchronisation."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def take_step(engine, name: str) -> None:
    """``engine.step()``. An update whose loss or gradient is not finite is skipped, in fp16 the loss scale halved too.

    DeepSpeed doubles the scale again before it divides by it: one update in 1,000 takes half its gradient.

    Raises:
        InputError: gradients overflow at any loss scale, on every rank alike.
    """
    last_of_update = engine.is_gradient_accumulation_boundary()
    if last_of_update:
        engine.guard.before_step()
    engine.step()
    if last_of_update:
        engine.guard.after_step()
    if engine.fp16_enabled() and engine.optimizer.overflow and loss_scale(engine) <= LOSS_SCALE_FLOOR:
        raise InputError(
            f"train.dtype: gradients of {name} overflow fp16 at every loss scale: lower its lr, or use bf16 or fp32"
        )


def loss_scaling_metrics(engines: dict[str, object]) -> dict[str, float]:
    """For metrics.jsonl: loss scale of each fp16 engine; nothing for other dtypes."""
    return {f"loss_scale/{name}": loss_scale(engine) for name, engine in engines.items() if engine.fp16_enabled()}
