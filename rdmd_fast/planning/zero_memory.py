"""Bytes that a rank holds in parameters, gradients, optimizer and EMA at each ZeRO stage.

The rules are those of DeepSpeed 0.19 as tests/planning/test_dry_run.py measures them, w bytes a weight and N ranks:

    parameters   w each; at stage 3 a shard of 1/N, and beside it what is gathered at one time
    masters      4 each where weights have 16 bits, and in fp32 too from stage 1 on, where they are a copy; 1/N from 1
    moments      8 each, 1/N from stage 1
    gradients    w each at stage 0; 1/N from stage 1, in the accumulation dtype. G's are gone before the fake score's
                 come, but at stage 3 each engine keeps its buffer
    buckets      w times ``reduce_bucket_size``: allocated by a backward pass at stages 1 and 2, for good
                 and by every engine at stage 3
    EMA          4 each, as the masters are sharded
    update       what the optimizer's step needs for a moment, when activations are gone: gradients flat, and in fp32

The frozen teacher is a plain copy below stage 3 and sharded there. With adapters it is the one base of all networks,
whose own parameters are the adapters alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rdmd_fast.engine.options import LARGEST_BUCKET
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks

PARTS = ("parameters", "gradients", "buckets", "optimizer", "EMA", "update")
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER, MOMENTS = 4, 8


@dataclass
class ModelStates:
    """Bytes by part (``PARTS``) on the device, and of those that offloading puts into host memory.

    ``gathered`` is the share of ``device["parameters"]`` that ZeRO-3 gathers and lets go again: an upper bound.
    """

    device: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    host: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    gathered: int = 0


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed section decides over bytes; DeepSpeed's defaults."""

    stage: int
    bucket: int | None  # elements; None: fits the network
    buffers: int
    accumulation_bytes: int | None
    persistence: int
    prefetch: int
    reuse_distance: int
    offload_optimizer: bool
    offload_parameters: bool
    reduces_to_owners: bool

    @classmethod
    def of(cls, section: dict, stage: int | None = None) -> ZeroSettings:
        """Of a whole DeepSpeed section, as if it said ``stage`` (None: what it says)."""
        zero = section.get("zero_optimization", {})
        stage = zero.get("stage", 0) if stage is None else stage

        def number(name: str, default: float | None) -> int | None:
            value = zero.get(name, zero.get(f"stage3_{name}", default))
            return None if value is None else int(value)

        def offloads(name: str) -> bool:
            return ((zero.get(name) or {}).get("device") or "none") != "none"

        dtype = section.get("data_types", {}).get("grad_accum_dtype")
        buffers = 2 if zero.get("overlap_comm") and stage in (1, 2) else 1
        return cls(
            stage=stage,
            bucket=number("reduce_bucket_size", None),
            buffers=buffers if zero.get("contiguous_gradients", True) else 0,
            accumulation_bytes=WEIGHT_BYTES.get(dtype),
            persistence=number("param_persistence_threshold", 1e5),
            prefetch=number("prefetch_bucket_size", 5e7),
            reuse_distance=number("max_reuse_distance", 1e9),
            offload_optimizer=stage > 0 and offloads("offload_optimizer"),
            offload_parameters=stage == 3 and offloads("offload_param"),
            reduces_to_owners=not zero.get("use_multi_rank_bucket_allreduce", True),
        )


def shard_size(network: PlannedNetwork, stage: int, ranks: int) -> int:
    """Elements of a network's parameters, or masters, that a rank holds where they are sharded, padding included."""
    if stage == 3:  # parameter by parameter
        return sum(-(-size // ranks) for size in network.sizes)
    return -(-network.parameters // (2 * ranks)) * 2  # one flat tensor, aligned


def model_states(
    networks: PlannedNetworks, settings: ZeroSettings, ranks: int, dtype: str, accumulation: int
) -> ModelStates:
    """What one of ``ranks`` holds; ``accumulation`` micro-batches make an update."""
    weight, stage = WEIGHT_BYTES[dtype], settings.stage
    states = ModelStates()
    device, host = states.device, states.host
    optimizer = host if settings.offload_optimizer else device
    trained = list(networks.trained.values())
    gradients = [_gradients(network, settings, ranks, weight, accumulation) for network in trained]
    for network in trained:
        optimizer["optimizer"] += _optimizer(network, settings, ranks, weight)
        if stage in (1, 2):
            device["parameters"] += weight * shard_size(network, stage, ranks) * ranks
            if settings.offload_optimizer:  # the shard's new weights on their way back
                host["optimizer"] += weight * shard_size(network, stage, ranks)
    if stage == 0:
        device["parameters"] = sum(weight * network.parameters for network in trained)
    if networks.frozen and stage < 3:
        device["parameters"] += weight * networks.frozen.parameters
    if stage == 3:
        shards = sum(weight * shard_size(network, 3, ranks) for network in networks.named().values())
        (host if settings.offload_parameters else device)["parameters"] += shards
        states.gathered = weight * _gathered(networks, settings)
        device["parameters"] += states.gathered
    # Engines take turns, but for what is kept from one turn to the next.
    optimizer["gradients"] += sum(kept for kept, _ in gradients)
    device["gradients"] += max(passing for _, passing in gradients)
    averaged = networks.trained[networks.averaged]
    optimizer["EMA"] = 4 * (averaged.parameters if stage == 0 else shard_size(averaged, stage, ranks))
    if stage and not _accumulates_apart(settings, weight):
        buckets = [
            min(LARGEST_BUCKET, network.parameters) if settings.bucket is None else settings.bucket
            for network in trained
        ]
        device["buckets"] = settings.buffers * weight * (sum(buckets) if stage == 3 else max(buckets))
    optimizer["update"] = max(_update(network, settings, ranks, weight) for network in trained)
    return states


def _accumulates_apart(settings: ZeroSettings, weight: int) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which keeps whole fp32 gradients and no bucket."""
    apart = settings.accumulation_bytes == 4 and weight == 2
    return settings.stage == 1 and apart and not settings.offload_optimizer


def _optimizer(network: PlannedNetwork, settings: ZeroSettings, ranks: int, weight: int) -> int:
    if settings.stage == 0:
        masters = MASTER if weight < 4 else 0
        return (masters + MOMENTS) * network.parameters + 4 * len(network.sizes)  # with a step count each
    return (MASTER + MOMENTS) * shard_size(network, settings.stage, ranks) + 4


def _gradients(
    network: PlannedNetwork, settings: ZeroSettings, ranks: int, weight: int, accumulation: int
) -> tuple[int, int]:
    """(bytes kept from one update to the next, bytes between a backward pass and its update)."""
    whole = weight * network.parameters
    if settings.stage == 0:
        return 0, whole
    shard = shard_size(network, settings.stage, ranks)
    own = shard * (settings.accumulation_bytes or weight)
    if _accumulates_apart(settings, weight):
        return 4 * shard * ranks, whole
    staged = 4 * shard if settings.offload_optimizer else 0  # fp32, in host memory
    if settings.stage == 3:
        return own + staged, 0
    waiting = settings.stage == 1 and accumulation > 1  # for the last micro-batch, which reduces them
    return staged, (whole if waiting or not settings.buffers else 0) + (0 if settings.offload_optimizer else own)


def _update(network: PlannedNetwork, settings: ZeroSettings, ranks: int, weight: int) -> int:
    if settings.stage == 0:
        return 0 if weight == 4 else 4 * network.parameters
    if settings.offload_optimizer:
        return 0  # in host memory
    if _accumulates_apart(settings, weight):
        return weight * network.parameters
    # One flat tensor of them, and that in fp32 (a copy in fp32 too).
    return (weight + 4) * shard_size(network, settings.stage, ranks)


def _gathered(networks: PlannedNetworks, settings: ZeroSettings) -> int:
    """Elements of parameters that are whole on a rank at ZeRO-3's worst moment.

    G's stay from its forward to its backward pass where ``max_reuse_distance`` spans them, with the scores' networks
    between; a network that runs forward alone is gathered ahead by up to ``prefetch_bucket_size``. Small parameters
    (``param_persistence_threshold``) stay.
    """

    def persistent(network: PlannedNetwork | None) -> int:
        return sum(size for size in network.all_sizes if size <= settings.persistence) if network else 0

    def ahead(network: PlannedNetwork | None) -> int:
        if network is None:
            return 0
        window = settings.prefetch + max(network.all_sizes)
        return max(persistent(network), min(sum(network.all_sizes), window))

    def at_once(network: PlannedNetwork | None) -> int:
        spanned = network is not None and settings.reuse_distance >= sum(network.all_sizes)
        return sum(network.all_sizes) if spanned else ahead(network)

    main = networks.trained[networks.averaged]
    if main.base:  # all gather the same
        return at_once(main) + sum(
            network.parameters for role, network in networks.trained.items() if role != networks.averaged
        )
    others = [networks.frozen, networks.trained.get("fake_score")]
    resting = sum(persistent(network) for network in others)
    while_scoring = max((ahead(network) - persistent(network) for network in others), default=0)
    training_fake = persistent(main) + persistent(networks.frozen) + at_once(networks.trained.get("fake_score"))
    return max(at_once(main) + resting + while_scoring, training_fake)
