"""Counts what ranks send: every collective operation of torch.distributed, as a ring would carry it out.

As a worker, started on each rank by benchmarks/communication.py and the tests:

    torchrun --nproc_per_node N -m benchmarks.collectives [--iterations 5] CASES.json RESULTS.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operation -> (multiples of (N - 1)/N times the payload, which argument holds the payload, whole). Reduce and
# broadcast are a rank's share: in a ring all ranks but one pass the payload on.
RING = {
    "allreduce_": (2, 0),
    "allreduce_coalesced_": (2, 0),
    "allgather_": (1, 0),
    "_allgather_base_": (1, 0),
    "allgather_coalesced_": (1, 0),
    "allgather_into_tensor_coalesced_": (1, 0),
    "reduce_scatter_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "reduce_": (1, 0),
    "broadcast_": (1, 0),
    "alltoall_": (1, 1),
    "alltoall_base_": (1, 1),
    "barrier": (0, 0),
    "monitored_barrier_": (0, 0),
}
ITERATIONS = 5  # until ZeRO-3's traces of the networks recur; the last one is counted


class CollectiveBytes(TorchDispatchMode):
    """Bytes that this rank sends while it is active, by ``label`` and operation: ``sent[label, operation]``."""

    def __init__(self):
        super().__init__()
        self.sent: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self.label = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _count(self, operation: str, arguments: tuple) -> None:
        if operation not in RING:
            raise NotImplementedError(f"collective {operation}: its bytes on a ring are not known here")
        factor, payload = RING[operation]
        size = sum(part.nbytes for part in tree_leaves(arguments[payload]) if isinstance(part, Tensor)) if factor else 0
        ranks = dist.get_world_size()  # all groups here span the world
        self.sent[self.label, operation] += factor * (ranks - 1) / ranks * size
        self.calls[self.label, operation] += 1

    @contextlib.contextmanager
    def of(self, label: str) -> Iterator[None]:
        outer, self.label = self.label, label
        yield
        self.label = outer


def measure(values: dict, world, iterations: int = ITERATIONS) -> dict:
    """Bytes that each rank sends in an iteration of the run that ``values`` configure: a collective call.

    Returns:
        ``sent`` by networks and optimizers, ``votes`` of the trainer's own decisions, ``calls``, ``by_operation``.
    """
    from rdmd_fast.config import validate_config
    from rdmd_fast.engine.engine import set_learning_rate
    from rdmd_fast.experiment import build_experiment
    from rdmd_fast.monitoring.telemetry import Telemetry

    config = validate_config(values, "case")
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(config.telemetry, world, Path(folder), 1, config.train.global_batch_size)
        experiment = build_experiment(config, world, telemetry)
        counted = CollectiveBytes()
        for step in range(iterations):
            with counted if step == iterations - 1 else contextlib.nullcontext():
                for name, engine in experiment.state.engines.items():
                    set_learning_rate(engine, experiment.optimizers[name], step, iterations)
                experiment.stage.iteration(step)
                experiment.state.ema.update(step)
                with counted.of("votes"):
                    world.any(False)
    votes = sum(sent for (label, _), sent in counted.sent.items() if label == "votes")
    return {
        "sent": sum(counted.sent.values()) - votes,
        "votes": votes,
        "calls": sum(counted.calls.values()),
        "by_operation": {operation: sent for (label, operation), sent in counted.sent.items() if not label},
    }


def main() -> None:
    from rdmd_fast.processes.failures import end_process
    from rdmd_fast.processes.world import join_world

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="the last one is counted (5)")
    parser.add_argument("cases", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    world = join_world()
    results = [measure(values, world, arguments.iterations) for values in json.loads(arguments.cases.read_text())]
    if world.is_main:
        arguments.results.write_text(json.dumps(results))
    world.barrier()
    end_process(0)


if __name__ == "__main__":
    main()
