"""Checkpoints on disk: killed or out of space at any operation, damaged in any file, kept and removed."""

import errno
import json
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from rdmd_fast.checkpoints import checkpoint, manifest
from rdmd_fast.checkpoints.checkpoint import TrainingState, find_checkpoint, save_checkpoint
from rdmd_fast.checkpoints.manifest import clear_leftovers, prune
from rdmd_fast.checkpoints.options import CheckpointOptions
from rdmd_fast.errors import InputError, WriteError
from rdmd_fast.processes.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Unwritable:
    """Stands in for a rank's tensors; what reads them while a checkpoint is written meets ``error``."""

    def __init__(self, error):
        self.error = error

    def keys(self):
        raise self.error


def save(run_dir, step, value=0.0, world=ALONE, tensors=None, **options):
    """A checkpoint without engines: a file a rank, of 12,000 bytes and some."""
    state = TrainingState({}, SimpleNamespace(engine=None, shards=[]), counters={"value": value})
    tensors = tensors or {"value": torch.full((3000,), value + world.rank)}
    return save_checkpoint(run_dir, step, state, tensors, {}, {}, world, CheckpointOptions(**options))


def find(run_dir, resume="auto"):
    """(the checkpoint that is found, what is said)."""
    said = []
    return find_checkpoint(run_dir, resume, ALONE, said.append), said


def value_of(folder):
    return manifest.read_manifest(folder)["counters"]["value"]


def hidden(run_dir):
    return [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]


# -- stopped at every operation ----------------------------------------------------------------------------------------

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def in_child(action, ordinal, strike, writing_only):
    """Run ``action`` in a forked process, calling ``strike`` before its file operation number ``ordinal``.

    Returns the exit status: 0 if all went well, 2 after a WriteError of one line, -9 after SIGKILL; 3 if there were
    fewer operations.
    """
    pid = os.fork()
    if pid == 0:
        status, count = 1, 0

        def count_events(event, arguments):
            nonlocal count
            if event in EVENTS and not (writing_only and event == "open" and not arguments[2] & os.O_ACCMODE):
                count += 1
                if count == ordinal:
                    strike()

        try:
            import sys

            sys.addaudithook(count_events)
            action()
            status = 0 if count >= ordinal else 3
        except WriteError as error:
            status = 2 if "cannot be written" in str(error) and "\n" not in str(error) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("strike,expected", [(kill_self, -9), (no_space, 2)], ids=["killed", "full"])
@pytest.mark.parametrize("step", [2, 3], ids=["again", "next"])
def test_a_save_stopped_at_any_operation_leaves_a_whole_checkpoint(tmp_path, step, strike, expected):
    template = tmp_path / "template"
    save(template, 1, 1.0)
    save(template, 2, 2.0)
    statuses = []
    while 3 not in statuses:
        ordinal, run = len(statuses) + 1, tmp_path / f"run_{len(statuses)}"
        shutil.copytree(template, run)
        statuses.append(in_child(lambda run=run: save(run, step, 5.0, keep=1), ordinal, strike, strike is no_space))
        if strike is kill_self:
            clear_leftovers(run / "checkpoints")
        found, said = find(run)
        # Never an older one than before the save, and nothing that bears a checkpoint's name is damaged.
        assert value_of(found) in (2.0, 5.0), (ordinal, said)
        assert all(map(manifest.looks_whole, manifest.checkpoint_folders(run / "checkpoints"))), ordinal
        save(run, step + 1, 6.0)
        assert value_of(find(run)[0]) == 6.0 and hidden(run) == []
    # Some operations may fail without harm: making a folder that is there, removing what the next save removes.
    assert set(statuses) == ({expected, 3} if strike is kill_self else {0, 2, 3})
    assert statuses.count(expected) > 8, statuses


def test_a_full_disk_is_met_at_any_size(tmp_path, small_disk):
    """A file system that is full after any number of pages: the save succeeds, or the one before stays whole."""
    disk = small_disk(1024)
    save(disk, 1, 1.0)
    used = shutil.disk_usage(disk).used // 1024
    outcomes = []
    for room in range(0, 2 * used, 4):
        small_disk(used + room)
        try:
            save(disk, 2, 2.0, keep=1)
        except WriteError as error:
            assert "free some space" in str(error)
            outcomes.append(False)
            # Only the name in `latest` may be what no longer fitted.
            assert hidden(disk) == [] and value_of(find(disk)[0]) in (1.0, 2.0)
            continue
        outcomes.append(True)
        assert value_of(find(disk)[0]) == 2.0
        break
    assert len(outcomes) > 5 and outcomes == [False] * (len(outcomes) - 1) + [True]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_an_error_of_safetensors_is_one_of_writing(tmp_path, number):
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    save(tmp_path, 1, 1.0)
    with pytest.raises(WriteError, match=f"step_00000002: cannot be written .{os.strerror(number)}"):
        save(tmp_path, 2, tensors=Unwritable(SafetensorError(text)))
    assert hidden(tmp_path) == [] and value_of(find(tmp_path)[0]) == 1.0


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(IndexError):
        save(tmp_path, 1, tensors=Unwritable(IndexError()))


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(WriteError, match=r"takes 0\.0 MiB, 0\.0 MiB are free"):
        save(tmp_path, 2, tensors=Unwritable(AssertionError("written to")))
    assert hidden(tmp_path) == []


def test_all_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power failure leaves is not tested, but that fsync comes before each rename, and again after."""
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("renamed", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    final = save(tmp_path, 1)
    published = next(index for index, event in enumerate(events) if event[2:] == (str(final),))
    partial = events[published][1]
    before = {event[1].removeprefix(partial) for event in events[:published] if event[0] == "flushed"}
    names = [str(path.relative_to(final)) for path in final.rglob("*") if path.name != "manifest.json"]
    assert {re.sub("[0-9a-f]{16}", "*", name) for name in before} == {
        str(tmp_path), "", "/.rdmd-*.partial", *(f"/{name}" for name in names)
    }  # fmt: skip
    assert events[published + 1] == ("flushed", str(final.parent))
    latest = str(final.parent / "latest")
    assert Path(events[-3][-1]).parent == final.parent and Path(events[-3][-1]).name.startswith(".rdmd-")
    assert [event[-1] for event in events[-2:]] == [latest, str(final.parent)]


# -- damaged -----------------------------------------------------------------------------------------------------------

FILE = "ranks/00000.safetensors"


def remove(folder):
    (folder / FILE).unlink()


def truncate(folder):
    os.truncate(folder / FILE, 5000)


def flip_bit(folder, name=FILE, position=4321, bit=3):
    content = bytearray((folder / name).read_bytes())
    content[position] ^= 1 << bit
    (folder / name).write_bytes(content)


def of_another_step(folder):
    shutil.copyfile(folder.with_name("step_00000001") / FILE, folder / FILE)


def truncate_manifest(folder):
    os.truncate(folder / "manifest.json", 300)


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def edit_manifest(folder):
    values = json.loads((folder / "manifest.json").read_text())
    values["counters"]["value"] = 7.0
    (folder / "manifest.json").write_text(json.dumps(values))


def older_format(folder):
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 2, "files": {}}))


def folder_in_place_of_file(folder):
    remove(folder)
    (folder / FILE).mkdir()


DAMAGES = [
    (remove, f"{FILE} is missing"),
    (truncate, f"{FILE} has 5000 bytes instead of 1"),
    (flip_bit, f"{FILE} is not what was written"),
    (of_another_step, f"{FILE} is not what was written"),
    (folder_in_place_of_file, f"{FILE} "),
    (truncate_manifest, "manifest.json cannot be read"),
    (remove_manifest, "manifest.json is missing"),
    (edit_manifest, "manifest.json has changed"),
    (older_format, "format of manifest.json, 1, is older than the 2"),
]


@pytest.mark.parametrize("damage,reason", DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_by_name_of_the_damage(tmp_path, damage, reason):
    old, new = save(tmp_path, 1, 1.0), save(tmp_path, 2, 2.0)
    assert find(tmp_path) == (new, [])
    damage(new)
    found, said = find(tmp_path)
    assert found == old and len(said) == 1
    assert said[0].startswith(f"checkpoint {new} is passed over: ") and reason in said[0]
    with pytest.raises(InputError, match="not a complete checkpoint") as raised:
        find(tmp_path, str(new))
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert find(tmp_path, str(old)) == (old, [])


def test_any_bit_counts(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    chance = random.Random(0)
    for name in [*manifest.read_manifest(new)["files"], "manifest.json"]:
        whole = (new / name).read_bytes()
        for _ in range(40):
            flip_bit(new, name, position := chance.randrange(len(whole)), chance.randrange(8))
            found, said = find(tmp_path)
            # White space between a manifest's values may become other white space.
            assert (found == old and name in said[0]) or (name == "manifest.json" and whole[position] in b" \n"), said
            (new / name).write_bytes(whole)
    assert find(tmp_path)[0] == new


def test_a_run_does_not_start_over_beside_checkpoints_of_which_none_is_whole(tmp_path):
    for folder in [save(tmp_path, 1), save(tmp_path, 2)]:
        (folder / "ranks/00000.safetensors").unlink()
    message = "none of its 2 checkpoints is whole, mend one or start over with --resume never"
    with pytest.raises(InputError, match=message):
        find(tmp_path)
    assert find(tmp_path, "never") == (None, [])
    assert len(manifest.checkpoint_folders(tmp_path / "checkpoints")) == 2


@pytest.mark.parametrize("content,told", [
    (None, "is missing"), (b"", "is empty"), (b"\n", "is empty"), (b"step_00000009\n", "'step_00000009'"),
    (b"\xff\xfe", "cannot be read"), (b"a\0b", "which is not there"), (b"x" * 5000, "cannot be read"),
])  # fmt: skip
def test_latest_is_not_needed(tmp_path, content, told):
    newest = save(tmp_path, 1)
    latest = tmp_path / "checkpoints/latest"
    assert latest.read_text() == "step_00000001\n" and find(tmp_path) == (newest, [])
    latest.unlink() if content is None else latest.write_bytes(content)
    found, said = find(tmp_path)
    assert found == newest and len(said) == 1 and told in said[0]
    shutil.rmtree(newest)
    assert find(tmp_path)[0] is None


def test_the_newest_is_found_whatever_latest_says(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (tmp_path / "checkpoints/latest").write_text("step_00000001\n")
    assert find(tmp_path) == (newest, [])


@pytest.mark.parametrize(
    ("key", "value"), [("step", -1), ("counters", {"value": "a"}), ("engines", {"generator": {}}), ("world_size", 0)]
)
def test_whole_manifest_that_does_not_hold_what_is_read_is_passed_over(tmp_path, key, value):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    content = manifest.read_manifest(newer)
    manifest.write_manifest(newer, content | {key: value}, content["files"])
    found, [said] = find(tmp_path)
    assert found == older and f"manifest.json does not hold what this version reads ({key}" in said


def test_pipe_in_place_of_a_file_is_not_read(tmp_path):
    folder = save(tmp_path, 1)
    content = manifest.read_manifest(folder)
    path = folder / "ranks/00000.safetensors"
    path.unlink()
    os.mkfifo(path)
    content["files"]["ranks/00000.safetensors"]["size"] = 0
    manifest.write_manifest(folder, content, content["files"])
    with pytest.raises(InputError, match="is no regular file"):
        find(tmp_path, str(folder))


# -- kept and removed --------------------------------------------------------------------------------------------------


def steps(run_dir):
    return sorted(manifest.step_of(path) for path in (run_dir / "checkpoints").glob("step_*"))


def test_the_newest_and_every_nth_are_kept(tmp_path):
    for step in range(0, 11):
        save(tmp_path, step, keep=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9, 10] and hidden(tmp_path) == []


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    remove(tmp_path / "checkpoints/step_00000003")
    prune(tmp_path / "checkpoints", 1, 0)
    assert steps(tmp_path) == [2, 3]  # a newer one may be of use to somebody, and is told of at every resume
    save(tmp_path, 4, keep=1)
    assert steps(tmp_path) == [4]


def test_nothing_is_removed_where_nothing_is_whole(tmp_path):
    for folder in [save(tmp_path, step) for step in (1, 2)]:
        remove(folder)
    prune(tmp_path / "checkpoints", 1, 0)
    assert steps(tmp_path) == [1, 2]


def test_leftovers_of_killed_saves_go_and_what_was_to_be_replaced_comes_back(tmp_path):
    save(tmp_path, 1, 1.0)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step_00000001", root / ".step_00000002.ab12.partial")
    shutil.copytree(root / "step_00000001", root / ".step_00000001.retired")
    os.replace(save(tmp_path, 3, 3.0), root / ".step_00000003.retired")
    shutil.copytree(root / "step_00000001", root / ".step_00000004.retired")
    remove(root / ".step_00000004.retired")
    (root / "notes").mkdir()
    clear_leftovers(root)
    assert steps(tmp_path) == [1, 3] and hidden(tmp_path) == [] and (root / "notes").exists()
    assert value_of(find(tmp_path)[0]) == 3.0


# -- several ranks -----------------------------------------------------------------------------------------------------


class ThreadWorld(World):
    """Ranks as threads, in place of processes: ``meeting`` is their barrier and what they hand over."""

    def gather(self, value):
        barrier, values = self.host_group
        values[self.rank] = value
        barrier.wait(30)
        gathered = list(values)
        barrier.wait(30)
        return gathered

    def broadcast(self, value):
        return self.gather(value)[0]


def on_threads(count, action):
    """What ``action(world)`` returns or raises on each rank."""
    meeting, results = (threading.Barrier(count), [None] * count), [None] * count

    def work(rank):
        try:
            results[rank] = action(ThreadWorld(rank, count, torch.device("cpu"), meeting))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_write_and_verify_together(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints/step_00000001"
    assert on_threads(3, lambda world: save(tmp_path, 1, 1.0, world)) == [folder] * 3
    names = [f"ranks/0000{rank}.safetensors" for rank in range(3)]
    assert list(manifest.read_manifest(folder)["files"]) == names
    read, check = [], checkpoint.check_hashes

    def record(folder, files):
        read.append(list(files))
        check(folder, files)

    monkeypatch.setattr(checkpoint, "check_hashes", record)
    assert on_threads(3, lambda world: find_checkpoint(tmp_path, "auto", world, list)) == [folder] * 3
    assert sorted(read) == [[name] for name in names]
    for name in names:
        flip_bit(folder, name)
        results = on_threads(3, lambda world: find_checkpoint(tmp_path, str(folder), world, list))
        assert all(isinstance(error, InputError) and name in str(error) for error in results), results
        flip_bit(folder, name)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_disk_that_is_full_for_one_rank_fails_the_save_of_all(tmp_path, failing):
    on_threads(3, lambda world: save(tmp_path, 1, 1.0, world))
    full = Unwritable(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    results = on_threads(3, lambda world: save(tmp_path, 2, 2.0, world, full if world.rank == failing else None))
    assert all(isinstance(error, WriteError) for error in results) and len({str(error) for error in results}) == 1
    assert "No space left on device" in str(results[0])
    assert hidden(tmp_path) == [] and value_of(find(tmp_path)[0]) == 1.0
