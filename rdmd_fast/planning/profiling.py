"""``train.py --profile``: a trace of a few steady iterations, and where their time went by phase."""

import json
from pathlib import Path

import torch
from torch.autograd import DeviceType

from rdmd_fast.config import Config
from rdmd_fast.errors import EXIT_DONE, InputError
from rdmd_fast.files import write_atomically
from rdmd_fast.monitoring.telemetry import PHASE_PREFIX
from rdmd_fast.planning.timing import WARM_UP, throwaway_run, wait
from rdmd_fast.processes.world import join_world, on_all_ranks, on_main

COMMUNICATION = ("nccl:", "gloo:")
"""Beginnings of the profiler's names for what ranks send: asynchronous, so that it may overlap with phases.

Each collective has one such range; the operations c10d:: and record_param_comms around it are left out.
"""
ITERATION = "iteration"
NCCL_KERNELS = ("ncclDevKernel", "ncclKernel")


def profile(config: Config, iterations: int) -> int:
    """Trace ``iterations`` after a warm-up; a collective call. Nothing of the training is kept.

    Writes run_dir/profile/trace_rank<R>.json of every rank, for chrome://tracing or ui.perfetto.dev, and
    run_dir/profile/phases.json. On a GPU phases are NVTX ranges, too: `nsys profile --trace=cuda,nvtx …`.

    Raises:
        InputError: as the run itself would; less than one iteration; a folder that cannot be written.
    """
    if iterations < 1:
        raise InputError(f"--profile {iterations}: must be at least 1")
    world = join_world(config.train.collective_timeout)
    folder = Path(config.run_dir) / "profile"
    on_main(world, lambda: folder.mkdir(parents=True, exist_ok=True), f"{folder}")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with throwaway_run(config, world, annotated=True) as (iterate, telemetry):
        for _ in range(WARM_UP):
            iterate()
        wait(world)
        telemetry.phase_seconds()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(iterations):
                with telemetry.phase(ITERATION):
                    iterate()
            wait(world)
        device_seconds = telemetry.phase_seconds() if world.device.type == "cuda" else None
    trace = folder / f"trace_rank{world.rank}.json"
    on_all_ranks(world, lambda: profiler.export_chrome_trace(str(trace)), str(trace))
    rows = phase_rows(profiler.key_averages(), iterations, device_seconds)
    record = {"iterations": iterations, "ranks": world.size, "device": str(world.device), "phases": rows}
    on_main(world, lambda: write_atomically(folder / "phases.json", json.dumps(record, indent=1) + "\n"))
    if world.is_main:
        print("\n".join(table(rows)))
        print(f"{folder}: traces of {world.size} ranks, for ui.perfetto.dev, and phases.json")
    return EXIT_DONE


def phase_rows(events, iterations: int, device_seconds: dict[str, float] | None = None) -> list[dict]:
    """Milliseconds an iteration of each phase, by the host's clock and, on a GPU, from its first to its last kernel.

    The profiler's own sums of kernels would not do: it counts those of a thread to that thread's ranges, and autograd
    launches the backward passes' from a thread of its own.

    Args:
        events: ``key_averages()`` of the profiler.
        device_seconds: of all iterations by phase, by the device's clock; None on a CPU.
    """
    rows, whole = [], None
    sent = {"phase": "communication (within the above)", "host_ms": 0.0, "calls": 0.0}
    if device_seconds is not None:
        sent["device_ms"] = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            if event.key.startswith(NCCL_KERNELS):
                sent["device_ms"] += event.device_time_total / 1000 / iterations
        elif event.key.startswith(PHASE_PREFIX):
            name = event.key.removeprefix(PHASE_PREFIX)
            host = event.cpu_time_total / 1000 / iterations
            row = {"phase": name, "host_ms": host, "calls": event.count / iterations}
            if device_seconds is not None:
                row["device_ms"] = device_seconds[name] * 1000 / iterations
            if name == ITERATION:
                whole = row
            else:
                rows.append(row)
        elif event.key.startswith(COMMUNICATION):
            sent["host_ms"] += event.cpu_time_total / 1000 / iterations
            sent["calls"] += event.count / iterations
    other = {"phase": "other", "calls": 1.0}
    for key in ("host_ms", "device_ms") if device_seconds is not None else ("host_ms",):
        other[key] = whole[key] - sum(row[key] for row in rows)
    rows.sort(key=lambda row: -row["host_ms"])
    return [*rows, other, whole, *([sent] if sent["calls"] else [])]


def table(rows: list[dict]) -> list[str]:
    """Lines for people."""
    whole = next(row for row in rows if row["phase"] == ITERATION)
    clock = "device_ms" if "device_ms" in whole else "host_ms"
    lines = [f"{'phase':<34}{'host ms':>10}{'device ms':>11}{'share':>8}{'calls':>7}"]
    for row in rows:
        device = f"{row['device_ms']:.3f}" if "device_ms" in row else "-"
        share = row.get(clock, 0.0) / whole[clock] if whole[clock] else 0.0
        lines.append(f"{row['phase']:<34}{row['host_ms']:>10.3f}{device:>11}{share:>8.1%}{row['calls']:>7.1f}")
    return lines
