"""Seconds an iteration, by running a few of the configured stage and keeping nothing of it."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rdmd_fast.config import Config
from rdmd_fast.processes.world import World

if TYPE_CHECKING:
    from rdmd_fast.monitoring.telemetry import Telemetry

WARM_UP = 3  # kernels are chosen, caches filled, and ZeRO-3 has traced the networks


@dataclass(frozen=True)
class Timing:
    """Of ``iterations`` after the warm-up: seconds of each, slowest rank's; peak bytes of this rank's allocator."""

    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


def time_iterations(config: Config, world: World, count: int) -> Timing:
    """Build the stage as configured and time ``count`` iterations; a collective call. Writes nothing to run_dir.

    Raises:
        InputError: as the run itself would.
    """
    with throwaway_run(config, world) as (iterate, _):
        for _ in range(WARM_UP):
            iterate()
        wait(world)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            iterate()
            wait(world)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    return Timing(seconds, peak)


@contextlib.contextmanager
def throwaway_run(
    config: Config, world: World, annotated: bool = False
) -> Iterator[tuple[Callable[[], None], Telemetry]]:
    """The configured stage as a function that does what the trainer does in an iteration, but for logging; telemetry.

    Args:
        annotated: phases are ranges of the profiler.

    Raises:
        InputError: as the run itself would.
    """
    from rdmd_fast.experiment import build_experiment
    from rdmd_fast.monitoring.telemetry import Telemetry

    quiet = config.telemetry.model_copy(update={"tensorboard": False, "wandb_project": None})
    with tempfile.TemporaryDirectory(prefix="rdmd-dry-run-") as folder:
        config = config.model_copy(update={"run_dir": folder, "telemetry": quiet})
        steps = config.train.steps
        telemetry = Telemetry(quiet, world, Path(folder), steps, config.train.global_batch_size, annotated)
        experiment = build_experiment(config, world, telemetry)
        counter = itertools.count()

        def iterate() -> None:
            step = next(counter)
            experiment.set_learning_rates(step, steps)
            experiment.update_networks(step)
            experiment.update_ema(step)
            world.any(False)

        try:
            yield iterate, telemetry
        finally:
            experiment.close()


def wait(world: World) -> None:
    """Until this rank's device and all ranks are done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()
