"""Where DeepSpeed keeps an engine's fp32 parameters, the masters: on which rank, in which shard, at which place.

Frozen parameters have none: they are no part of a checkpoint or an EMA.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def master_shards(engine) -> list[torch.Tensor]:
    """This rank's share of the fp32 parameters: flat shards under ZeRO, the parameters themselves at stage 0."""
    return [master.detach() for master in master_parameters(engine)]


def master_parameters(engine) -> list[torch.Tensor]:
    """``master_shards`` as the optimizer knows them: the keys of its state."""
    for name in (
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # bf16 with fp32 gradient accumulation
    ):
        shards = getattr(engine.optimizer, name, None)
        if shards:
            return list(shards)
    whole = whole_masters(engine)
    if whole:
        return [master for _, master in whole]
    return list(trained_parameters(engine.module).values())


def whole_masters(engine) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter, its fp32 master) at ZeRO 0 in bf16 and fp16, where masters are neither flat nor sharded."""
    optimizer = engine.optimizer
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return [(p, master) for group, masters in groups for p, master in zip(group, masters, strict=True)]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened parameter ``name``, at ``offset`` of the rank's flat shard ``shard``."""

    name: str
    start: int
    stop: int
    shard: int
    offset: int

    def of(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """This piece of flat shards: a view, 1-D."""
        return shards[self.shard].view(-1)[self.offset : self.offset + self.stop - self.start]

    def key(self, kind: str) -> str:
        return f"{kind}/{self.name}[{self.start}:{self.stop}]"


def shard_pieces(engine) -> list[Piece]:
    """What this rank's shards hold, in the order of ``master_parameters``; padding is in none."""
    trained = trained_parameters(engine.module)
    names = {id(parameter): name for name, parameter in trained.items()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_partitioned(optimizer, names))
    whole = [parameter for parameter, _ in whole_masters(engine)]
    if not whole and not engine.zero_optimization():
        whole = list(trained.values())
    if whole:
        return [Piece(names[id(p)], 0, p.numel(), index, 0) for index, p in enumerate(whole)]
    linked = [p for p in trained.values() if getattr(p, "_hp_mapping", None) is not None]
    return [_linked(names[id(p)], p._hp_mapping) for p in linked]


def _partitioned(optimizer, names: dict[int, str]) -> Iterator[Piece]:
    """ZeRO 3: each parameter is cut into equal parts, one a rank, the last ones padded."""
    for shard, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.ds_tensor.ds_numel
            start = min(dist.get_rank() * size, parameter.ds_numel)
            stop = min(start + size, parameter.ds_numel)
            if stop > start:
                yield Piece(names[id(parameter)], start, stop, shard, offset)
            offset += size


def _linked(name: str, mapping) -> Piece:
    """ZeRO 1 and 2: the flattened group of parameters is cut into equal parts, one a rank."""
    source, shard = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(name, source.start, source.start + source.numel, mapping.param_group_index, shard.start)


def parameter_shapes(engine) -> dict[str, list[int]]:
    """Shape of each trained parameter, whole."""
    trained = trained_parameters(engine.module)
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained.items()}


def persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dict, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


@torch.no_grad()
def gather_parameters(engine, shards: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The whole fp32 state dict, but for what is frozen, on the CPU of every rank; a collective call.

    Args:
        shards: values to gather in place of the engine's own masters (an EMA), shaped as ``master_shards``.
    """
    shards = master_shards(engine) if shards is None else shards
    own: dict[str, list[Piece]] = defaultdict(list)
    for piece in shard_pieces(engine):
        own[piece.name].append(piece)
    whole = {}
    for name, shape in parameter_shapes(engine).items():
        flat = torch.zeros(math.prod(shape), device=engine.device)
        for piece in own[name]:
            flat[piece.start : piece.stop] = piece.of(shards)
        if engine.zero_optimization():
            dist.all_reduce(flat)
        whole[name] = flat.view(shape).cpu()
    return whole | {name: buffer.float().cpu().clone() for name, buffer in persistent_buffers(engine.module).items()}
