"""The fp32 masters of an engine, on each rank's own shard, and their exponential moving average."""

from __future__ import annotations

import torch
from pydantic import Field

from .kernels.ema_update import ema_update
from .options import Options


def master_shards(engine) -> list[torch.Tensor]:
    """This rank's share of the fp32 parameters: flat shards under ZeRO, the parameters themselves at stage 0."""
    for name in (
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # bf16 with fp32 gradient accumulation
    ):
        shards = getattr(engine.optimizer, name, None)
        if shards:
            return [shard.detach() for shard in shards]
    whole = _whole_masters(engine)
    if whole:
        return [master for _, master in whole]
    return [parameter.detach() for parameter in engine.module.parameters()]


def _whole_masters(engine) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter, its fp32 master) at ZeRO 0 in bf16 and fp16, where masters are neither flat nor sharded."""
    optimizer = engine.optimizer
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return [(p, master.detach()) for group, masters in groups for p, master in zip(group, masters, strict=True)]


@torch.no_grad()
def gather_parameters(engine, shards: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The whole fp32 state dict on the CPU of every rank; a collective call.

    Args:
        shards: values to gather in place of the engine's own masters (an EMA), shaped as ``master_shards``.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    masters = master_shards(engine)
    kept = None
    if shards is not None:
        # DeepSpeed knows how its shards map to parameters: lend them the other values while it reads.
        kept = [master.clone() for master in masters]
        torch._foreach_copy_(masters, [shard.to(master.device) for shard, master in zip(shards, masters, strict=True)])
    whole = {}
    of_parameter = {id(parameter): master for parameter, master in _whole_masters(engine)}
    for name, parameter in engine.module.named_parameters():
        full = of_parameter.get(id(parameter))
        full = safe_get_full_fp32_param(parameter) if full is None else full
        whole[name] = (parameter if full is None else full).detach().float().cpu().clone().contiguous()
    if kept is not None:
        torch._foreach_copy_(masters, kept)
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                whole[f"{prefix}.{name}" if prefix else name] = buffer.detach().float().cpu().clone()
    return whole


class EMAOptions(Options):
    """Exponential moving average of the weights that are exported."""

    half_life: float = Field(
        5_000, gt=0, description="samples after which a weight's share halves (ours; EDM: 500,000)"
    )
    ramp: float = Field(0.05, gt=0, description="the half-life is at most this share of the samples seen (EDM)")


class ShardedEMA:
    """EMA of an engine's fp32 masters on each rank's own shard: no gather, 1/world of the memory under ZeRO."""

    def __init__(self, engine, options: EMAOptions, global_batch: int):
        self.engine, self.options, self.global_batch = engine, options, global_batch
        self.shards = [shard.clone() for shard in master_shards(engine)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after iteration ``step``: decay = 0.5^(batch / half-life), half-life in samples.

        Where the update was skipped the masters are as they were, and count once more.
        """
        seen = (step + 1) * self.global_batch
        half_life = min(self.options.half_life, seen * self.options.ramp)
        decay = 0.5 ** (self.global_batch / half_life)
        ema_update(self.shards, master_shards(self.engine), 1 - decay)

    def gather(self) -> dict[str, torch.Tensor]:
        """The averaged state dict on the CPU of every rank; a collective call."""
        return gather_parameters(self.engine, self.shards)
