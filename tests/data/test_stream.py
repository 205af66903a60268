import os

import numpy as np
import pytest
import torch
from material import random_pixels, write_shards

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import SampleStream, ToyStream, open_stream
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

COUNT = 23


@pytest.fixture
def originals():
    return random_pixels(0, COUNT, 3, 4, 3)


@pytest.fixture
def folder(tmp_path, originals):
    return write_shards(tmp_path / "set", originals, 10)


def image_stream(folder, seed=0, stream=Stream.SOURCE_ORDER, **options):
    return SampleStream(ShardSet(folder), Philox(seed), stream, **options)


def test_each_epoch_is_another_permutation(folder):
    stream = image_stream(folder)
    epochs = [stream.indices(torch.arange(e * COUNT, (e + 1) * COUNT)) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_seed_and_stream(folder):
    positions = torch.arange(COUNT)
    orders = [
        tuple(image_stream(folder, seed, stream).indices(positions))
        for seed in (0, 1)
        for stream in (Stream.SOURCE_ORDER, Stream.TARGET_ORDER)
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("split", [1, 5, 16, 100])
def test_batches_do_not_depend_on_how_positions_are_split(folder, originals, cache_bytes, split):
    stream = image_stream(folder, cache_bytes=cache_bytes)
    positions = torch.arange(3 * COUNT)
    reference = image_stream(folder)
    expected = torch.from_numpy(originals[reference.indices(positions)]).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat([stream.batch(part) for part in positions.split(split)]), expected)
    backwards = torch.cat([stream.batch(part) for part in positions.flip(0).split(split)])
    assert torch.equal(backwards, expected.flip(0))


def test_a_position_far_into_the_run_needs_no_history(folder):
    positions = torch.arange(10**12, 10**12 + 5)
    walked = image_stream(folder)
    walked.batch(torch.arange(100))
    assert torch.equal(image_stream(folder).batch(positions), walked.batch(positions))


def test_image_batches_are_uint8_in_channels_last(folder):
    stream = image_stream(folder)
    batch = stream.batch(torch.arange(6))
    assert stream.shape == (3, 3, 4) and stream.len == COUNT
    assert batch.dtype == torch.uint8 and batch.shape == (6, 3, 3, 4)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_the_callers_own(folder):
    stream = image_stream(folder)
    first = stream.batch(torch.arange(8))
    kept = first.clone()
    first.zero_()
    assert torch.equal(stream.batch(torch.arange(8)), kept)


def test_the_cache_decodes_each_sample_once(folder, monkeypatch):
    stream = image_stream(folder)
    read, calls = stream.shards.reader.read, []
    monkeypatch.setattr(stream.shards.reader, "read", lambda index: calls.append(index) or read(index))
    stream.batch(torch.arange(COUNT))
    stream.batch(torch.arange(4 * COUNT))
    assert sorted(calls) == list(range(COUNT))


def test_a_set_without_a_readable_sample_is_an_error(folder):
    stream = image_stream(folder)
    for path in folder.glob("*.tar"):
        os.truncate(path, 600)
    with pytest.raises(InputError, match=r"none of its 23 samples can be read \(.*cut short"):
        stream.batch(torch.arange(COUNT))


def test_points_stream_as_float32(tmp_path):
    points = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    stream = open_stream(str(write_shards(tmp_path / "set", points, 5)), Philox(0), "target")
    batch = stream.batch(range(12))
    assert stream.shape == (2,) and batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), points[stream.indices(range(12))])


@pytest.mark.parametrize("start", [0, ToyStream._BLOCK - 100, 5 * ToyStream._BLOCK - 1, 2**40 + 3])
@pytest.mark.parametrize("count", [1, 512, 2 * ToyStream._BLOCK, 3 * ToyStream._BLOCK])
def test_toy_batches_equal_direct_draws(start, count):
    toy = ToyDistribution(toy="8gaussians")
    stream = ToyStream(toy, Philox(4), Stream.SOURCE_POINTS)
    positions = torch.arange(start, start + count)
    expected = toy.sample(Philox(4), Stream.SOURCE_POINTS, positions)
    assert torch.equal(stream.batch(positions), expected)
    assert torch.equal(stream.batch(positions.flip(0)), expected.flip(0))


def test_toy_batches_survive_jumps_and_writes(monkeypatch):
    toy = ToyDistribution(toy="gaussian")
    stream = ToyStream(toy, Philox(4), Stream.SOURCE_POINTS)
    for start in (0, 10**6, 512, 20_000, 3):
        positions = torch.arange(start, start + 64)
        batch = stream.batch(positions)
        assert torch.equal(batch, toy.sample(Philox(4), Stream.SOURCE_POINTS, positions))
        batch.zero_()
        assert torch.equal(stream.batch(positions), toy.sample(Philox(4), Stream.SOURCE_POINTS, positions))
    assert stream.batch([]).shape == (0, 2)


def test_consecutive_toy_batches_share_their_draws(monkeypatch):
    stream = ToyStream(ToyDistribution(toy="gaussian"), Philox(4), Stream.SOURCE_POINTS)
    draws, sample = [], ToyDistribution.sample
    monkeypatch.setattr(ToyDistribution, "sample", lambda *args: draws.append(1) or sample(*args))
    for iteration in range(60):
        stream.batch(torch.arange(512 * iteration, 512 * (iteration + 1)))
    assert len(draws) == 2


def test_source_and_target_are_independent_on_the_same_data(folder):
    toy = ToyDistribution(toy="gaussian")
    positions = torch.arange(20)
    for spec in (toy, "toy:gaussian", folder):
        source, target = (open_stream(spec, Philox(0), role) for role in ("source", "target"))
        assert not torch.equal(source.batch(positions), target.batch(positions))
    assert open_stream(toy, Philox(0), "source").shape == (2,)
    assert open_stream(toy, Philox(0), "source").len is None


def test_bad_specs_and_positions_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="toy:blob"):
        open_stream("toy:blob", Philox(0), "source")
    with pytest.raises(InputError, match="no such folder"):
        open_stream(tmp_path / "nowhere", Philox(0), "source")
    for stream in (image_stream(folder), open_stream("toy:gaussian", Philox(0), "source")):
        with pytest.raises(ValueError, match="negative"):
            stream.batch([3, -1])
