"""``rdmd pack --check`` against each kind of damage."""

import hashlib
import json
import os

import numpy as np
import pytest
from material import encoded, error_line, pack, random_pixels, write_shards, write_tar


def check(*words):
    return pack("--check", *words)


def images(count, seed=0):
    return random_pixels(seed, count, 8, 8, 3)


def packed(folder, samples, labels=True):
    return write_shards(folder, samples, 5, "k{:02d}", [i % 3 for i in range(len(samples))] if labels else None)


@pytest.fixture
def shards(tmp_path):
    return packed(tmp_path / "set", images(13))


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def own_index(folder):
    """Make the manifest's hash of the index right again."""
    digest = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    edit(folder / "manifest.json", lambda manifest: manifest.update(index_sha256=digest))


def own_shard(folder, number):
    """Make the manifest's size and hash of a shard right again."""
    data = (folder / f"shard-{number:06d}.tar").read_bytes()
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder / "manifest.json", lambda manifest: manifest["shards"][number].update(told))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 255
    path.write_bytes(data)


def damage_pixels(folder):
    flip(folder / "shard-000001.tar", json.loads((folder / "index.json").read_text())[1]["offsets"][2] + 60)


def cut(folder):
    os.truncate(folder / "shard-000001.tar", 5000)


def delete(folder):
    (folder / "shard-000002.tar").unlink()


def swap_index(folder):
    other = packed(folder.parent / "other", images(13, seed=1) // 64)
    (folder / "index.json").write_bytes((other / "index.json").read_bytes())


def swap_index_and_its_hash(folder):
    swap_index(folder)
    own_index(folder)


def relabel(folder):
    edit(folder / "index.json", lambda index: index[0]["labels"].reverse())
    own_index(folder)


def empty_shard(folder):
    (folder / "shard-000001.tar").write_bytes(b"")


def stray_shard(folder):
    (folder / "shard-000007.tar").write_bytes((folder / "shard-000001.tar").read_bytes())


def other_shape(folder):
    edit(folder / "manifest.json", lambda manifest: manifest.update(shape=[9, 9, 3]))


def other_count(folder):
    edit(folder / "manifest.json", lambda manifest: manifest.update(count=12))


def no_json(folder):
    (folder / "manifest.json").write_text("{")


def outside(folder):
    edit(folder / "manifest.json", lambda manifest: manifest["shards"][0].update(file="../set/shard-000000.tar"))


def pixels_under_a_right_hash(folder):
    damage_pixels(folder)
    own_shard(folder, 1)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("damage", "faults"), [
    (damage_pixels, ["shard-000001.tar: sha256 differs"]),
    (cut, ["shard-000001.tar: has 5000 bytes of", "shard-000001.tar: truncated"]),
    (delete, ["shard-000002.tar: is missing"]),
    (empty_shard, ["shard-000001.tar: has 0 bytes of", "shard-000001.tar: truncated"]),
    (swap_index, ["index.json: sha256 differs", "index.json tells other samples than"]),
    (swap_index_and_its_hash, ["shard-000000.tar: index.json tells other samples than the shard's headers"]),
    (relabel, ["shard-000000.tar: index.json tells other labels than the shard"]),
    (lambda folder: (folder / "index.json").unlink(), ["index.json: cannot be read"]),
    (stray_shard, ["shard-000007.tar: is not in manifest.json"]),
    (other_count, ["counts 12 samples where the shards hold 13"]),
    (no_json, ["manifest.json: unreadable"]),
    (outside, ["manifest.json: unreadable", "is no file name"]),
])  # fmt: skip
def test_each_kind_of_damage_is_found(shards, capsys, damage, faults, fast):
    damage(shards)
    assert check(shards, *["--fast"] * fast) == 2
    captured = capsys.readouterr()
    for fault in faults:
        assert fault in captured.out
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and faults[0] in captured.err


@pytest.mark.parametrize(("damage", "fault"), [
    (pixels_under_a_right_hash, "shard-000001.tar: sample 'k07': cannot be decoded"),
    (other_shape, "shard-000000.tar: sample 'k00': has shape (8, 8, 3) where manifest.json says (9, 9, 3)"),
])  # fmt: skip
def test_what_only_decoding_tells_is_found_without_fast(shards, capsys, damage, fault):
    damage(shards)
    assert check(shards, "--fast") == 0
    assert "none decoded" in capsys.readouterr().out
    assert check(shards) == 2
    assert fault in capsys.readouterr().err


def test_all_faults_of_all_sets_are_listed_and_counted(tmp_path, capsys):
    for name in "abc":
        packed(tmp_path / "sets" / name, images(13))
    delete(tmp_path / "sets/a")
    damage_pixels(tmp_path / "sets/c")
    assert check(tmp_path / "sets", "--fast") == 2
    captured = capsys.readouterr()
    assert "(the first of 2 faults in 3 sets)" in captured.err and "a/shard-000002.tar: is missing" in captured.err
    assert "c/shard-000001.tar: sha256 differs" in captured.out and "b: 13 samples, whole" in captured.out


def test_whole_sets_pass(tmp_path, capsys):
    packed(tmp_path / "images", images(13))
    packed(tmp_path / "points", np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32), labels=False)
    assert check(tmp_path / "images", tmp_path / "points", "--workers", 2) == 0
    captured = capsys.readouterr()
    assert "images: 13 samples, whole" in captured.out and "points: 7 samples, whole" in captured.out
    assert captured.err == ""


def test_foreign_tars_are_decoded(tmp_path, capsys):
    files = [encoded(image, "JPEG")[: 200 if i == 2 else None] for i, image in enumerate(images(4))]
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": data for i, data in enumerate(files)})
    assert check(tmp_path) == 2
    assert "a.tar: sample '2': cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--check", "{set}", "--resolution", "8"], "--resolution: does nothing with --check"),
    (["source", "--check", "{set}"], "SOURCE: does nothing with --check"),
    (["--check", "{set}/nowhere"], "no such folder"),
    (["--check", "{empty}"], "holds no shards"),
    (["--check", "{set}", "--workers", "0"], "--workers 0 must be at least 1"),
    (["digits", "--out", "x", "--fast"], "--fast: is for --check"),
    ([], "name a SOURCE and --out DIR"),
])  # fmt: skip
def test_requests_that_make_no_sense_are_refused(shards, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    assert pack(*(word.format(set=shards, empty=tmp_path / "empty") for word in words)) == 2
    assert message in error_line(capsys)
