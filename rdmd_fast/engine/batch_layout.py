"""How a global batch falls on ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rdmd_fast.engine.options import TrainOptions
from rdmd_fast.errors import InputError
from rdmd_fast.processes.world import World


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
