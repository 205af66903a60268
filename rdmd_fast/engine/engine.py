"""Processes, and DeepSpeed engines for the three networks."""

import math
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from pydantic import ValidationError

from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.cuda_graphs import replay_passes
from rdmd_fast.engine.fewer_waits import avoid_waits
from rdmd_fast.engine.fp32_masters import master_shards, shard_pieces, trained_parameters, whole_masters
from rdmd_fast.engine.master_adam import MasterAdam
from rdmd_fast.engine.options import DTYPES, OptimizerOptions, TrainOptions, reduce_bucket_size, zero_stage
from rdmd_fast.engine.update_guard import UpdateGuard
from rdmd_fast.errors import InputError
from rdmd_fast.kernels._dispatch import backend, source_digest
from rdmd_fast.options import explain

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
    _check_cuda_graphs(train)
    if train.activation_checkpointing:
        if not hasattr(network, "checkpointing"):
            raise InputError(f"train.activation_checkpointing: {type(network).__name__} cannot do it, remove the key")
        network.checkpointing = True
    _compile(network, train)
    trained = trained_parameters(network)
    parameters = list(trained.values())
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
            exact = {name: parameter.detach().cpu().flatten() for name, parameter in trained.items()}
    for parameter in network.parameters():  # DeepSpeed casts none of a network that is sharded in part already
        parameter.data = parameter.data.to(DTYPES[train.dtype])
    engine = _initialize(model=network, optimizer=given, model_parameters=parameters, config=config)
    _gather_borrowed(engine)
    _clear_padding(engine)
    if layout.world_size == 1 and not zero_stage(section):
        engine.enable_backward_allreduce = False  # it would flatten all gradients, send them to nobody, copy them back
    if train.dtype == "fp16":
        if hasattr(engine.optimizer, "fp32_groups"):
            _undo_empty_step(engine.optimizer)
        _lower_loss_scale_floor(engine.optimizer)
    avoid_waits(engine)
    _restore_masters(engine, exact)
    for _, master in whole_masters(engine):
        dist.broadcast(master.detach(), 0)  # each rank steps its own: they must begin alike to the bit
    engine.guard = UpdateGuard(train.guard, engine, adam, engine.device, optimizer.grad_clip)
    _bound_waiting(train.collective_timeout)
    if train.cuda_graphs:  # at the first call, when weights are where they stay
        replay_passes(engine.module, layout.micro_batch, accumulates=layout.accumulation > 1)
    return engine


def _compile(network: torch.nn.Module, train: TrainOptions) -> None:
    """In place: names of parameters and modules stay. Not at ZeRO 3, see ``config``."""
    if train.compile is not None:
        # Else a graph of an earlier version's backward passes would be taken from PyTorch's cache.
        torch.compiler.config.cache_key_tag = f"rdmd_fast {source_digest()}"
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
        for piece in shard_pieces(engine):
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
        reason = explain(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise InputError(f"deepspeed: {reason}") from None


def _gather_borrowed(engine) -> None:
    """Tell ZeRO-3 of parameters that a module's ``forward`` reads from its submodules, where our kernels run."""
    from deepspeed.runtime.zero import register_external_parameter

    if engine.zero_optimization_stage() < 3 or backend(engine.device) == "reference":
        return
    for module in engine.module.modules():
        for parameter in getattr(module, "borrowed_parameters", list)():
            register_external_parameter(module, parameter)


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


def _check_cuda_graphs(train: TrainOptions) -> None:
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    if train.cuda_graphs and name != "cuda":
        raise InputError(f"train.cuda_graphs: needs an NVIDIA GPU, this run is on {name}: remove the key")


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


def freeze_teacher(
    network: torch.nn.Module, layout: BatchLayout, train: TrainOptions, section: dict, device: torch.device
):
    """The frozen teacher: sharded by an engine without optimizer at ZeRO-3, replicated as a plain module below."""
    network.requires_grad_(False).eval()
    if zero_stage(section) < 3:
        _compile(network, train)
        # Weights in the layout of activations are not copied at every call. Engines want theirs contiguous.
        network.to(device=device, dtype=DTYPES[train.dtype], memory_format=torch.channels_last)
        if train.cuda_graphs:
            replay_passes(network, layout.micro_batch, accumulates=False)
        return network
    zero = {key: value for key, value in section["zero_optimization"].items() if key != "offload_optimizer"}
    config = _deepspeed_config({**section, "zero_optimization": zero}, layout, train.dtype)
    engine = _initialize(model=network, config=config)
    _gather_borrowed(engine)
    return engine


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
