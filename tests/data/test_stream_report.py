"""Real damage to real tars: every readable sample comes, positions do not shift, drops are counted by shard."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from material import write_shards

from rdmd_fast.data import domain
from rdmd_fast.data.cache.sample_cache import WindowedSamples
from rdmd_fast.data.shards import sample_reader
from rdmd_fast.data.shards import shard_set as shards_module
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream_report import StreamReport
from rdmd_fast.errors import InputError, describe_system_error
from rdmd_fast.processes.world import World
from rdmd_fast.trainer import main

sys.path.insert(0, str(Path(__file__).parent))
from damaged import COUNT, EACH, flip, foreign, members, packed, picture, served, stream_of, write_tar

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SHARD = "shard-000001.tar"
OF_SHARD = list(range(EACH, 2 * EACH))
ALONE = World(0, 1, torch.device("cpu"))


def truncate(path):
    third = members(path)[2]
    path.write_bytes(path.read_bytes()[: third.offset_data + third.size // 2])


def truncate_in_header(path):
    path.write_bytes(path.read_bytes()[: members(path)[3].offset + 100])


def flip_data(path):
    flip(path, members(path)[1].offset_data + 300)


def flip_header(path):
    flip(path, members(path)[1].offset + 2)


def flip_last_header(path):
    flip(path, members(path)[4].offset + 2)


def empty_file(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def wrong_names(path):
    write_tar(path, OF_SHARD, "{}")


def empty_tar(path):
    path.write_bytes(bytes(10240))


def doubled_keys(path):
    write_tar(path, OF_SHARD, "same.png")


# damage, numbers of the samples that are gone, drops that are told
FOREIGN = [
    (truncate, OF_SHARD[2:], 3),
    (truncate_in_header, OF_SHARD[3:], 2),
    (flip_data, OF_SHARD[1:2], 1),
    (flip_header, OF_SHARD[1:2], 1),
    (flip_last_header, OF_SHARD[4:], 1),
    (empty_file, OF_SHARD, 5),
    (noise, OF_SHARD, 5),
    (wrong_names, OF_SHARD, 0),
    (empty_tar, OF_SHARD, 0),
]
PACKED = [
    (truncate, OF_SHARD[2:], 3),
    (truncate_in_header, OF_SHARD[3:], 2),
    (flip_data, OF_SHARD[1:2], 1),
    (flip_header, [], 0),  # found by its offset
    (empty_file, OF_SHARD, 5),
    (noise, OF_SHARD, 5),
    (Path.unlink, OF_SHARD, 5),
]


def report(stream, max_dropped=1.0, world=ALONE):
    return StreamReport({"source": stream}, max_dropped, world)


@pytest.mark.parametrize(("make", "damage", "gone", "told"), [
    *((foreign, *case) for case in FOREIGN), *((packed, *case) for case in PACKED),
])  # fmt: skip
@pytest.mark.parametrize(("workers", "cache_bytes"), [(0, 1 << 20), (1, 0)])
def test_what_is_readable_comes_and_what_is_not_is_counted(tmp_path, make, damage, gone, told, workers, cache_bytes):
    folder = make(tmp_path / "set")
    damage(folder / SHARD)
    stream = stream_of(folder, tmp_path / "cache", workers=workers, cache_bytes=cache_bytes)
    numbers = served(stream)
    assert set(numbers) == set(range(COUNT)) - set(gone)
    assert len(numbers) == stream.len
    counts = report(stream).check()
    assert counts == ({"source": {SHARD: told}} if told else {})
    again = stream_of(folder, tmp_path / "cache")
    assert served(again, batch=7) == numbers  # by another split, without workers, from the kept index


@pytest.mark.parametrize("damage", [truncate, flip_data, flip_header, empty_file, Path.unlink])
@pytest.mark.parametrize("make", [packed, foreign])
def test_positions_do_not_shift(tmp_path, make, damage):
    """Of a set that was open before, also where only the tars' headers tell what is in them."""
    folder = make(tmp_path / "set")
    spec = f"{folder}/shard-{{000000..000003}}.tar" if make is foreign else folder
    whole = served(stream_of(spec, tmp_path / "cache"), count=3 * COUNT)
    damage(folder / SHARD)
    stream = stream_of(spec, tmp_path / "cache")
    damaged = served(stream, count=3 * COUNT)
    dropped = set(np.flatnonzero(stream.dropped).tolist())
    assert stream.len == COUNT and dropped <= set(OF_SHARD)
    assert len(dropped) == {truncate: 3, flip_data: 1, flip_header: 0, empty_file: 5, Path.unlink: 5}[damage]
    for before, now in zip(whole, damaged, strict=True):
        assert now == before if before not in dropped else now not in dropped


def test_neighbours_get_different_substitutes(tmp_path):
    folder = packed(tmp_path / "set")
    (folder / SHARD).unlink()
    stream = stream_of(folder)
    substitutes = {stream._substitute(index) for index in OF_SHARD}
    assert len(substitutes) == EACH
    assert np.bincount(served(stream), minlength=COUNT).max() == 2


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_shard_that_vanishes_while_the_run_reads_it(tmp_path, monkeypatch, cache_bytes):
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 0)  # else its open file outlives it
    monkeypatch.setattr(WindowedSamples, "_ROWS", 1)
    folder = packed(tmp_path / "set")
    whole = served(stream_of(folder))
    stream = stream_of(folder, cache_bytes=cache_bytes)
    first = served(stream, count=8)
    (folder / SHARD).unlink()
    rest = served(stream, 8, COUNT - 8)
    assert first == whole[:8]
    kept = [number for number in whole[8:] if number not in OF_SHARD]
    assert [number for number, before in zip(rest, whole[8:], strict=True) if before not in OF_SHARD] == kept
    assert not set(rest) & set(OF_SHARD) - set(first)
    expected = set(range(COUNT)) - (set(OF_SHARD) - set(first) if cache_bytes else set(OF_SHARD))
    assert set(served(stream, COUNT, 10 * COUNT)) >= expected
    assert set(served(stream, 11 * COUNT)) == expected
    assert report(stream).check() == {"source": {SHARD: COUNT - len(expected)}}


def test_labels_are_the_substitutes_own(tmp_path):
    write_shards(tmp_path / "set", map(picture, range(COUNT)), EACH, labels=range(COUNT))
    truncate(tmp_path / "set" / SHARD)
    stream = stream_of(tmp_path / "set", cache_bytes=0)
    flip(tmp_path / "set/shard-000002.tar", stream.shards.shards[2].offsets[1] + 300)
    labels = stream.labels(range(COUNT)).tolist()  # asked for first
    assert labels == served(stream)
    dropped = set(np.flatnonzero(stream.dropped).tolist())
    assert len(dropped) >= 3 and 11 in dropped and not dropped & set(labels)


def test_too_many_drops_stop_with_the_list(tmp_path):
    folder = packed(tmp_path / "set")
    truncate(folder / SHARD)
    flip_data(folder / "shard-000003.tar")
    stream = stream_of(folder)
    told = report(stream, max_dropped=0.2)
    assert told.check() == {"source": {SHARD: 3}}
    served(stream)
    assert told.check() == {"source": {SHARD: 3, "shard-000003.tar": 1}}
    with pytest.raises(InputError, match=r"4 of 20 samples .* data\.max_dropped = 0\.19 .*000001\.tar \(3\), .* \(1\)"):
        report(stream, max_dropped=0.19).check()


def test_ranks_count_their_drops_together_and_stop_together(tmp_path):
    folder = packed(tmp_path / "set")
    flip_data(folder / SHARD)
    flip_data(folder / "shard-000002.tar")
    mine = stream_of(folder)
    served(mine)
    theirs = torch.from_numpy(mine.dropped.astype(np.int32))

    class Pair:
        """Two ranks of which this one has seen nothing."""

        device = torch.device("cpu")
        any = staticmethod(lambda flag: True)
        sum = staticmethod(lambda values: values + theirs)

    blind = stream_of(folder)
    assert report(blind, world=Pair).check() == {"source": {SHARD: 1, "shard-000002.tar": 1}}
    with pytest.raises(InputError, match="2 of 20"):
        report(blind, max_dropped=0.05, world=Pair).check()


def test_each_damaged_shard_is_told_once(tmp_path, capsys):
    folder = packed(tmp_path / "set")
    truncate(folder / SHARD)
    flip_data(folder / "shard-000002.tar")
    stream = stream_of(folder, workers=1)
    told = report(stream)
    for epoch in range(3):
        served(stream, epoch * COUNT)
        line = told(10.0)
    assert line["dropped_samples"] == {"source": {SHARD: 3, "shard-000002.tar": 1}}
    assert 0 <= line["data_wait_share"] < 1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "shard-000001.tar is damaged (truncated" in warnings[0]
    assert "shard-000002.tar is damaged" in warnings[1] and "cannot be decoded" in warnings[1]


def test_a_set_without_samples_is_an_error(tmp_path):
    for tars in ({}, {"a.tar": bytes(10240)}, {"a.tar": b"", "b.tar": b""}):
        folder = tmp_path / f"set{len(tars)}"
        folder.mkdir()
        for name, data in tars.items():
            (folder / name).write_bytes(data)
        with pytest.raises(InputError, match=r"no \.tar shards|hold no jfif"):
            stream_of(folder, tmp_path / "cache")


def test_two_samples_of_one_key_keep_the_first(tmp_path):
    folder = foreign(tmp_path / "set")
    doubled_keys(folder / SHARD)
    stream = stream_of(folder, tmp_path / "cache")
    assert set(served(stream)) == set(range(COUNT)) - set(OF_SHARD[1:])
    assert "share the key 'same'" in stream.shards.faults[SHARD]


def failing(function, error, times):
    """``function``, that raises ``error`` the first ``times`` times."""
    left = [error] * times

    def call(*args):
        if left:
            raise left.pop()
        return function(*args)

    return call


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_disk_that_fails_once_costs_no_sample(tmp_path, monkeypatch, cache_bytes):
    stream = stream_of(packed(tmp_path / "set"), cache_bytes=cache_bytes)
    for number in (errno.EIO, errno.ESTALE):
        monkeypatch.setattr("os.pread", failing(os.pread, OSError(number, os.strerror(number)), 1))
        assert sorted(served(stream)) == list(range(COUNT))
    assert not stream.dropped.any()


def test_a_disk_that_fails_twice_costs_the_sample(tmp_path, monkeypatch):
    stream = stream_of(packed(tmp_path / "set"))
    monkeypatch.setattr("os.pread", failing(os.pread, OSError(errno.EIO, os.strerror(errno.EIO)), 2))
    served(stream)
    assert stream.dropped.sum() == 1


@pytest.mark.parametrize(("patched", "error", "says"), [
    ("os.pread", OSError(errno.EMFILE, "Too many open files"), "shard-00000.*: Too many open files"),
    ("os.pread", OSError(errno.ENOMEM, "Cannot allocate memory"), "shard-00000.*: Cannot allocate memory"),
    ("rdmd_fast.data.shards.sample_reader.decode_rgb", MemoryError(), "not enough memory"),
])  # fmt: skip
def test_what_the_machine_lacks_is_no_fault_of_a_sample(tmp_path, monkeypatch, patched, error, says):
    stream = stream_of(packed(tmp_path / "set"))
    original = sample_reader.decode_rgb if "decode" in patched else os.pread
    monkeypatch.setattr(patched, failing(original, error, 1))
    with pytest.raises(type(error)) as raised:
        served(stream)
    assert re.search(says, describe_system_error(raised.value))
    assert not stream.dropped.any() and sorted(served(stream)) == list(range(COUNT))


def test_strict_opening_refuses_what_training_tolerates(tmp_path):
    for number, damage in enumerate((truncate, flip_header, empty_file)):
        folder = foreign(tmp_path / f"set{number}")
        damage(folder / SHARD)
        with pytest.raises(InputError, match=SHARD):
            ShardSet(folder)


def test_a_run_tells_its_drops_and_stops_when_they_are_too_many(tmp_path, capsys, monkeypatch):
    folder = packed(tmp_path / "set")
    flip_data(folder / SHARD)
    network = "network={kind: song_unet, model_channels: 8, channel_mult: [1], num_blocks: 1, attn_resolutions: []}"
    common = ["--config", str(CONFIGS / "digits/teacher_3.yaml"), f"data.target={folder}", network]
    common += ["train.steps=6", "train.global_batch_size=10", "telemetry.log_every=2", "telemetry.tensorboard=false"]
    common += ["telemetry.sample_count=1"]  # the picture is read before training
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, kept = set(children.read_text().split()), []
    open_stream = domain.open_stream
    monkeypatch.setattr(domain, "open_stream", lambda *args: kept.append(open_stream(*args)) or kept[-1])
    assert main([*common, f"run_dir={tmp_path}/run", "data.max_dropped=0.05", "data.workers=1"]) == 0
    assert kept and set(children.read_text().split()) <= before  # its worker has ended, whoever holds the stream
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["dropped_samples"] for line in lines] == [{"target": {SHARD: 1}}] * 3
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    truncate(folder / "shard-000003.tar")  # known at opening
    capsys.readouterr()
    assert main([*common, f"run_dir={tmp_path}/cut", "data.max_dropped=0.05"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.target") and "3 of 20 samples cannot be read" in error
    assert "shard-000003.tar (3)" in error and not list((tmp_path / "cut").glob("metrics*"))
    assert main([*common, f"run_dir={tmp_path}/run", "train.steps=20", "data.max_dropped=0.19"]) == 2
    assert "4 of 20 samples" in capsys.readouterr().err.splitlines()[-1]  # met while training
    other = packed(tmp_path / "other")
    monkeypatch.setattr("os.pread", failing(os.pread, OSError(errno.ENFILE, "Too many open files in system"), 99))
    assert main([*common, f"run_dir={tmp_path}/full", f"data.target={other}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(".tar: Too many open files in system")
