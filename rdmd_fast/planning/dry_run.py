"""``--dry-run``: the resolved configuration, and what it will take: memory by ZeRO stage, disk, bytes sent, time."""

import os

import torch

from rdmd_fast.config import Config, dump_config
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.options import zero_stage
from rdmd_fast.errors import EXIT_DONE, InputError
from rdmd_fast.networks.text_options import TextOptions
from rdmd_fast.planning.activations import Activations, activations
from rdmd_fast.planning.communication import iteration_payload
from rdmd_fast.planning.disk import disk_use
from rdmd_fast.planning.planned_networks import PlannedNetworks, planned_networks
from rdmd_fast.planning.timing import WARM_UP, Timing, time_iterations
from rdmd_fast.planning.zero_memory import ModelStates, ZeroSettings, model_states
from rdmd_fast.processes.launchers import place
from rdmd_fast.processes.world import World, join_world

MIB, GIB = 2**20, 2**30
COLUMNS = ("parameters", "gradients", "buckets", "optimizer", "EMA")


def dry_run(config: Config, ranks: int | None = None, iterations: int = 0, gpu_memory: float | None = None) -> int:
    """Print it all on the main rank; trains nothing.

    Args:
        ranks: predict for so many; None for the processes that a launcher started.
        iterations: time so many of them on the processes there are, 0 for none.
        gpu_memory: of a GPU, GiB; None for that of this machine's, if it has one.

    Raises:
        InputError: the configuration does not work, or does not divide over ``ranks``, or takes more than a GPU has.
    """
    if iterations < 0 or (ranks is not None and ranks < 1) or (gpu_memory is not None and not gpu_memory > 0):
        raise InputError("--ranks, --time-iterations and --gpu-memory: must be positive")
    rank, started = place()
    ranks = ranks or started
    layout = BatchLayout.of(config.train, World(0, ranks, torch.device("cpu")))
    networks = planned_networks(config)
    used = activations_of(config, networks, layout)
    lines = [dump_config(config), *network_lines(networks, layout), "", *memory_lines(config, networks, layout, used)]
    lines += ["", *disk_lines(config, networks)]
    if rank == 0:
        print("\n".join(lines), flush=True)
    _check_fits(config, networks, layout, used, gpu_memory)
    if iterations:
        world = join_world(config.train.collective_timeout)
        timing = time_iterations(config, world, iterations)
        if world.is_main:
            print("\n".join(["", *timing_lines(config, networks, world, timing)]), flush=True)
    return EXIT_DONE


def _check_fits(
    config: Config, networks: PlannedNetworks, layout: BatchLayout, used: Activations, gpu_memory: float | None
) -> None:
    """InputError where the configured stage takes more than ``gpu_memory``, GiB, or this machine's GPU."""
    if gpu_memory is None:
        if not torch.cuda.is_available():
            return
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GIB
    needed = _predicted(config, networks, layout, used) / GIB
    if needed <= gpu_memory:
        return
    ways = ["train.activation_checkpointing=true"] * (not config.train.activation_checkpointing)
    ways += ["a lower train.micro_batch_size"] * (layout.micro_batch > 1)
    if any(isinstance(network.options, TextOptions) for network in networks.trained.values()) and not config.lora:
        ways.insert(0, "lora")
    ways += ["more GPUs at a higher ZeRO stage, or offloading (docs/clusters.md)"]
    raise InputError(f"memory: {needed:.1f} GiB are needed and a GPU has {gpu_memory:.1f}: use {', '.join(ways)}")


def network_lines(networks: PlannedNetworks, layout: BatchLayout) -> list[str]:
    lines = [f"{name:<12} {network.parameters / 1e6:10.3f} M parameters" for name, network in networks.named().items()]
    return [
        *lines,
        f"batch        {layout.global_batch} samples a step = {layout.world_size} ranks × {layout.accumulation} "
        f"accumulated × {layout.micro_batch}",
    ]


def memory_lines(config: Config, networks: PlannedNetworks, layout: BatchLayout, used: Activations) -> list[str]:
    """The table of memory and bytes sent by ZeRO stage."""
    ranks, dtype = layout.world_size, config.train.dtype
    heading = "".join(f"{name:>12}" for name in (*COLUMNS, "activations", "total", "sent"))
    lines = [
        f"memory of a GPU by ZeRO stage, MiB, and what it sends in an iteration, MiB; {ranks} ranks, {dtype}",
        f"        {heading}",
    ]
    notes = []
    for stage in range(4):
        settings = ZeroSettings.of(config.deepspeed, stage)
        states = model_states(networks, settings, ranks, dtype, layout.accumulation)
        payloads = iteration_payload(
            networks, settings, ranks, dtype, layout.accumulation, config.rdmd.fake_updates,
            config.train.activation_checkpointing,
        )  # fmt: skip
        sent = sum(payload.sent(ranks) for payload in payloads.values())
        values = [*(states.device[part] for part in COLUMNS), used.peak, total(states, used), sent]
        mark = "  <- configured" if stage == zero_stage(config.deepspeed) else ""
        lines.append(f"  ZeRO {stage}" + "".join(f"{value / MIB:12.1f}" for value in values) + mark)
        if stage == zero_stage(config.deepspeed):
            notes = _notes(states, settings, used)
            if config.stage == "rdmd" and config.rdmd.cost.features is not None:
                notes.append(f"  not counted: the feature network of rdmd.cost.features, {config.rdmd.cost.features}")
            if config.train.cuda_graphs:
                notes.append("  not counted: activations and gradients that train.cuda_graphs keeps between passes")
    return lines + notes


def _notes(states: ModelStates, settings: ZeroSettings, used: Activations) -> list[str]:
    saved = ", ".join(f"{size / MIB:.1f} of {role}" for role, size in used.saved.items())
    notes = [f"  activations kept for the backward pass: {saved}; not counted: CUDA context, workspaces, fragmentation"]
    if states.gathered:
        notes.append(f"  parameters at stage 3: up to {states.gathered / MIB:.1f} of them are gathered for a while")
    held = {part: size for part, size in states.host.items() if size}
    if held:
        listing = ", ".join(f"{part} {size / MIB:.1f}" for part, size in held.items())
        notes.append(f"  offloaded to host memory, by rank: {listing}")
    return notes


def total(states: ModelStates, used: Activations) -> int:
    """Bytes of a GPU at the highest moment: of the passes, or of the optimizer's step."""
    return sum(states.device[part] for part in COLUMNS) + max(used.peak, states.device["update"])


def activations_of(config: Config, networks: PlannedNetworks, layout: BatchLayout) -> Activations:
    """Of an iteration on a GPU, unless RDMD_KERNELS=reference leaves the fused kernels out."""
    fused = os.environ.get("RDMD_KERNELS") != "reference"
    checkpointing = config.train.activation_checkpointing
    return activations(networks, layout.micro_batch, layout.accumulation, config.train.dtype, checkpointing, fused)


def predicted_bytes(config: Config, networks: PlannedNetworks, world: World) -> int:
    """The total of the configured stage on the ranks there are."""
    layout = BatchLayout.of(config.train, world)
    return _predicted(config, networks, layout, activations_of(config, networks, layout))


def _predicted(config: Config, networks: PlannedNetworks, layout: BatchLayout, used: Activations) -> int:
    settings = ZeroSettings.of(config.deepspeed)
    states = model_states(networks, settings, layout.world_size, config.train.dtype, layout.accumulation)
    return total(states, used)


def disk_lines(config: Config, networks: PlannedNetworks) -> list[str]:
    disk = disk_use(networks, config.checkpoint.keep)
    return [
        f"disk, MiB: {disk.checkpoint / MIB:.1f} a checkpoint, {disk.peak / MIB:.1f} for checkpoint.keep = {disk.kept} "
        f"and the one being written; {disk.export / MIB:.1f} an export (export/ and best/)"
    ]


def timing_lines(config: Config, networks: PlannedNetworks, world: World, timing: Timing) -> list[str]:
    steps, batch = config.train.steps, config.train.global_batch_size
    spread = f"{min(timing.seconds):.4g} to {max(timing.seconds):.4g}"
    lines = [
        f"time: {timing.median:.4g} s an iteration ({spread}; median of {len(timing.seconds)} after {WARM_UP}) on "
        f"{world.size} ranks, {batch / timing.median:.1f} samples/s",
        f"      {steps * timing.median / 3600:.3g} h for train.steps = {steps}, without checkpoints, pictures, "
        "validation and fake_warmup",
    ]
    if timing.peak_bytes is not None:
        predicted = predicted_bytes(config, networks, world) / MIB
        lines.append(
            f"      torch.cuda.max_memory_allocated {timing.peak_bytes / MIB:.1f} MiB, predicted {predicted:.1f}"
        )
    return lines
