"""What an iteration's benchmark measures on a side: time by phase, memory, FLOPs, passes, host synchronisations."""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fastgen_side import FastGen, count_fastgen
from benchmarks.host_syncs import HostSyncs, count_host, count_on_gpu
from benchmarks.network_passes import count_passes, passes_of
from benchmarks.networks import CUDA, DTYPES, matmul_peak, peak_of, seconds
from benchmarks.plain_networks import PlainUNet
from benchmarks.step_cases import BATCHES, ROOT, compile_as, network_options, run_config, sample_shape
from benchmarks.step_sides import Ours, Plain
from benchmarks.traffic import MATMULS, network_traffic
from rdmd_fast.config import Config
from rdmd_fast.networks import build_network
from rdmd_fast.networks.flops import distillation_flops, forward_flops
from rdmd_fast.processes.host_memory import LARGEST_MMAP_THRESHOLD, keep_freed_memory


def best_times(sides: dict[str, Callable[[], None]], rounds: int, burst: int) -> dict[str, dict[str, float]]:
    """Time iterations, the best of each side since machines are shared; ``burst`` of one side at a time.

    Besides ``seconds`` there are ``cpu_seconds`` of all threads, which other processes of the machine lengthen less.

    The first one of several is not timed: it finds the memory and the caches as the other side has left them.
    """
    for iteration in sides.values():
        for _ in range(2):
            iteration()
    columns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for dtype in DTYPES:
            matmul_peak(dtype)  # when the machine is fast, it is for both
        for name, iteration in sides.items():
            # As train.py sets the C library's allocator, and as it comes.
            keep_freed_memory() if name.startswith("ours") else keep_freed_memory(2 * LARGEST_MMAP_THRESHOLD)
            if burst > 1:
                iteration()
            timed = max(1, burst - 1)
            before = time.process_time()
            wall = seconds(lambda run=iteration, timed=timed: [run() for _ in range(timed)])
            columns[name].append((wall / timed, (time.process_time() - before) / timed))
    best = {name: map(min, zip(*column, strict=True)) for name, column in columns.items()}
    return {name: dict(zip(("seconds", "cpu_seconds"), both, strict=True)) for name, both in best.items()}


def counts(sides: dict[str, Ours | Plain | FastGen]) -> dict[str, dict]:
    """Count host synchronisations and launches.

    On a CPU, of what is not compiled, passes, operations and bytes outside matrix products too.
    """
    if CUDA:
        return {name: count_on_gpu(side) for name, side in sides.items()}
    counters = {"ours": count_host, "plain": count_plain, "fastgen": count_fastgen}
    counted = {name: count(sides[name]) for name, count in counters.items() if name in sides}
    for name in counted:
        counted[name]["bytes_outside_matmuls"] = network_traffic(sides[name].iteration, MATMULS)
    return counted


def count_plain(plain: Plain) -> dict:
    """Count passes, operations, host synchronisations and launches of an iteration, without a GPU."""
    networks = (plain.rdmd.generator, plain.rdmd.fake_score, plain.rdmd.average, plain.rdmd.teacher)
    modules = [network for network in networks if isinstance(network, torch.nn.Module)]
    tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    with count_passes(plain.networks()) as passes, HostSyncs([*tensors, *plain.sources]) as syncs:
        plain.iteration()
    return {**syncs.totals(), "passes": passes_of(passes)}


def iteration_flops(case: str, config: Config) -> float:
    """Count matmul and convolution FLOPs of the plain formulation's iteration, less its second rollout, on shapes."""
    shape, updates, batch = sample_shape(case), config.rdmd.fake_updates, config.train.global_batch_size
    if case == "toy":
        generator, score = (forward_flops(options, shape) for options in (config.generator, config.network))
        return batch * distillation_flops(generator, 0.0, score, updates)
    with torch.device("meta"):
        network = PlainUNet(build_network(network_options(case), shape, dropout=False))
        sample, c_noise = torch.empty(1, *shape), torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(sample, c_noise)
    forward = counter.get_total_flops()
    return batch * distillation_flops(forward, forward, forward, updates)


def phases(ours: Ours, iterations: int = 3) -> dict[str, float]:
    """Time an iteration by phase, as telemetry takes them, and what lies between them."""
    ours.telemetry.phase_seconds()
    total = sum(seconds(ours.iteration) for _ in range(iterations))
    parts = {name: duration / iterations for name, duration in ours.telemetry.phase_seconds().items()}
    return {**parts, "other": total / iterations - sum(parts.values())}


def processor() -> str:
    """Name the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allocated_peak(side: Ours | Plain | FastGen, before: int) -> int:
    """Measure the bytes that an iteration takes of a GPU's allocator at its height, above what it held ``before``."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    side.iteration()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(side: str, dtype: str, arguments: argparse.Namespace) -> int:
    """Measure the resident bytes of a process of its own that runs iterations of one side."""
    command = [
        sys.executable, "-m", "benchmarks.step", "--case", arguments.case,
        "--memory-of", side.partition("_")[0], "--dtype", dtype, "--stage", str(arguments.stage),
        "--batch", str(arguments.batch or BATCHES[arguments.case]),
        *(["--compile", arguments.compile] if side.endswith("_compiled") else []),
        *(["--fastgen", arguments.fastgen] if side == "fastgen" else []), "--set", *arguments.set,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_peak(arguments: argparse.Namespace) -> None:
    """Run what ``peak_memory`` starts."""
    dtype, compiled = arguments.dtype[0], arguments.compile
    with tempfile.TemporaryDirectory(prefix="rdmd-step-") as name:
        overrides = [*compile_as(compiled), *arguments.set]
        config = run_config(arguments.case, dtype, Path(name), overrides, arguments.batch, arguments.stage)
        load_libraries(Path(name), dtype, arguments.fastgen)

        def iterations() -> None:
            if arguments.memory_of == "ours":
                run = Ours(config)
            elif arguments.memory_of == "fastgen":
                run = FastGen(arguments.fastgen, arguments.case, config, dtype)
            else:
                run = Plain(arguments.case, config, dtype, compiled, exact_teacher=lambda state, sigma: state)
            for _ in range(2):  # optimizers have their states from the first one on
                run.iteration()

        print(peak_of(iterations))


def load_libraries(folder: Path, dtype: str, fastgen: str | None = None) -> None:
    """Run an iteration of each side on a few points: what they import and load on the way counts for neither."""
    config = run_config("toy", dtype, folder / "small", ["network.hidden=8", "generator.hidden=8"], 4)
    ours = Ours(config)
    ours.iteration()
    Plain("toy", config, dtype, exact_teacher=lambda state, sigma: state).iteration()
    ours.experiment.close()
    if fastgen:
        FastGen(fastgen, "digits", run_config("digits", dtype, folder / "smaller", batch=4), dtype).iteration()
