"""Names of results: no result takes another's place, and what packs also translates."""

import os
from pathlib import Path

import numpy as np
import pytest
from material import encoded, files_of, picture, pixels_of, write_pictures, write_tar

from rdmd_fast.data.sample_names import check_results, image_keys, names_in_shards, output_names, pairing_name
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError


def test_samples_of_one_key_in_two_shards_keep_their_own_results(tmp_path, rdmd, translate):
    for shard in range(2):
        members = {f"{number:06d}.png": encoded(picture(10 * shard + number)) for number in range(3)}
        members |= {f"./alone.{shard}.png": encoded(picture(90 + shard))}
        write_tar(tmp_path / f"tars/part-{shard}.tar", members)
    for flags in ([], ["--skip-existing"]):
        assert translate(tmp_path / "tars", tmp_path / "out", *flags).status == 0
        names = [f"part-{shard}/{number:06d}.png" for shard in range(2) for number in range(3)]
        assert sorted(files_of(tmp_path / "out")) == ["alone.0.png", "alone.1.png", *names]
    for shard in range(2):
        for number in range(3):
            translated = pixels_of(tmp_path / f"out/part-{shard}/{number:06d}.png")
            np.testing.assert_array_equal(translated, picture(10 * shard + number))
    rdmd("pack", tmp_path / "tars", "--out", tmp_path / "set", "--resolution", 8)
    keys = ShardSet(tmp_path / "set").keys
    assert sorted(map(pairing_name, keys)) == sorted(map(pairing_name, ShardSet(tmp_path / "tars").sample_names))
    done = rdmd(
        *("evaluate", "--outputs", tmp_path / "out", "--source", tmp_path / "tars", "--target", tmp_path / "set"),
        *("--out", tmp_path / "report.json"),
    )
    assert done.status == 0 and "source: 8 images" in done.out


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["a.png", "./a.png"], "two samples would become"),
        (["a.png", "a.png/b.png"], "a.png would be a file and a folder"),
        (["../a.png", "b.png"], "is no name for a file below"),
        (["/a.png", "b.png"], "is no name for a file below"),
        (["a" * 255 + ".png", "b.png"], "255 is the most"),
    ],
)
def test_results_that_cannot_all_be_written_are_refused_before_the_first(tmp_path, translate, members, said):
    write_tar(tmp_path / "tars/a.tar", {name: encoded(picture()) for name in members})
    done = translate(tmp_path / "tars", tmp_path / "out")
    assert done.status == 2 and said in done.err
    assert not (tmp_path / "out").exists()


def test_results_of_files_are_checked_alike():
    check_results(Path("out"), ["a.png", "b/a.png", "b/c.png"], "--input")
    with pytest.raises(InputError, match="would be a file and a folder"):
        check_results(Path("out"), ["b/a.png", "b"], "--input")


@pytest.mark.parametrize("name", [b"M\xfcller.png", b"line\nbreak.png", b"bell\a.png", "Grüße 猫.png".encode()])
def test_what_packs_also_translates(tmp_path, rdmd, translate, name):
    photos = write_pictures(tmp_path / "photos", os.fsdecode(name), "b.png", "c.png")
    assert rdmd("pack", photos, "--out", tmp_path / "set", "--resolution", 8).status == 0
    assert rdmd("pack", "--check", tmp_path / "set").status == 0
    for source, output in (("set", "from_set"), ("photos", "from_files")):
        assert translate(tmp_path / source, tmp_path / output).status == 0
        assert sorted(map(os.fsencode, os.listdir(tmp_path / output))) == sorted([name, b"b.png", b"c.png"])


def test_keys_are_paths_without_dots_and_unique():
    assert image_keys(["v1.0/cat.1.png", "x.jpg", "x.png"]) == ["v1.0/cat_1", "x_jpg", "x_png"]
    with pytest.raises(InputError, match="would both become 'a_b_png'"):
        image_keys(["a.b.png", "a_b.png"])


def test_names_of_results_keep_dots_and_are_unique():
    assert output_names(["v1.0/cat.1.png", "x.jpg", "x.png"]) == ["v1.0/cat.1", "x_jpg", "x_png"]
    with pytest.raises(InputError, match="would both become 'x_png'"):
        output_names(["x.jpg", "x.png", "x_png.webp"])


def test_only_keys_that_shards_share_get_the_shards_name():
    assert names_in_shards(["s.0.tar", "t.tar"], [["a", "b"], ["a", "c"]]) == ["s.0/a", "b", "t/a", "c"]
    with pytest.raises(InputError, match="'t/a'"):
        names_in_shards(["s.tar", "t.tar"], [["a", "t/a"], ["a"]])
