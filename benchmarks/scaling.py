"""Throughput of two ranks against one at equal work a rank, as a ratio.

    python -m benchmarks.scaling [--stage 0 2] [--ranks 2] [--iterations 10] [--rounds 5] [--batch 16] [--json FILE]

One rank and N ranks distil the digits in turn, one thread a rank, each rank with the same micro-batch. A round times
``iterations`` of both, and each side's best iteration counts, since machines are shared; with fewer idle cores than
ranks the ratio says nothing. 1.00 would be perfect: N ranks take as long for N times the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.communication import at_stage, on_ranks, prepare_digits


def worker(listing: str, results: str) -> None:
    """On each rank: time the iterations of every case of ``listing``, write {case: seconds of each iteration}."""
    from rdmd_fast.config import validate_config
    from rdmd_fast.planning.timing import time_iterations
    from rdmd_fast.processes.failures import end_process
    from rdmd_fast.processes.world import join_world

    world = join_world()
    found = []
    for case in json.loads(Path(listing).read_text()):
        found.append(time_iterations(validate_config(case["values"], "case"), world, case["iterations"]).seconds)
    if world.is_main:
        Path(results).write_text(json.dumps(found))
    world.barrier()
    end_process(0)


def measure(values: dict, ranks: int, stages: list[int], batch: int, iterations: int, folder: Path) -> list[float]:
    """Seconds of the best iteration at each stage on ``ranks`` ranks, ``batch`` samples each."""
    cases = []
    for stage in stages:
        case = at_stage(values, stage)
        case["train"] = {**case["train"], "global_batch_size": batch * ranks, "micro_batch_size": batch}
        cases.append({"values": case, "iterations": iterations})
    return [min(seconds) for seconds in on_ranks(["-m", "benchmarks.scaling", "--worker"], cases, ranks, folder)]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 2], choices=range(4), help="ZeRO stages (0 2)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks beside one (2)")
    parser.add_argument("--iterations", type=int, default=10, help="timed iterations a round (10)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, one rank and several in turn (5)")
    parser.add_argument("--batch", type=int, default=16, help="samples a rank and iteration (16)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    best: dict[tuple[int, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        values = prepare_digits(Path(folder))
        for _ in range(arguments.rounds):
            for ranks in (1, arguments.ranks):
                found = measure(
                    values, ranks, arguments.stage, arguments.batch, arguments.iterations, Path(folder)
                )  # fmt: skip
                for stage, seconds in zip(arguments.stage, found, strict=True):
                    best[stage, ranks] = min(seconds, best.get((stage, ranks), seconds))
    rows = []
    for stage in arguments.stage:
        alone, together = best[stage, 1], best[stage, arguments.ranks]
        row = {"stage": stage, "ranks": arguments.ranks, "one_rank_seconds": alone, "seconds": together}
        rows.append(row | {"efficiency": alone / together, "cores": len(os.sched_getaffinity(0))})
        print(
            f"ZeRO {stage}  1 rank {alone:.4f} s an iteration, {arguments.ranks} ranks {together:.4f} s  "
            f"efficiency {alone / together:.3f}  ({rows[-1]['cores']} cores)"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
