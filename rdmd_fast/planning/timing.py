"""Seconds an iteration, by running a few of the configured stage and keeping nothing of it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..distributed import World, set_learning_rate

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
    from ..experiment import build_experiment
    from ..telemetry import Telemetry

    quiet = config.telemetry.model_copy(update={"tensorboard": False, "wandb_project": None})
    with tempfile.TemporaryDirectory(prefix="rdmd-dry-run-") as folder:
        config = config.model_copy(update={"run_dir": folder, "telemetry": quiet})
        telemetry = Telemetry(quiet, world, Path(folder), config.train.steps, config.train.global_batch_size)
        experiment = build_experiment(config, world, telemetry)
        for step in range(WARM_UP):
            _iterate(config, world, experiment, step)
        _wait(world)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        seconds = []
        for step in range(WARM_UP, WARM_UP + count):
            start = time.perf_counter()
            _iterate(config, world, experiment, step)
            _wait(world)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
        experiment.close()
    return Timing(seconds, peak)


def _iterate(config: Config, world: World, experiment, step: int) -> None:
    """What the trainer does in an iteration, but for logging."""
    for name, engine in experiment.state.engines.items():
        set_learning_rate(engine, experiment.optimizers[name], step, config.train.steps)
    experiment.stage.iteration(step)
    experiment.state.ema.update(step)
    world.any(False)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()
