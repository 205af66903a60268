"""Bytes that a rank really holds, part by part, for several configurations in one group of processes.

usage: torchrun --nproc_per_node N memory_worker.py CASES.json RESULTS.json

CASES.json lists plain configurations. Storages are found by walking the engines, each counted once.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from rdmd_fast import rdmd, teacher
from rdmd_fast.config import validate_config
from rdmd_fast.engine.engine import take_step
from rdmd_fast.engine.fp32_masters import master_shards
from rdmd_fast.experiment import build_experiment
from rdmd_fast.monitoring.telemetry import Telemetry
from rdmd_fast.planning.live_memory import LiveStorages
from rdmd_fast.processes.failures import end_process
from rdmd_fast.processes.world import join_world

ITERATIONS = 2


class Storages:
    """Distinct storages; ``add`` returns the bytes of those that were not there."""

    def __init__(self):
        self.seen = set()

    def add(self, tensors: Iterable) -> int:
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                size += storage.nbytes()
        return size


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def whole_parameters(networks: Iterable[torch.nn.Module]) -> int:
    """Bytes of the parameters that lie whole on this rank, those that networks share once."""
    return Storages().add(parameter.data for network in networks for parameter in network.parameters())


def held(engine, storages: Storages) -> dict[str, int]:
    """Bytes of an engine now, those that ``storages`` holds already left out."""
    optimizer = engine.optimizer
    adam = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    masters = master_shards(engine)
    offloaded = getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    parts = {
        "parameters": storages.add(shards or [parameter.data for parameter in parameters]),
        "optimizer": storages.add([*masters, *tensors_in([dict(adam.state), *offloaded])]),
    }
    gathered = [parameter.data for parameter in parameters] if shards else []
    storages.add(gathered)
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    parts["buckets"] = storages.add(tensors_in([bucket.buffer for bucket in buckets]))
    gradients = [parameter.grad for parameter in parameters]
    gradients += [parameter.grad for group in adam.param_groups for parameter in group["params"]]
    for flats in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        gradients += [flat.grad for flat in getattr(optimizer, flats, [])]
    gradients += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    gradients += tensors_in([dict(getattr(optimizer, "averaged_gradients", {}))])
    parts["gradients"] = storages.add(gradients)
    return parts


class Watch:
    """Measures before every update, and the temporaries of the updates themselves."""

    def __init__(self, networks):
        self.networks, self.before, self.update, self.gathered = networks, {}, {}, 0

    def step(self, engine, name):
        self.look()
        self.before[name] = held(engine, Storages())
        with LiveStorages() as live:
            take_step(engine, name)
        self.update[name] = live.peak  # the last one: the first makes the moments

    def look(self):
        """Called where most is gathered: at the end of phases."""
        self.gathered = max(self.gathered, whole_parameters(self.networks))


def measure(values: dict, world) -> dict:
    config = validate_config(values, "case")
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(config.telemetry, world, Path(folder), 1, config.train.global_batch_size)
        experiment = build_experiment(config, world, telemetry)
    engines = experiment.state.engines
    frozen = getattr(experiment.stage, "teacher", None)
    frozen = frozen if isinstance(frozen, torch.nn.Module) else None
    networks = [engine.module for engine in engines.values()] + ([frozen] if frozen is not None else [])
    watch = Watch(networks)
    phase = telemetry.phase

    def watched_phase(name):
        watch.look()
        return phase(name)

    telemetry.phase = watched_phase
    rdmd.take_step = teacher.take_step = watch.step
    for step in range(ITERATIONS):
        experiment.stage.iteration(step)
        experiment.state.ema.update(step)
    rdmd.take_step = teacher.take_step = take_step
    storages = Storages()
    after = {name: held(engine, storages) for name, engine in engines.items()}
    frozen_parameters = list(frozen.parameters()) if frozen is not None else []
    shards = [p.ds_tensor for p in frozen_parameters if hasattr(p, "ds_tensor")]
    return {
        "after": after,
        "before": watch.before,
        "teacher": storages.add(shards or [parameter.data for parameter in frozen_parameters]),
        "EMA": storages.add(experiment.state.ema.shards),
        "update": max(watch.update.values()),
        "gathered": watch.gathered,
    }


def main():
    world = join_world()
    results = [measure(values, world) for values in json.loads(Path(sys.argv[1]).read_text())]
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))
    world.barrier()
    end_process(0)


if __name__ == "__main__":
    main()
