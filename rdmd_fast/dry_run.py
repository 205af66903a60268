"""``--dry-run``: the resolved configuration, parameters, memory by ZeRO stage and samples per step; trains nothing."""

from __future__ import annotations

import math
import os

from .config import Config, dump_config
from .data.shards import ShardSet
from .data.stream import channels_first
from .data.toys import ToyDistribution
from .distributed import BatchLayout, World, zero_stage
from .networks import build_network
from .runtime import EXIT_DONE


def dry_run(config: Config) -> int:
    import torch

    world = World(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))
    layout = BatchLayout.of(config.train, world)
    print(dump_config(config))
    counts = parameter_counts(config)
    for name, count in counts.items():
        print(f"{name:<12} {count / 1e6:10.3f} M parameters")
    print(
        f"batch        {layout.global_batch} samples a step = {world.size} ranks × {layout.accumulation} "
        f"accumulated × {layout.micro_batch}"
    )
    print("model states by rank, MiB (weights, gradients, Adam, fp32 masters, EMA; activations come on top):")
    for stage in range(4):
        mark = "  <- configured" if stage == zero_stage(config.deepspeed) else ""
        size = model_state_bytes(counts, stage, world.size, config.train.dtype)
        print(f"  ZeRO {stage}: {size / 2**20:10.1f}{mark}")
    return EXIT_DONE


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of each network that the run holds, by name."""
    import torch

    from .experiment import count_parameters
    from .networks.teachers import read_teacher_config

    domain = config.data.target if config.stage == "teacher" else config.data.source
    shape = (2,)
    if not isinstance(domain, ToyDistribution):
        shape = channels_first(ShardSet(domain, cache_dir=config.data.cache_dir))
    options = config.network
    if config.teacher not in (None, "analytic"):
        options = read_teacher_config(config.teacher).network

    def count(options) -> int:
        with torch.device("meta"):  # counted, not made: what is asked for may be larger than this machine
            return count_parameters(build_network(options, shape))

    size = count(options) if options else 0
    if config.stage == "teacher":
        return {"teacher": size}
    generator = size if config.generator.kind == "teacher" else count(config.generator)
    fake = size if config.rdmd.fake_score == "learned" else 0
    return {
        "generator": generator,
        "fake_score": fake,
        "teacher": 0 if config.teacher == "analytic" else size,
    }


def model_state_bytes(counts: dict[str, int], stage: int, ranks: int, dtype: str) -> float:
    """Bytes a rank holds besides activations (ZeRO, arXiv 1910.02054, Section 3; masters where weights have 16 bits).

    The frozen teacher of the rdmd stage is replicated below stage 3; G's (or the trained teacher's) EMA is as large
    as the masters' shard.
    """
    weight = 4 if dtype == "fp32" else 2
    trained = {name: count for name, count in counts.items() if name != "teacher" or len(counts) == 1}
    averaged = counts.get("generator", counts.get("teacher", 0))
    parameters = sum(trained.values())
    share = {
        part: 1 / ranks if stage >= first else 1.0
        for part, first in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    masters = 4 if dtype != "fp32" or stage > 0 else 0
    total = parameters * (weight * share["weights"] + weight * share["gradients"] + (8 + masters) * share["optimizer"])
    total += averaged * 4 * share["optimizer"]
    if len(counts) > 1:
        total += counts["teacher"] * weight * share["weights"]
    return math.ceil(total)
