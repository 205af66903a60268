"""A training-like loop: steps that compute, on images that workers decode or that the step waits for.

    python -m benchmarks.workers [--images 2048] [--step 20] [--workers 0 1 2] [--prefetch 1 4 8]

64x64 PNG, batches of 64 from a set that is not cached (each batch is decoded) and from one that is (the first epoch
decodes, the others do not). "host": a step computes for --step milliseconds on one core, as a launch-bound or CPU
training does; "device": it sleeps for as long, as the host does while a GPU computes. Printed: the share of the loop
that waited for data, and seconds for all batches, the best of --rounds. No more cores can be told apart than there are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.images import BATCH, FORMATS, SHARDS, encode, write
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import SampleStream
from rdmd_fast.randomness import Philox, Stream


def compute(seconds: float, busy: bool) -> None:
    """Hold this thread for ``seconds`` of its own work, or of waiting."""
    if not busy:
        time.sleep(seconds)
        return
    end = time.thread_time() + seconds  # of this thread: more workers make the same work last longer
    values = np.ones(1 << 14)
    while time.thread_time() < end:
        values *= 1.0000001


def loop(shards: ShardSet, cached: bool, workers: int, prefetch: int, seconds: float, busy: bool, epochs: int):
    """Time (seconds, share of them in ``batch``) of ``epochs`` epochs."""
    stream = SampleStream(shards, Philox(0), Stream.SOURCE_ORDER, (4 << 30) * cached, workers, prefetch)
    begin = time.perf_counter()
    for first in range(0, epochs * len(shards), BATCH):
        stream.batch(np.arange(first, first + BATCH))
        compute(seconds, busy)
    spent = time.perf_counter() - begin
    stream._samples.close()  # the shards are for the next one
    return spent, stream.waited / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--step", type=float, default=20, help="milliseconds of a step (default: 20)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prefetch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    count = args.images // (BATCH * SHARDS) * BATCH * SHARDS
    with tempfile.TemporaryDirectory() as scratch:
        suffix, options = FORMATS["png"]
        write(Path(scratch) / "set", suffix, [encode(number, "png", options) for number in range(count)])
        shards = ShardSet(Path(scratch) / "set/tars", tolerant=True, cache_dir=scratch)
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {count} images")
        print(f"{'step':7} {'set':9} {'workers':>7} {'prefetch':>8} {'seconds':>8} {'waiting':>8}")
        sets = (False, 1), (True, 3)
        for busy, (cached, epochs), workers in itertools.product((True, False), sets, args.workers):
            for prefetch in args.prefetch if workers else [1]:
                setting = shards, cached, workers, prefetch, args.step / 1000, busy, epochs
                spent, waited = min(loop(*setting) for _ in range(args.rounds))
                row = f"{'host' if busy else 'device':7} {'cached' if cached else 'uncached':9}"
                row += f" {workers:>7} {prefetch if workers else '-':>8} {spent:>8.2f} {waited:>8.1%}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
