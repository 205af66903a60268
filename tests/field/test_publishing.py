"""What the program leaves on a disk: whole or not at all, for whom the umask says, under any name, through any link."""

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import signal
import stat
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import as_another, pack, write_pictures
from PIL import Image
from safetensors.torch import save_file

from rdmd_fast import files
from rdmd_fast.checkpoints.checkpoint import TrainingState, find_checkpoint, save_checkpoint
from rdmd_fast.checkpoints.manifest import set_aside_newer
from rdmd_fast.checkpoints.options import CheckpointOptions
from rdmd_fast.data.packing import shard_writer
from rdmd_fast.data.packing.shard_writer import ShardWriter
from rdmd_fast.data.shards.remote import fetch_shard
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError
from rdmd_fast.metrics.feature_extractor import load_extractor
from rdmd_fast.model_files.edm_pickle import read_edm_pickle
from rdmd_fast.model_files.export_format import ExportConfig, check_replaceable, read_export, write_export
from rdmd_fast.processes.run_lock import run_lock
from rdmd_fast.processes.world import World
from rdmd_fast.translation.outputs import Outputs

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = ExportConfig.model_validate(
    {
        "role": "teacher", "sample_shape": [2], "diffusion": {}, "network": {"kind": "mlp", "hidden": 32, "depth": 2},
    }
)  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
LONG = "ä" * 127  # 254 bytes


def export(folder, value=1.0):
    write_export(folder, CONFIG, {"weight": torch.full((3,), float(value))})
    return folder


def value_of(folder):
    return float(read_export(folder, "teacher")[1]["weight"][0])


def checkpoint(run_dir, step, **options):
    state = TrainingState({}, SimpleNamespace(engine=None, shards=[]))
    return save_checkpoint(run_dir, step, state, {"a": torch.ones(3)}, {}, {}, ALONE, CheckpointOptions(**options))


def hidden(folder):
    return sorted(path.name for path in folder.rglob(".*"))


# -- names that are no Unicode -----------------------------------------------------------------------------------------

LATIN = os.fsdecode(b"M\xfcller")  # as an old zip has it


def strict_terminal(monkeypatch):
    """Standard output as Python opens it where the locale is UTF-8, until the test ends."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", output)
    return output.buffer


def test_a_name_that_is_no_unicode_does_not_cost_the_set_that_it_replaces(tmp_path, monkeypatch):
    terminal = strict_terminal(monkeypatch)
    photos, out = write_pictures(tmp_path / "photos", "a.png", "b.png"), tmp_path / "set"
    assert pack(photos, "--out", out, "--resolution", 8) == 0
    shutil.copy(photos / "a.png", photos / f"{LATIN}.png")
    shutil.copy(photos / "b.png", photos / "zwölf.png")
    words = [photos, "--out", out, "--resolution", 8]
    assert pack(*words, "--force") == 0
    # Sorted as Python does: what is no Unicode comes last.
    assert sorted(ShardSet(out).keys) == sorted(["a", "b", LATIN, "zwölf"])
    report = (out / "report.json").read_text(encoding="utf-8")
    assert sorted(map(sorted, json.loads(report)["duplicates"])) == [sorted(["a", LATIN]), ["b", "zwölf"]]
    assert r"M\udcfcller" in report and "zwölf" in report
    assert pack("--check", out) == 0 and pack(*words) == 0
    printed = terminal.getvalue().decode()
    assert f"{out}: already complete" in printed and r"M\udcfcller" in printed


def test_folders_whose_names_are_no_unicode(tmp_path, monkeypatch):
    strict_terminal(monkeypatch)
    photos, other = write_pictures(tmp_path / LATIN / "photos", "a.png", f"{LATIN}.png"), tmp_path / LATIN / "other"
    assert pack(photos, "--out", other, "--resolution", 8) == 0
    out = tmp_path / LATIN / "set"
    words = [photos, "--out", out, "--resolution", 8, "--other", other]
    assert pack(*words) == 0 and pack(*words) == 0 and pack(*words, "--force") == 0
    assert pack("--check", out, "--other", other) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert LATIN in manifest["command"]
    assert json.loads((out / "report.json").read_text())["in_other"]["folder"] == str(other)
    (out / "shard-000000.tar").unlink()
    assert pack(*words) == 0 and pack("--check", out) == 0
    (out / "shard-000000.tar").unlink()
    assert pack("--check", out) == 2


def test_what_is_written_for_a_run_takes_any_text(tmp_path):
    files.write_atomically(tmp_path / "a.json", json.dumps({LATIN: "λ"}, ensure_ascii=False))
    files.append_line(tmp_path / "a.jsonl", json.dumps({LATIN: "λ"}, ensure_ascii=False))
    for name in ("a.json", "a.jsonl"):
        assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == {LATIN: "λ"}
    write_export(tmp_path / LATIN, CONFIG, {"weight": torch.ones(3)}, card=f"trained on {LATIN}")
    assert (tmp_path / LATIN / "README.md").read_text() == r"trained on M\udcfcller"
    assert value_of(tmp_path / LATIN) == 1.0


# -- a set in the place of another, killed at any operation ------------------------------------------------------------


def write_set(folder, value):
    with ShardWriter(folder, {"value": value}, "test", 1, resume=True) as writer:
        for number in range(len(writer.records), 2 + (value == 1)):
            writer.begin_shard(number)
            writer.add(shard_writer.encode_sample(f"k{number}", np.full((8, 8, 3), value, np.uint8)))
            writer.finish_shard()
        writer.commit({"duplicates": []})


def killed_at(ordinal, action):
    """Whether a forked ``action()`` came to its file operation number ``ordinal``, at which it is killed."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def strike(event, arguments):
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir"):
                count += 1
                if count == ordinal:
                    os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            sys.addaudithook(strike)
            action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_commit_killed_at_any_operation_leaves_the_old_set_or_one_that_completes(tmp_path, monkeypatch):
    write_set(tmp_path / "old", 1)
    write_set(tmp_path / "new", 2)
    old, new = (contents(tmp_path / name) for name in ("old", "new"))
    shutil.copytree(tmp_path / "old", tmp_path / "begun")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(ShardWriter, "commit", None)
        write_set(tmp_path / "begun", 2)
    ordinal, seen = 1, set()
    while True:
        folder = tmp_path / f"{ordinal}"
        shutil.copytree(tmp_path / "begun", folder)
        if not killed_at(ordinal, lambda folder=folder: write_set(folder, 2)):
            break
        found = contents(folder)
        if "manifest.json" in found:  # readers take it for a whole set
            whole = [found | each for each in (old, new) if each["manifest.json"] == found["manifest.json"]]
            assert whole == [found], ordinal
            assert len(ShardSet(folder)) in (2, 3)
        seen.add(json.loads(found["manifest.json"])["content"]["value"] if "manifest.json" in found else None)
        write_set(folder, 2)
        assert contents(folder) == new, ordinal
        ordinal += 1
    assert seen == {1, 2, None} and ordinal > 15
    assert contents(folder) == new


def test_bad_input_after_a_commit_that_was_cut_short_keeps_its_shards(tmp_path, monkeypatch):
    write_set(tmp_path, 1)

    def cut_short(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(shard_writer, "rename_durably", cut_short)
        write_set(tmp_path, 2)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(InputError), ShardWriter(tmp_path, {"value": 2}, "test", 1, resume=True):
        raise InputError("something else is wrong")
    write_set(tmp_path, 2)
    assert {int(ShardSet(tmp_path).read(index)[0, 0, 0]) for index in range(2)} == {2}


# -- who may read it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_modes_are_what_the_umask_allows(tmp_path, umask):
    root = tmp_path / "root"
    before = os.umask(umask)
    try:
        export(root / "export")
        checkpoint(root / "run", 1)
        with run_lock(root / "run"):
            pass
        Outputs(root / "out/deep", "png", True).write("a", np.zeros((3, 8, 8)), np.zeros((8, 8, 3), np.uint8))
        write_set(root / "set", 1)
        fetch_shard("pipe:head -c 10240 /dev/zero", root / "cache", False)
    finally:
        os.umask(before)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (root, *root.rglob("*"))}
    assert modes == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
    names = {path.name for path in root.rglob("*")}
    assert {"teacher.safetensors", "manifest.json", "latest", ".lock", "a.png", "a.npy", "report.json"} <= names


def test_what_an_account_may_not_read_is_not_called_damaged(shared):
    folder, run = export(shared / "export"), shared / "run"
    newest = checkpoint(run, 1)
    weights = folder / "teacher.safetensors"
    told = f"permission denied: it may be read by root alone (mode 0600), let root run `chmod -R a+rX {weights}`"
    weights.chmod(0o600)
    assert as_another(lambda: read_export(folder, "teacher")) == f"InputError: {weights}: {told}"
    (folder / "config.json").chmod(0o640)
    for action in (lambda: read_export(folder, "teacher"), lambda: check_replaceable(folder)):
        line = as_another(action)
        assert line.startswith(f"InputError: {folder}/config.json: permission denied: it may be read by root and its")
    folder.chmod(0o700)
    line = as_another(lambda: read_export(folder, "teacher"))
    assert f"config.json: permission denied: {folder} may be read by root alone (mode 0700)" in line
    for name in ("ranks/00000.safetensors", "manifest.json"):
        (newest / name).chmod(0o600)
        for resume in ("auto", str(newest)):
            line = as_another(lambda resume=resume: find_checkpoint(run, resume, ALONE))
            assert line.startswith(f"InputError: {newest}/{name}: permission denied") and "whole" not in line
    (newest / "ranks").chmod(0o700)
    (newest / "manifest.json").chmod(0o644)
    assert f"{newest}/ranks may be read by root alone" in as_another(lambda: find_checkpoint(run, "auto", ALONE))
    (shared / "a.pkl").write_bytes(pickle.dumps(1))
    (shared / "a.pkl").chmod(0)
    for read in (read_edm_pickle, load_extractor, files.sha256_of, lambda path: files.read_text(path, 9)):
        assert "a.pkl: permission denied" in as_another(lambda read=read: read(shared / "a.pkl"))


def test_a_lock_is_taken_by_another_account_of_the_group(shared):
    run = shared / "run"
    run.mkdir()
    os.chown(run, -1, 54321)
    run.chmod(0o2775)

    def take():
        with run_lock(run):
            return (run / ".lock").read_text().split()[0] == str(os.getpid())

    before = os.umask(0o002)
    try:
        with run_lock(run):
            assert "another job is training in it" in as_another(take)
    finally:
        os.umask(before)
    assert as_another(take) == "True"
    (run / ".lock").chmod(0o644)
    line = as_another(take)
    assert line.startswith(f"InputError: run_dir {run}: its lock may be taken by root alone (mode 0644), let root run")
    run.chmod(0o755)
    assert "cannot be written (Permission denied)" in as_another(take)


# -- long names --------------------------------------------------------------------------------------------------------


def test_names_of_any_length_that_the_disk_takes(tmp_path):
    for content in ("old", "new"):
        files.write_atomically(tmp_path / "file" / LONG, content)
        Outputs(tmp_path / "out", "png", False).write("a" * 251, None, np.zeros((8, 8, 3), np.uint8))
        assert value_of(export(tmp_path / LONG, len(content))) == 3.0
    assert (tmp_path / "file" / LONG).read_text() == "new" and hidden(tmp_path) == []
    checkpoint(tmp_path / LONG / "run", 1)
    write_set(tmp_path / "sets" / LONG, 1)
    with pytest.raises(OSError, match="File name too long") as raised:
        files.write_atomically(tmp_path / (LONG * 2), "")
    assert raised.value.filename == str(tmp_path / (LONG * 2))


def test_long_addresses_have_a_place_in_the_cache(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a" * 251, "b" * 200):
        (tmp_path / "in" / f"{name}.tar").write_bytes(name.encode())
        path = fetch_shard(f"file://{tmp_path}/in/{name}.tar", tmp_path / "cache", False)
        assert path.read_bytes() == name.encode() and path.name.endswith(name[:100] + ".tar")


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, there):
    elsewhere = tmp_path / "elsewhere"
    for name in ("file", "image.png", "export"):
        (tmp_path / name).symlink_to(elsewhere / name)
    for name in ("out", "set"):
        (tmp_path / name).symlink_to(elsewhere / name)
    if there:
        (elsewhere / "out").mkdir(parents=True)
        (elsewhere / "set").mkdir()
        (elsewhere / "file").write_text("old")
        (elsewhere / "image.png").write_text("old")
        export(elsewhere / "export", 0.0)
    for value in (1, 2):
        files.write_atomically(tmp_path / "file", f"{value}")
        pixels = np.full((8, 8, 3), value, np.uint8)
        Outputs(tmp_path, "png", False).write("image", None, pixels)
        Outputs(tmp_path / "out", "png", False).write("image", None, pixels)
        write_set(tmp_path / "set", value)
        export(tmp_path / "export", value)
        assert (elsewhere / "file").read_text() == f"{value}" and value_of(elsewhere / "export") == value
        for folder in (elsewhere, elsewhere / "out"):
            assert np.asarray(Image.open(folder / "image.png"))[0, 0, 0] == value
        assert len(ShardSet(elsewhere / "set")) == {1: 3, 2: 2}[value]
    assert all((tmp_path / name).is_symlink() for name in ("file", "image.png", "export", "out", "set"))
    assert hidden(tmp_path) == []


def test_checkpoints_that_are_links(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    (run / "checkpoints").symlink_to(disk / "of_run")
    for step in (1, 2, 3):
        newest = checkpoint(run, step, keep=9)
    os.rename(newest, disk / "moved")
    newest.symlink_to(disk / "moved")
    (run / "checkpoints/latest").unlink()
    (run / "checkpoints/latest").symlink_to(newest.name)  # as people and other programs make it
    checkpoint(run, 3, keep=9)
    assert (run / "checkpoints/latest").read_text() == "step_00000003\n" and not newest.is_symlink()
    assert hidden(disk) == [] and (disk / "moved/manifest.json").exists()
    assert set_aside_newer(run, 1) == disk / "of_run.old"
    assert find_checkpoint(run, "auto", ALONE) == run / "checkpoints/step_00000001"


def test_pipes_and_devices_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    (tmp_path / "link").symlink_to("pipe")
    files.write_atomically(tmp_path / "link", "report")
    assert os.read(reader, 100) == b"report" and stat.S_ISFIFO((tmp_path / "link").stat().st_mode)
    os.close(reader)


# -- what is left, and what is on disk ---------------------------------------------------------------------------------


def test_leftovers_of_dead_writers_go_and_those_of_live_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_swept", set())
    dead = [tmp_path / f".rdmd-{number:016x}.partial" for number in range(2)]
    dead[0].write_text("half")
    dead[1].mkdir()
    (dead[1] / "weights").write_text("half")
    (tmp_path / ".rdmd-notes.partial").write_text("a person's own")
    ready, go = threading.Event(), threading.Event()

    def save(file):
        ready.set()
        assert go.wait(10)
        file.write(b"whole")

    writer = threading.Thread(target=files.replace_file, args=(tmp_path / "file", save))
    writer.start()
    assert ready.wait(10)
    with files.new_folder(tmp_path / "folder") as partial:
        files.remove_leftovers(tmp_path)
        (partial / "a").write_text("whole")
        assert len(hidden(tmp_path)) == 3
    go.set()
    writer.join()
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/a").read_text() == "whole"
    assert hidden(tmp_path) == [".rdmd-notes.partial"]


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    files.write_atomically(tmp_path / "file", "old")
    export(tmp_path / "export", 1.0)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_file(tmp_path / "file", fail)
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "export"):
        fail()
    assert (tmp_path / "file").read_text() == "old" and value_of(tmp_path / "export") == 1.0 and hidden(tmp_path) == []


@pytest.fixture
def events(monkeypatch):
    """fsync and rename as they come, by names."""
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return events


def test_content_then_name_then_folder_are_on_disk(tmp_path, events):
    folder = tmp_path / "new"
    files.write_atomically(folder / "file", "")
    assert events[0] == tmp_path.name and events[2:] == ["-> file", "new"]
    assert events[1].startswith(".rdmd-") and events[1].endswith(".partial")
    events.clear()
    export(folder / "export")
    named = events.index("-> export")
    assert {"teacher.safetensors", "config.json"} < set(events[:named]) and events[named + 1] == "new"
    events.clear()
    fetch_shard("pipe:head -c 10240 /dev/zero", folder, False)
    assert events[-2].startswith("-> ") and events[-1] == "pipes"


def test_pictures_cost_no_fsync(tmp_path, events):
    Outputs(tmp_path / "out", "png", True).write("a/b", np.zeros((3, 8, 8)), np.zeros((8, 8, 3), np.uint8))
    assert events == ["-> b.npy", "-> b.png"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EACCES])
def test_file_systems_without_fsync_of_folders(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint(tmp_path / "run", 1)
    write_set(tmp_path / "set", 1)
    assert find_checkpoint(tmp_path / "run", "auto", ALONE).name == "step_00000001" and len(ShardSet(tmp_path / "set"))


@pytest.mark.parametrize("folder", [True, False])
def test_failures_of_the_disk_itself_are_errors(tmp_path, monkeypatch, folder):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folder:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_atomically(tmp_path / "file", "")


# -- files that others have left ---------------------------------------------------------------------------------------


def test_pointers_of_git_lfs_are_named(tmp_path):
    folder = export(tmp_path / "export")
    (folder / "teacher.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"teacher.safetensors: is a Git LFS pointer .* run `git lfs pull`"):
        read_export(folder, "teacher")
    (folder / "config.json").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"config.json: is a Git LFS pointer"):
        read_export(folder, "teacher")
    for name, read in (("a.pkl", read_edm_pickle), ("a.pt", load_extractor)):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer .* `git lfs pull`"):
            read(tmp_path / name)
    save_file({"weight": torch.ones(3)}, tmp_path / "w")  # another program's file, 0600 or not, is read as ever
    shutil.move(tmp_path / "w", folder / "teacher.safetensors")
    export(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/config.json", folder)
    assert value_of(folder) == 1.0


class Squeezed(torch.nn.Module):
    def forward(self, images):
        return images.flatten(2)[:, :, :5].mean(1)[:, :, None, None].squeeze()


def test_a_feature_network_that_squeezes_a_last_batch_of_one(tmp_path):
    torch.jit.script(Squeezed()).save(str(tmp_path / "a.pt"))
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    features = load_extractor(tmp_path / "a.pt", batch_size=2)(images)
    expected = images.flatten(2)[:, :, :5].mean(1).double().numpy()
    assert features.shape == (3, 5) and np.allclose(features, expected, atol=1e-6)
