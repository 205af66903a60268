"""``train.py --profile``: a trace of a few steady iterations, and where their time went by phase."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.autograd import DeviceType

from .config import Config
from .distributed import join_world, on_main, together
from .errors import InputError
from .planning.timing import WARM_UP, throwaway_run, wait
from .runtime import EXIT_DONE, write_atomically
from .telemetry import PHASE_PREFIX

COMMUNICATION = ("nccl:", "gloo:")
"""Beginnings of the profiler's names for what ranks send: asynchronous, so that it may overlap with phases.

Each collective has one such range; the operations c10d:: and record_param_comms around it are left out.
"""
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
    with throwaway_run(config, world, annotated=True) as iterate:
        for _ in range(WARM_UP):
            iterate()
        wait(world)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(iterations):
                with torch.profiler.record_function("rdmd iteration"):
                    iterate()
            wait(world)
    trace = folder / f"trace_rank{world.rank}.json"
    together(world, lambda: profiler.export_chrome_trace(str(trace)), str(trace))
    rows = phase_rows(profiler.key_averages(), iterations, world.device.type == "cuda")
    record = {"iterations": iterations, "ranks": world.size, "device": str(world.device), "phases": rows}
    on_main(world, lambda: write_atomically(folder / "phases.json", json.dumps(record, indent=1) + "\n"))
    if world.is_main:
        print("\n".join(table(rows)))
        print(f"{folder}: traces of {world.size} ranks, for ui.perfetto.dev, and phases.json")
    return EXIT_DONE


def phase_rows(events, iterations: int, on_gpu: bool) -> list[dict]:
    """Milliseconds an iteration of each phase, by the host's clock and, on a GPU, of its kernels.

    On a GPU the profiler gives every range a second time, as an annotation on the device from its first kernel to its
    last one, gaps included. Kernels are counted by the range on the host that launched them instead.

    Args:
        events: ``key_averages()`` of the profiler.
    """
    rows, whole = [], None
    sent = {"phase": "communication (within the above)", "host_ms": 0.0, "calls": 0.0}
    if on_gpu:
        sent["device_ms"] = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            if event.key.startswith(NCCL_KERNELS):
                sent["device_ms"] += event.device_time_total / 1000 / iterations
        elif event.key.startswith(PHASE_PREFIX):
            rows.append(_row(event.key.removeprefix(PHASE_PREFIX), event, iterations, on_gpu))
        elif event.key == "rdmd iteration":
            whole = _row("iteration", event, iterations, on_gpu)
        elif event.key.startswith(COMMUNICATION):
            sent["host_ms"] += event.cpu_time_total / 1000 / iterations
            sent["calls"] += event.count / iterations
    other = {"phase": "other", "calls": 1.0}
    for key in ("host_ms", "device_ms")[: 1 + on_gpu]:
        other[key] = whole[key] - sum(row[key] for row in rows)
    rows.sort(key=lambda row: -row["host_ms"])
    return [*rows, other, whole, *([sent] if sent["calls"] else [])]


def _row(name: str, event, iterations: int, on_gpu: bool) -> dict:
    row = {"phase": name, "host_ms": event.cpu_time_total / 1000 / iterations, "calls": event.count / iterations}
    if on_gpu:
        row["device_ms"] = event.device_time_total / 1000 / iterations
    return row


def table(rows: list[dict]) -> list[str]:
    """Lines for people."""
    whole = next(row for row in rows if row["phase"] == "iteration")
    clock = "device_ms" if "device_ms" in whole else "host_ms"
    lines = [f"{'phase':<34}{'host ms':>10}{'device ms':>11}{'share':>8}{'calls':>7}"]
    for row in rows:
        device = f"{row['device_ms']:.3f}" if "device_ms" in row else "-"
        share = row.get(clock, 0.0) / whole[clock] if whole[clock] else 0.0
        lines.append(f"{row['phase']:<34}{row['host_ms']:>10.3f}{device:>11}{share:>8.1%}{row['calls']:>7.1f}")
    return lines
