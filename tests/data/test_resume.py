"""What is served depends on the position alone: not on kills, resumes, ranks, workers, batches or memory."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rdmd_fast.data.order import EpochOrder
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.randomness import Philox, Stream

sys.path.insert(0, str(Path(__file__).parent))
from damaged import COUNT, EACH, flip, packed, stream_of, write_tar

GLOBAL_BATCH, STEPS = 4, 3 * COUNT // 4  # three epochs

WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from damaged import stream_of
import numpy as np
stream = stream_of(sys.argv[2], workers=int(sys.argv[3]), window=2, share=True)
print("open", flush=True)
for step in range(int(sys.argv[4]), int(sys.argv[5])):
    print(json.dumps([step, stream.batch(np.arange(4 * step, 4 * step + 4))[:, 0, 0, 0].tolist()]), flush=True)
    if len(sys.argv) > 6:
        sys.stdin.readline()
"""


def global_batch(streams, step):
    """Numbers of the samples of a step by position, gathered from its ranks' micro-batches of 2."""
    ranks, found = len(streams), {}
    for rank, stream in enumerate(streams):
        layout = BatchLayout(GLOBAL_BATCH, 2, GLOBAL_BATCH // 2 // ranks, rank, ranks)
        for micro in range(layout.accumulation):
            positions = layout.positions(step * GLOBAL_BATCH, micro)
            found |= zip(positions.tolist(), stream.batch(positions)[:, 0, 0, 0].tolist(), strict=True)
    return [found[position] for position in sorted(found)]


@pytest.mark.parametrize("seed", range(20))
def test_kills_and_resumes_at_other_ranks_and_workers_leave_no_trace(tmp_path, seed):
    folder = packed(tmp_path / "set")
    if seed % 2:
        os.truncate(folder / "shard-000001.tar", 2500)
        flip(folder / "shard-000002.tar", 900)
    whole = stream_of(folder, window=2)
    expected = [global_batch([whole], step) for step in range(STEPS)]
    random = np.random.default_rng(seed)
    trace, step = [], 0
    while step < STEPS:
        step = max(0, step - int(random.integers(0, 3)))  # back to the last checkpoint
        del trace[step:]
        options = {"workers": int(random.choice([0, 1, 3])), "cache_bytes": int(random.choice([0, 1 << 20]))}
        streams = [stream_of(folder, window=2, **options) for _ in range(random.integers(1, 3))]
        for _ in range(random.integers(3, 9)):
            if step < STEPS:
                trace.append(global_batch(streams, step))
                step += 1
    assert trace == expected


def test_a_killed_process_goes_on_where_it_was(fork_python, tmp_path):
    folder = packed(tmp_path / "set")
    whole = stream_of(folder, window=2)
    expected = [whole.batch(np.arange(4 * step, 4 * step + 4))[:, 0, 0, 0].tolist() for step in range(STEPS)]
    command = WORKER, Path(__file__).parent, folder
    killed = fork_python(*command, 3, 0, STEPS, "wait")
    assert killed.stdout.readline() == "open\n"
    trace = [json.loads(killed.stdout.readline())[1]]
    for _ in range(6):
        killed.stdin.write("\n")
        killed.stdin.flush()
        trace.append(json.loads(killed.stdout.readline())[1])
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    said, _ = fork_python(*command, 1, 7, STEPS).finish()
    trace += [json.loads(line)[1] for line in said.splitlines()[1:]]
    assert trace == expected


def test_a_position_far_into_a_large_set_is_reached_in_under_a_second():
    order = EpochOrder(Philox(0), Stream.SOURCE_ORDER, [4096] * 2000, 64)  # eight million samples
    begin = time.perf_counter()
    order.indices(np.arange(10**12, 10**12 + 64))
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_windows_of_shards_are_permuted_together(window):
    counts = [5, 0, 3, 7, 1, 4, 6]
    first = np.cumsum([0, *counts])
    order = EpochOrder(Philox(3), Stream.SOURCE_ORDER, counts, window)
    epochs = order.indices(np.arange(4 * order.len)).reshape(4, order.len)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for epoch in epochs:
        assert sorted(epoch) == list(range(order.len))
        shards = np.searchsorted(first, epoch, side="right") - 1
        reach = [np.flatnonzero(shards == shard)[[0, -1]].tolist() for shard in np.flatnonzero(counts)]
        # A window's samples are contiguous: no more shards than it has are under way at any position.
        assert max(sum(begin <= at <= end for begin, end in reach) for at in range(order.len)) <= window


def test_the_order_of_windows_is_what_it_was():
    """It is part of every result."""
    order = EpochOrder(Philox(3), Stream.SOURCE_ORDER, [3, 2, 4], 2)
    assert order.indices(np.arange(18)).tolist() == [8, 6, 7, 4, 3, 5, 0, 2, 1, 7, 6, 8, 4, 3, 5, 1, 2, 0]


def test_windows_and_epochs_draw_orders_of_their_own():
    order = EpochOrder(Philox(3), Stream.SOURCE_ORDER, [16] * 8, 1)
    found = order.indices(np.arange(8 * 8 * 16)).reshape(-1, 16) % 16  # eight epochs of eight windows
    assert len({tuple(each) for each in found.tolist()}) == 64


def test_small_sets_are_permuted_as_a_whole():
    order = EpochOrder(Philox(3), Stream.TARGET_ORDER, [EACH] * 4, 4)
    for epoch in range(3):
        found = order.indices(np.arange(epoch * COUNT, (epoch + 1) * COUNT))
        assert torch.equal(torch.from_numpy(found), Philox(3).permutation(Stream.TARGET_ORDER, epoch, COUNT))


def test_seven_images_fill_a_batch_of_64(tmp_path):
    write_tar(tmp_path / "a.tar", range(7))
    for workers in (0, 3):
        stream = stream_of(tmp_path, tmp_path / "cache", workers=workers)
        numbers = stream.batch(np.arange(64))[:, 0, 0, 0].tolist()
        assert sorted(np.bincount(numbers)) == [9] * 6 + [10]
        for epoch in range(9):
            assert sorted(numbers[7 * epoch : 7 * epoch + 7]) == list(range(7))
