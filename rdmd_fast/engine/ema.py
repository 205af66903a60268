"""Exponential moving average of an engine's fp32 masters, on each rank's own shard."""

import torch
from pydantic import Field

from rdmd_fast.engine.fp32_masters import gather_parameters, master_shards
from rdmd_fast.kernels.ema_update import ema_update
from rdmd_fast.options import Options


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
