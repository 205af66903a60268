"""Decoding workers: fresh small processes that end with their parent, leave signals to it and are no one's loss."""

import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import material
import numpy as np
import pytest
from material import encoded, write_shards

from rdmd_fast.data.cache import worker_pool
from rdmd_fast.data.cache.decoder import Decoder
from rdmd_fast.data.cache.shared_memory import private_store
from rdmd_fast.data.cache.worker_pool import WorkerPool
from rdmd_fast.data.cache.worker_process import TASK_SAMPLES
from rdmd_fast.data.shards.sample_reader import GOOD, SampleReader
from rdmd_fast.data.shards.shard_set import ShardSet

sys.path.insert(0, str(Path(__file__).parent.parent))
from damaged import COUNT, packed, picture, served, stream_of, write_tar


@pytest.fixture
def folder(tmp_path):
    return packed(tmp_path / "set")


@pytest.fixture
def expected(folder):
    return served(stream_of(folder))


def children():
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def mapped(pid):
    return Path(f"/proc/{pid}/maps").read_text()


def held():
    """(open descriptors, maps of tables and stores)."""
    return len(os.listdir("/proc/self/fd")), mapped(os.getpid()).count("rdmd_fast-")


def decoder_of(folder, workers):
    shards = ShardSet(folder)
    return Decoder(shards, private_store(len(shards), shards.shape, np.uint8), workers)


def all_by_workers(decoder):
    """Have every sample decoded without lending a hand; whether they are done in time."""
    decoder.submit([(index, index) for index in range(len(decoder._shards))])
    return wait_for(lambda: decoder.poll() or (decoder._store.status == GOOD).all())


def test_workers_load_no_more_than_reading_takes(folder):
    before = children()
    decoder = decoder_of(folder, 2)
    assert all_by_workers(decoder)
    workers = children() - before
    assert len(workers) == 2
    assert "libtorch" in mapped(os.getpid())
    maps = [mapped(pid) for pid in workers]
    assert any("_imaging" in text for text in maps)  # on a busy machine one of them may have done all the work
    assert not any("libtorch" in text or "numpy" in text for text in maps)
    pixels = np.stack([decoder._shards.read(index) for index in range(COUNT)])
    np.testing.assert_array_equal(decoder._store.samples, pixels)
    decoder.close()


def test_workers_decode_arrays(tmp_path):
    points = np.random.default_rng(0).normal(size=(40, 3, 2, 2)).astype(np.float32)
    shards = ShardSet(write_shards(tmp_path / "set", points, 16))
    decoder = Decoder(shards, private_store(40, shards.shape, np.float32), 1)
    assert all_by_workers(decoder)
    np.testing.assert_array_equal(decoder._store.samples, points)


def test_a_table_says_what_its_reader_knew(folder):
    shards = ShardSet(folder)
    descriptor = shards.reader.to_descriptor()
    copy = SampleReader.from_descriptor(descriptor)
    os.close(descriptor)
    assert copy.shape == shards.shape and copy.kind == "image"
    assert all(copy.read(index) == shards.reader.read(index) for index in range(COUNT))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_until_workers_are_ready_samples_are_decoded_in_line(folder, expected, monkeypatch, cache_bytes):
    monkeypatch.setattr(worker_pool, "_PROGRAM", "import time; time.sleep(60)")
    stream = stream_of(folder, workers=2, cache_bytes=cache_bytes)
    assert served(stream) == expected
    stream.close()


def test_more_tasks_than_the_queue_holds_are_done(tmp_path):
    write_tar(tmp_path / "a.tar", range(16))
    shards, rows = ShardSet(tmp_path, cache_dir=tmp_path / "cache"), 16 * 400
    decoder = Decoder(shards, private_store(rows, shards.shape, np.uint8), 2)
    tickets = set()
    for row in range(0, rows, 16):  # 800 records of 256 bytes in a pipe of 64 KiB
        pairs = [(index, row + index) for index in range(16)]
        tickets |= set(decoder.submit(pairs).values())
    assert len(tickets) == 400 * -(-16 // TASK_SAMPLES)
    decoder.wait(tickets)
    assert (decoder._store.status == GOOD).all()
    assert (decoder._store.samples[:, 0, 0, 0].reshape(400, 16) == np.arange(16)).all()
    decoder.close()


def test_who_waits_keeps_the_queue_full(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", range(2))
    monkeypatch.setattr(worker_pool, "_PROGRAM", "import time; time.sleep(60)")
    shards, rows = ShardSet(tmp_path, cache_dir=tmp_path / "cache"), 2 * 400
    decoder = Decoder(shards, private_store(rows, shards.shape, np.uint8), 1)
    tickets = {ticket for row in range(0, rows, 2) for ticket in decoder.submit([(0, row), (1, row + 1)]).values()}
    sent, put = [], decoder._pool.put
    monkeypatch.setattr(decoder._pool, "put", lambda ticket, pairs: put(ticket, pairs) and not sent.append(ticket))
    unsent = list(decoder._unsent)
    assert unsent
    decoder.wait(tickets)
    assert sent == unsent and (decoder._store.status == GOOD).all()
    decoder.close()


def test_a_start_that_fails_is_told_and_made_up_for(folder, expected, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = children()
    stream = stream_of(folder, workers=2)
    assert served(stream) == expected and children() == before
    error = capfd.readouterr().err.splitlines()
    assert error == ["warning: no decoding worker could be started (No such file or directory), decoding in line"]


def test_a_start_that_fails_half_way_leaves_nothing_open(folder, monkeypatch):
    pipe, calls = os.pipe2, []

    def second_pipe_fails(flags):
        calls.append(flags)
        if len(calls) == 2:
            raise OSError(24, "Too many open files")
        return pipe(flags)

    def no_table(reader):
        raise OSError(24, "Too many open files")

    shards = ShardSet(folder)
    store = private_store(COUNT, shards.shape, np.uint8)
    before = held()
    for patched, name, failure in ((SampleReader, "to_descriptor", no_table), (os, "pipe2", second_pipe_fails)):
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, failure)
            with pytest.raises(OSError, match="Too many open files"):
                WorkerPool(shards.reader, store, 1)
        assert held() == before


def test_paths_that_are_no_texts_stop_no_worker(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/somewhere")])
    decoder = decoder_of(folder, 1)
    assert all_by_workers(decoder)
    decoder.close()


def test_reports_come_through_descriptors_of_any_number(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        decoder = decoder_of(folder, 1)
        tickets = decoder.submit([(0, 0)])
        assert decoder._pool._reports >= 1024
        found = []
        assert wait_for(lambda: found.extend(decoder._pool.reports(0.1)) or found)
        assert found == [(tickets[0], 0, None)]
        decoder.close()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_worker_lacks_is_made_up_for(folder, monkeypatch, capfd):
    lacking = "import os; os.pread = lambda *where: (_ for _ in ()).throw(OSError(24, 'Too many open files')); main("
    monkeypatch.setattr(worker_pool, "_PROGRAM", worker_pool._PROGRAM.replace("main(", lacking))
    decoder = decoder_of(folder, 1)
    assert all_by_workers(decoder) and not decoder.faults  # in line, once the worker is found dead
    error = capfd.readouterr().err
    assert "shard-000000.tar: Too many open files" in error and "died (status 1" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_workers_that_die_at_once_are_given_up(folder, expected, monkeypatch, capfd, cache_bytes):
    monkeypatch.setattr(worker_pool, "_PROGRAM", "raise SystemExit(3)")
    stream = stream_of(folder, workers=2, cache_bytes=cache_bytes)
    numbers = []
    for _ in range(4):
        numbers.append(served(stream, 0, batch=2))
        time.sleep(0.1)
    assert numbers == [expected] * 4
    warnings = [line for line in capfd.readouterr().err.splitlines() if "a decoding worker died (status 3" in line]
    assert len(warnings) <= 3
    stream.close()


def killed(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: all(") Z " in Path(f"/proc/{pid}/stat").read_text() for pid in pids))


def test_a_worker_killed_with_work_in_its_hands_leaves_no_trace(folder, monkeypatch, capfd):
    monkeypatch.setattr("rdmd_fast.data.shards.shard_set._MAX_OPEN", 0)
    before, shard = children(), folder / "shard-000000.tar"
    decoder = decoder_of(folder, 2)
    shard.rename(folder / "aside")
    os.mkfifo(shard)  # whoever opens it waits
    tickets = decoder.submit([(index, index) for index in range(COUNT)])
    status = decoder._store.status
    assert wait_for(lambda: (status[15:] == GOOD).all() and decoder._pool.take() is None)
    assert not status[:TASK_SAMPLES].any()
    killed(children() - before)
    shard.unlink()
    (folder / "aside").rename(shard)
    decoder.wait(set(tickets.values()))
    assert (status == GOOD).all()
    assert "a decoding worker died (status -9" in capfd.readouterr().err
    decoder.submit([(0, 0)])
    assert len(children() - before) == 2  # new ones
    decoder.close()
    assert children() == before


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_killed_workers_leave_no_trace_in_a_stream(folder, expected, capfd, cache_bytes):
    before = children()
    stream = stream_of(folder, workers=3, cache_bytes=cache_bytes)
    numbers = served(stream, 0, 8)
    killed(children() - before)
    assert numbers + served(stream, 8, COUNT - 8) == expected
    if cache_bytes == 0:
        assert "a decoding worker died (status -9" in capfd.readouterr().err
        assert len(children() - before) == 3
    stream.close()
    assert children() == before


def test_workers_end_when_all_is_decoded(folder, expected):
    before = children()
    stream = stream_of(folder, workers=2)
    assert served(stream, count=12, batch=2) == expected[:12] and len(children() - before) == 2
    assert served(stream, 12, 3 * COUNT - 12)[: COUNT - 12] == expected[12:]
    assert children() == before and stream._samples.complete


PARENT = """
import sys
from rdmd_fast.data.cache.decoder import Decoder
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.cache.shared_memory import private_store
shards = ShardSet(sys.argv[1])
decoder = Decoder(shards, private_store(len(shards), shards.shape, "uint8"), 3)
decoder.wait(set(decoder.submit([(index, index) for index in range(len(shards))]).values()))
print("ready", flush=True)
sys.stdin.read()
"""


def test_workers_end_with_a_parent_that_is_killed(fork_python, folder):
    parent = fork_python(PARENT, folder)
    assert parent.stdout.readline() == "ready\n"
    workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(workers) == 3 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_signals_are_left_to_the_parent(folder):
    before = children()
    decoder = decoder_of(folder, 2)
    decoder.submit([(0, 0)])
    workers = children() - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # from their first moment on
        for pid in workers:
            os.kill(pid, number)
    assert all_by_workers(decoder)
    assert children() - before == workers
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not blocked & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    decoder.close()


def test_many_streams_leave_no_process_descriptor_or_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rdmd_fast.data.cache.shared_memory.SHARED_FOLDER", tmp_path)
    gc.disable()  # closing must not count on it
    try:
        before, memory = children(), [held()]
        for _ in range(8):
            for options in ({"share": True}, {"cache_bytes": 0}):
                stream = stream_of(folder, workers=1, **options)
                kept = [served(stream, count=8), stream]
                assert len(children() - before) == 1
                stream.close()
                stream.close()  # twice does no harm
                assert stream.dropped.sum() == 0  # what the last line of metrics asks for
                assert children() == before, kept
            memory.append(held())
            assert [path.name for path in tmp_path.glob("rdmd_fast*")] == [f"rdmd_fast-{os.getuid()}-lock"]
            del stream, kept
        assert len(set(memory)) == 1
    finally:
        gc.enable()


def test_a_fork_of_the_parent_ends_nothing(folder, expected):
    stream = stream_of(folder, workers=1)
    first = served(stream, count=4)
    before = children()
    subprocess.run(["true"], check=True)
    pid = os.fork()
    if pid == 0:
        stream._samples.decoder._pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert children() == before
    assert first + served(stream, 4, COUNT - 4) == expected
    stream.close()


def test_formats_of_all_kinds_come_alike_from_workers(tmp_path):
    forms = enumerate([("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")] * 4)
    material.write_tar(tmp_path / "a.tar", {f"{i}.{name}": encoded(picture(i), form) for i, (form, name) in forms})
    decoder = decoder_of(tmp_path, 1)
    assert all_by_workers(decoder)
    pixels = np.stack([decoder._shards.read(index) for index in range(12)])
    np.testing.assert_array_equal(decoder._store.samples, pixels)
    decoder.close()
