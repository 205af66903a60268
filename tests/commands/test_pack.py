import argparse
import json
import shlex

import numpy as np
import pytest
import torch
from material import files_of, save_images

from rdmd_fast.commands import pack
from rdmd_fast.data.packing.shard_writer import ShardWriter
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream


def run(*words):
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    return pack.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def photos(tmp_path):
    """20 flat images of 6x6 in two nested folders; image i has value i."""
    images = {f"{'a' if i % 2 else 'b/c'}/img.{i:02d}.png": np.full((6, 6, 3), i, np.uint8) for i in range(20)}
    return save_images(tmp_path / "photos", images)


def test_images_keep_their_relative_names_and_order(photos, tmp_path):
    assert run(photos, "--out", tmp_path / "out", "--resolution", 6, "--shard-size", 7) == 0
    shards = ShardSet(tmp_path / "out")
    odd, even = range(1, 20, 2), range(0, 20, 2)
    assert shards.keys == [f"a/img_{i:02d}" for i in odd] + [f"b/c/img_{i:02d}" for i in even]
    assert [shards.read(i)[0, 0, 0] for i in range(20)] == [*odd, *even]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


def test_the_same_samples_give_the_same_bytes(photos, tmp_path, monkeypatch):
    run(photos, "--out", tmp_path / "first", "--resolution", 6)
    monkeypatch.setattr("time.time", lambda: 1e9)
    run(photos, "--out", tmp_path / "second", "--resolution", 6)
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    for files in (first, second):
        files["manifest.json"] = files["manifest.json"].replace(b"first", b"second")
    assert first == second


def test_the_manifest_tells_what_the_folder_holds(photos, tmp_path):
    import hashlib

    run(photos, "--out", tmp_path / "my out", "--resolution", 6, "--shard-size", 7)
    manifest = json.loads((tmp_path / "my out" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["count"], manifest["shape"]) == ("image", 20, [6, 6, 3])
    assert [shard["count"] for shard in manifest["shards"]] == [7, 7, 6]
    for shard in manifest["shards"]:
        data = (tmp_path / "my out" / shard["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard["sha256"], shard["bytes"])
    before = files_of(tmp_path / "my out")
    assert run(*shlex.split(manifest["command"])[2:], "--force") == 0
    assert files_of(tmp_path / "my out") == before


def test_a_complete_set_is_kept_unless_forced(photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(photos, "--out", out, "--resolution", 6, "--shard-size", 4)
    before = files_of(out)
    run(photos, "--out", out, "--resolution", 6, "--shard-size", 4)
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(InputError, match="--force"):
        run(photos, "--out", out, "--resolution", 4)
    assert files_of(out) == before
    run(photos, "--out", out, "--resolution", 4, "--force")
    assert ShardSet(out).shape == (4, 4, 3)
    assert sorted(files_of(out)) == ["index.json", "manifest.json", "report.json", "shard-000000.tar"]


def test_a_changed_source_folder_is_another_set(photos, tmp_path):
    run(photos, "--out", tmp_path / "out", "--resolution", 6)
    next(photos.rglob("*.png")).unlink()
    with pytest.raises(InputError, match="another set"):
        run(photos, "--out", tmp_path / "out", "--resolution", 6)


def test_foreign_tars_are_not_overwritten(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match="--force"):
        run(photos, "--out", tmp_path / "out", "--resolution", 6)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == b"precious"


def test_a_failed_packing_leaves_the_old_set(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, "--out", out, "--resolution", 6)
    before = files_of(out)
    (photos / "a" / "broken.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 of 21 files are unreadable.*broken\.png"):
        run(photos, "--out", out, "--resolution", 6, "--force")
    assert files_of(out) == before


def test_few_unreadable_images_are_listed_and_skipped(tmp_path, capsys):
    save_images(tmp_path / "photos", {f"{i:03d}.png": np.full((2, 2, 3), i, np.uint8) for i in range(200)})
    (tmp_path / "photos" / "050.png").write_bytes(b"x")
    run(tmp_path / "photos", "--out", tmp_path / "out", "--resolution", 2)
    captured = capsys.readouterr()
    assert "050.png" in captured.err and "1 of 200 files skipped" in captured.out
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == 199 and "050" not in shards.keys
    assert [int(shards.read(i)[0, 0, 0]) for i in range(199)] == [int(key) for key in shards.keys]


def test_the_hold_out_is_exact_disjoint_and_seeded(photos, tmp_path):
    keys = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"seed{seed}"
        run(photos, "--out", out, "--resolution", 6, "--holdout", 0.25, "--seed", seed)
        train, test = ShardSet(out / "train").keys, ShardSet(out / "test").keys
        assert len(test) == 5 and len(train) == 15 and not set(train) & set(test)
        keys[seed] = test
    assert keys[0] != keys[1]


def test_points_of_a_toy_are_packed_unchanged(tmp_path):
    run("toy:8gaussians", "--count", 50, "--seed", 3, "--out", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert (shards.kind, shards.shape, len(shards)) == ("array", (2,), 50)
    points = ToyDistribution(toy="8gaussians").sample(Philox(3), Stream.EVALUATION, torch.arange(50))
    np.testing.assert_array_equal(np.stack([shards.read(i) for i in range(50)]), points.numpy())


def test_a_toy_is_packed_at_the_size_that_is_asked_for(tmp_path):
    words = ("toy:8gaussians", "--count", 20, "--scale", 2, "--std", 0.2, "--out", tmp_path)
    run(*words)
    shards = ShardSet(tmp_path)
    toy = ToyDistribution(toy="8gaussians", scale=2.0, std=0.2)
    points = toy.sample(Philox(0), Stream.EVALUATION, torch.arange(20))
    np.testing.assert_array_equal(np.stack([shards.read(i) for i in range(20)]), points.numpy())
    run(*words)  # the same set
    with pytest.raises(InputError, match="another set"):
        run("toy:8gaussians", "--count", 20, "--out", tmp_path)


def test_digits_are_packed_by_digit_and_split(tmp_path):
    run("digits", "--out", tmp_path, "--hues", 2)
    sets = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*/manifest.json"))
    assert sets == [f"{digit}/{split}" for digit in range(10) for split in ("test", "train")]
    train, test = ShardSet(tmp_path / "2" / "train"), ShardSet(tmp_path / "2" / "test")
    assert (train.shape, len(train), len(test)) == ((8, 8, 3), 2 * 141, 2 * 36)
    assert not list(tmp_path.rglob("report.json"))  # made here: there is nothing to doubt
    with pytest.raises(InputError, match="name one of the sets inside: test, train"):
        ShardSet(tmp_path / "2")


def test_digits_are_enlarged(tmp_path):
    run("digits", "--out", tmp_path, "--hues", 1, "--resolution", 16)
    assert ShardSet(tmp_path / "9" / "train").shape == (16, 16, 3)
    with pytest.raises(InputError, match="another set"):
        run("digits", "--out", tmp_path, "--hues", 1)


@pytest.mark.parametrize(("words", "message"), [
    (["{photos}"], "--resolution"),
    (["{photos}", "--resolution", 0], "at least 1"),
    (["{photos}", "--resolution", 4, "--holdout", 1.5], r"\[0, 1\)"),
    (["{photos}", "--resolution", 4, "--holdout", 0.001], "one side empty"),
    (["toy:blob"], "toy:8gaussians"),
    (["toy:gaussian", "--scale", 2], "toy:gaussian: toy gaussian has no scale"),
    (["toy:circles", "--std", -1], "toy:circles: --std: input should be greater than 0, found -1"),
    (["digits", "--std", 1], "--std: does nothing for digits"),
    (["nowhere", "--resolution", 4], "no such folder"),
])  # fmt: skip
def test_bad_requests_are_refused_in_one_line(photos, tmp_path, words, message):
    with pytest.raises(InputError, match=message) as caught:
        run(*(str(word).format(photos=photos) for word in words), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_help_shows_examples():
    parser = argparse.ArgumentParser(prog="rdmd pack")
    pack.add_arguments(parser)
    assert "rdmd pack photos/cats --out shards/cats --resolution 64\n" in parser.format_help()


def test_samples_of_another_shape_are_refused(tmp_path):
    with ShardWriter(tmp_path / "out", {}, "", 10) as writer:
        writer.write("a", np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(InputError, match=r"\(3, 3, 3\)"):
            writer.write("b", np.zeros((3, 3, 3), np.uint8))
    assert not list((tmp_path / "out").iterdir())
