"""Resuming, repairing, workers and the report of ``rdmd pack``."""

import json
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from material import files_of, pack, png_of_size, random_pixels, save_images
from PIL import Image

from rdmd_fast import cli
from rdmd_fast.data.packing import shard_writer
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError

sys.path.insert(0, str(Path(__file__).parent.parent))
from damaged import flip


def textured(seed, side=24):
    return random_pixels(seed, side, side, 3)


def write_images(folder, count, side=24):
    return save_images(folder, {f"{i:03d}.png": textured(i, side) for i in range(count)})


def folder_bytes(folder, named=None):
    """Bytes of each file; the folder's own name in the command is replaced by ``named``."""
    found = files_of(folder)
    if named:
        found["manifest.json"] = found["manifest.json"].replace(folder.name.encode(), named.encode())
    return found


def report(folder):
    return json.loads((folder / "report.json").read_text())


# -- workers, kills and repairs ----------------------------------------------------------------------------------------


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    photos = write_images(tmp_path / "photos", 300)
    (photos / "100.png").write_bytes(b"x")
    for workers in (1, 3):
        words = ["--resolution", 8, "--shard-size", 70, "--workers", workers]
        assert pack(photos, "--out", tmp_path / f"by{workers}", *words) == 0
    one, three = (folder_bytes(tmp_path / f"by{workers}", "out") for workers in (1, 3))
    assert one == three
    assert [shard["count"] for shard in json.loads(one["manifest.json"])["shards"]] == [70, 69, 70, 70, 20]
    assert [entry["file"] for entry in report(tmp_path / "by3")["unreadable"]] == ["100.png"]


SLOW = """
import sys, time
from rdmd_fast import cli
from rdmd_fast.data.packing import pack_sets
load = pack_sets._load_chunk
def slow(*args):
    time.sleep(0.05)
    return load(*args)
pack_sets._load_chunk = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_packing_resumes_to_the_same_bytes(fork_python, tmp_path, capsys):
    photos, out = write_images(tmp_path / "photos", 400), tmp_path / "out"
    (photos / "010.png").write_bytes(b"x")
    words = ["pack", str(photos), "--out", str(out), "--resolution", "8", "--shard-size", "64"]
    killed = fork_python(SLOW, *words, "--workers", "1")
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.json.partial"))) < 3:
        assert killed.wait(0) is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    with pytest.raises(InputError, match="interrupted; run the same"):
        ShardSet(out)
    assert cli.main(["pack", "--check", str(out)]) == 2

    finished = {path.name: path.stat().st_ino for path in out.glob("shard-*.tar.partial")}
    assert 3 <= len(finished) < 7
    assert cli.main(words) == 0
    assert f"resumed, {len(finished)} of 7 shards" in capsys.readouterr().out
    assert all((out / name.removesuffix(".partial")).stat().st_ino == inode for name, inode in finished.items())
    os.rename(out, tmp_path / "resumed")
    assert cli.main(words) == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "resumed")


class KilledError(BaseException):
    pass


def interrupted(monkeypatch, words, shards):
    """Pack, but die once ``shards`` shards are finished."""
    finish = shard_writer.ShardWriter.finish_shard

    def dying(self, *args):
        finish(self, *args)
        if len(self.records) == shards:
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shard_writer.ShardWriter, "finish_shard", dying)
        pack(*words)


@pytest.mark.parametrize("change", ["source", "options", "shard", "record"])
def test_finished_shards_of_other_content_or_bytes_are_not_kept(tmp_path, monkeypatch, change):
    photos, out = write_images(tmp_path / "photos", 40), tmp_path / "out"
    words = [photos, "--out", out, "--shard-size", 10, "--resolution", 8]
    interrupted(monkeypatch, words, 2)
    first = out / "shard-000000.tar.partial"
    if change == "source":
        (photos / "000.png").unlink()
    elif change == "options":
        words[-1] = 12
    elif change == "shard":
        first.write_bytes(first.read_bytes()[:-1] + b"x")
    else:
        (out / "shard-000000.json.partial").write_text('{"identity": 3')
    assert pack(*words) == 0
    resumed = folder_bytes(out)
    assert pack(*words, "--force") == 0
    assert folder_bytes(out) == resumed
    assert pack("--check", out) == 0


def test_ctrl_c_keeps_finished_shards_and_ends_in_one_line(tmp_path, monkeypatch, capsys):
    photos, out = write_images(tmp_path / "photos", 40), tmp_path / "out"
    words = [photos, "--out", out, "--resolution", 8, "--shard-size", 10]
    begin = shard_writer.ShardWriter.begin_shard

    def stopped(self, number):
        if number == 2:
            raise KeyboardInterrupt
        begin(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "begin_shard", stopped)
        assert pack(*words) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert pack(*words) == 0
    assert "resumed, 2 of 4 shards" in capsys.readouterr().out


def test_what_a_kill_after_the_commit_leaves_is_removed(tmp_path):
    photos, out = write_images(tmp_path / "photos", 10), tmp_path / "out"
    pack(photos, "--out", out, "--resolution", 8)
    whole = folder_bytes(out)
    (out / "shard-000000.json.partial").write_text("{}")
    (out / "shard-000000.tar.tmp").write_text("")
    pack(photos, "--out", out, "--resolution", 8)
    assert folder_bytes(out) == whole


def test_an_interrupted_replacement_leaves_the_old_set_readable(tmp_path, monkeypatch):
    photos, out = write_images(tmp_path / "photos", 40), tmp_path / "out"
    assert pack(photos, "--out", out, "--shard-size", 10, "--resolution", 8) == 0
    interrupted(monkeypatch, [photos, "--out", out, "--shard-size", 10, "--resolution", 12, "--force"], 2)
    assert ShardSet(out).shape == (8, 8, 3)
    assert pack(photos, "--out", out, "--shard-size", 10, "--resolution", 12, "--force") == 0
    assert ShardSet(out).shape == (12, 12, 3) and not list(out.glob("*.partial"))


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    photos, out = write_images(tmp_path / "photos", 40), tmp_path / "out"
    words = [photos, "--out", out, "--shard-size", 10, "--resolution", 8]
    add = shard_writer.ShardFile.add

    def full(self, sample):
        if sample.key == "025":
            raise OSError(28, "No space left on device")
        add(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardFile, "add", full)
        assert pack(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and "run the same command again" in error
    assert pack(*words) == 0
    assert "resumed, 2 of 4 shards" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped"])
def test_a_missing_or_damaged_shard_of_a_complete_set_is_made_again(tmp_path, capsys, damage):
    photos, out = write_images(tmp_path / "photos", 200), tmp_path / "out"
    (photos / "010.png").write_bytes(b"x")
    words = [photos, "--out", out, "--resolution", 8, "--shard-size", 50]
    pack(*words)
    whole, kept = folder_bytes(out), (out / "shard-000002.tar").stat().st_ino
    for name in ("shard-000000.tar", "shard-000003.tar"):
        if damage == "deleted":
            (out / name).unlink()
        elif damage == "cut":
            os.truncate(out / name, 5000)
        else:
            flip(out / name, 5000)
    assert pack(*words) == 0
    assert "completed, 2 of 4 shards" in capsys.readouterr().out
    assert folder_bytes(out) == whole and (out / "shard-000002.tar").stat().st_ino == kept


def test_a_shard_that_cannot_be_made_again_alike_is_refused(tmp_path, capsys):
    photos, out = write_images(tmp_path / "photos", 20), tmp_path / "out"
    words = [photos, "--out", out, "--resolution", 8, "--shard-size", 10]
    pack(*words)
    (out / "shard-000001.tar").unlink()
    # The same size, so the listing does not tell.
    (photos / "010.bmp").write_bytes((photos / "010.png").read_bytes())
    os.replace(photos / "010.bmp", photos / "010.png")
    data = bytearray((photos / "015.png").read_bytes())
    data[-20] ^= 255
    (photos / "015.png").write_bytes(data)
    assert pack(*words) == 2
    assert "differs from what manifest.json says" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("shard*")) == ["shard-000000.tar"]


def test_a_lost_index_makes_the_set_again(tmp_path):
    photos, out = write_images(tmp_path / "photos", 20), tmp_path / "out"
    pack(photos, "--out", out, "--resolution", 8)
    whole = folder_bytes(out)
    (out / "index.json").unlink()
    assert pack(photos, "--out", out, "--resolution", 8) == 0
    assert folder_bytes(out) == whole


def test_two_packings_do_not_share_a_folder(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 3)
    with shard_writer.folder_lock(tmp_path / "out"):
        assert pack(photos, "--out", tmp_path / "out", "--resolution", 8) == 2
    assert "another `rdmd pack` is writing here" in capsys.readouterr().err
    assert pack(photos, "--out", tmp_path / "out", "--resolution", 8) == 0


def test_an_image_that_declares_billions_of_pixels_is_not_decoded(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 200, side=4)
    (photos / "bomb.png").write_bytes(png_of_size(60000, 60000, zlib.compress(bytes(1000))))
    assert pack(photos, "--out", tmp_path / "out", "--resolution", 4) == 0
    assert "bomb.png (Image size (3600000000 pixels) exceeds limit" in capsys.readouterr().err


def test_pipes_and_huge_files_are_unreadable_not_read(tmp_path, capsys, monkeypatch):
    photos = write_images(tmp_path / "photos", 200, side=4)
    os.mkfifo(photos / "pipe.png")
    assert pack(photos, "--out", tmp_path / "piped", "--resolution", 4) == 0
    assert "pipe.png (no regular file)" in capsys.readouterr().err
    (photos / "pipe.png").unlink()
    with open(photos / "huge.png", "wb") as file:
        file.truncate((1 << 30) + 1)
    assert pack(photos, "--out", tmp_path / "huge", "--resolution", 4) == 0
    assert "huge.png (has 1073741825 bytes" in capsys.readouterr().err


# -- the report --------------------------------------------------------------------------------------------------------


def photo(seed, tint=(90, 120, 80)):
    """A smooth picture of changing colours around a tint."""
    random = np.random.default_rng(seed)
    coarse = random.normal(0, 35, (4, 4, 3)) + random.normal(0, 12, 3) + np.array(tint)
    return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture
def mixed(tmp_path):
    """60 like pictures, two of them copies, one near-empty and one of another kind."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(60):
        photo(i).save(folder / f"p{i:02d}.png")
    (folder / "copy.png").write_bytes((folder / "p07.png").read_bytes())
    photo(8).save(folder / "same_pixels.bmp")
    Image.fromarray(np.uint8([[[90, 120, 80], [91, 121, 81]]]).repeat(16, 0).repeat(8, 1)).save(folder / "empty.png")
    page = np.full((32, 32, 3), 255, np.uint8)
    page[::6, 4:28] = 0
    Image.fromarray(page).save(folder / "page.png")
    return folder


def test_doubtful_images_are_reported_and_kept(mixed, tmp_path, capsys):
    assert pack(mixed, "--out", tmp_path / "out", "--resolution", 16) == 0
    found = report(tmp_path / "out")
    assert found["near_empty"] == ["empty"]
    assert found["duplicates"] == [["copy", "p07"], ["p08", "same_pixels"]]
    assert [entry["key"] for entry in found["unlike_the_rest"]] == ["page"]
    assert len(ShardSet(tmp_path / "out")) == 64
    output = capsys.readouterr().out
    assert "1 near-empty: empty" in output and "2 duplicates of others: copy = p07, p08 = same_pixels" in output
    assert "1 unlike the rest in colour: page" in output and "report.json" in output


def test_an_ordinary_set_gives_an_empty_report(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(150):
        photo(i).save(tmp_path / "photos" / f"{i}.png")
    pack(tmp_path / "photos", "--out", tmp_path / "out", "--resolution", 16)
    found = report(tmp_path / "out")
    assert [found[name] for name in ("unreadable", "near_empty", "duplicates", "unlike_the_rest")] == [[], [], [], []]
    assert "report.json" not in capsys.readouterr().out


def test_the_distance_is_what_the_report_says(mixed, tmp_path):
    """Against the statement in report.json, computed by numpy.histogram from the packed pixels."""
    pack(mixed, "--out", tmp_path / "out", "--resolution", 16)
    shards, found = ShardSet(tmp_path / "out"), report(tmp_path / "out")
    images = np.stack([shards.read(i) for i in range(len(shards))])
    bins = np.arange(0, 257, 32)
    shares = np.array([[np.histogram(image[..., c], bins)[0] / 256 for c in range(3)] for image in images])
    distance = np.abs(shares - np.median(shares, axis=0)).sum(axis=2).mean(axis=1) / 2
    limit = np.median(distance) + 6 * 1.4826 * np.median(np.abs(distance - np.median(distance)))
    expected = {shards.keys[i]: round(float(distance[i]), 4) for i in np.flatnonzero(distance > limit)}
    assert expected.pop("empty") > limit  # listed as near-empty already
    assert {entry["key"]: entry["distance"] for entry in found["unlike_the_rest"]} == pytest.approx(expected)
    assert "6 x 1.4826 x MAD" in found["statistic"] and "8-bin" in found["statistic"]


def test_images_of_both_domains_are_reported(tmp_path, capsys):
    cats, dogs = write_images(tmp_path / "cats", 30), tmp_path / "dogs"
    save_images(dogs, {f"d{i}.png": textured(i) for i in range(28, 60)}, compress_level=1)
    pack(cats, "--out", tmp_path / "A", "--resolution", 24)
    assert pack(dogs, "--out", tmp_path / "B", "--resolution", 24, "--other", tmp_path / "A") == 0
    both = {"folder": str(tmp_path / "A"), "samples": [["d28", ["028"]], ["d29", ["029"]]]}
    assert report(tmp_path / "B")["in_other"] == both
    assert "2 also in" in capsys.readouterr().out
    # A set that is complete already is compared too.
    assert pack(cats, "--out", tmp_path / "A", "--resolution", 24, "--other", tmp_path / "B") == 0
    assert [key for key, _ in report(tmp_path / "A")["in_other"]["samples"]] == ["028", "029"]
    assert pack("--check", tmp_path / "A", "--other", tmp_path / "B") == 0
    assert "028 = d28" in capsys.readouterr().out
    pack(cats, "--out", tmp_path / "small", "--resolution", 8)
    assert pack("--check", tmp_path / "A", "--other", tmp_path / "small") == 2
    assert "pack both at one resolution" in capsys.readouterr().err


def test_arrays_are_reported_without_colours(tmp_path):
    latents = np.random.default_rng(0).normal(size=(40, 4, 2, 2)).astype(np.float32)
    latents[5], latents[9] = latents[6], 0.5
    np.save(tmp_path / "latents.npy", latents)
    pack(tmp_path / "latents.npy", "--out", tmp_path / "out")
    found = report(tmp_path / "out")
    assert found["duplicates"] == [["latents_0000005", "latents_0000006"]]
    assert (found["near_empty"], found["unlike_the_rest"]) == (["latents_0000009"], [])
