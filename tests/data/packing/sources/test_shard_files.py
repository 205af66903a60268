"""Packing a shard set again, at another size."""

import io

import numpy as np
import pytest
from material import encoded, pack, random_pixels, save_images, write_tar
from PIL import Image

from rdmd_fast.data.pictures import load_image
from rdmd_fast.data.shards.shard_set import ShardSet


def picture(seed, width=24, height=24):
    return random_pixels(seed, height, width, 3)


def test_a_packed_set_is_resized_with_its_keys_and_labels(tmp_path):
    save_images(tmp_path / "photos", {f"{'ab'[i % 2]}/{i:02d}.png": picture(i) for i in range(12)})
    pack(tmp_path / "photos", "--out", tmp_path / "large", "--resolution", 24, "--labels", "--shard-size", 5)
    assert pack(tmp_path / "large", "--out", tmp_path / "small", "--resolution", 8, "--shard-size", 4) == 0
    large, small = ShardSet(tmp_path / "large"), ShardSet(tmp_path / "small")
    assert (small.keys, small.labels.tolist(), small.classes) == (large.keys, large.labels.tolist(), ["a", "b"])
    assert len(list((tmp_path / "small").glob("*.tar"))) == 3
    for i in range(12):
        expected = load_image(io.BytesIO(encoded(large.read(i))), 8)
        np.testing.assert_array_equal(small.read(i), expected)
    # The folder of images at the same size has the same samples, so the same tars.
    pack(tmp_path / "photos", "--out", tmp_path / "direct", "--resolution", 8, "--labels", "--shard-size", 4)
    for shard in (tmp_path / "direct").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "small" / shard.name).read_bytes()


def test_foreign_shards_of_mixed_sizes_become_one_size(tmp_path):
    turned = Image.Exif()
    turned[0x112] = 6
    write_tar(tmp_path / "in/a.tar", {"0.jpg": encoded(picture(0, 30, 20), "JPEG", exif=turned), "0.cls": b"2"})
    write_tar(tmp_path / "in/b.tar", {"0.png": encoded(picture(1, 16, 40)), "0.cls": b" 0\n", "0.txt": b"a cat"})
    write_tar(tmp_path / "in/c.tar", {"0.png": encoded(picture(2, 9, 9)[..., 0]), "0.cls": b"1"})
    assert pack(tmp_path / "in", "--out", tmp_path / "out", "--resolution", 12, "--crop", 9) == 0
    shards = ShardSet(tmp_path / "out")
    assert (shards.shape, len(shards), shards.labels.tolist()) == ((12, 12, 3), 3, [2, 0, 1])
    assert shards.keys == ["a/0", "b/0", "c/0"]
    expected = load_image(io.BytesIO(encoded(picture(0, 30, 20), "JPEG", exif=turned)), 12, crop=9)
    np.testing.assert_array_equal(shards.read(0), expected)


def test_latents_in_shards_are_packed_as_they_are(tmp_path):
    latents = np.random.default_rng(0).normal(size=(9, 4, 2, 2)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    pack(tmp_path / "latents.npy", "--out", tmp_path / "in", "--shard-size", 9)
    assert pack(tmp_path / "in", "--out", tmp_path / "out", "--shard-size", 4) == 0
    shards = ShardSet(tmp_path / "out")
    np.testing.assert_array_equal(np.stack([shards.read(i) for i in range(9)]), latents)
    assert pack(tmp_path / "in", "--out", tmp_path / "no", "--resolution", 8) == 2


def test_a_changed_set_is_another_source(tmp_path, capsys):
    for name, seed in (("one", 0), ("two", 1)):
        np.save(tmp_path / "latents.npy", np.random.default_rng(seed).normal(size=(9, 4)).astype(np.float32))
        pack(tmp_path / "latents.npy", "--out", tmp_path / name)
    assert pack(tmp_path / "one", "--out", tmp_path / "out") == 0
    (tmp_path / "one").rename(tmp_path / "gone")
    (tmp_path / "two").rename(tmp_path / "one")
    assert pack(tmp_path / "one", "--out", tmp_path / "out") == 2
    assert "another set" in capsys.readouterr().err


@pytest.mark.parametrize(("files", "words", "message"), [
    ({"0.png": encoded(picture(0)), "0.cls": b"x"}, [], "has no class number in a .cls member"),
    ({"0.png": encoded(picture(0)), "0.cls": b"1", "1.png": encoded(picture(1))}, [], "sample '1' has no class"),
    ({"0.png": encoded(picture(0))}, ["--labels"], "whose own labels are kept"),
    ({"0.txt": b"x"}, [], "no images and no arrays"),
    ({"0.png": encoded(picture(0))[:50]}, [], "1 of 1 files are unreadable"),
])  # fmt: skip
def test_shards_that_cannot_be_packed_are_refused(tmp_path, capsys, files, words, message):
    write_tar(tmp_path / "in/a.tar", files)
    assert pack(tmp_path / "in", "--out", tmp_path / "out", "--resolution", 8, *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_unfinished_and_cut_sets_are_refused(tmp_path, capsys):
    write_tar(tmp_path / "in/a.tar", {"0.png": encoded(picture(0))})
    whole = (tmp_path / "in/a.tar").read_bytes()
    (tmp_path / "in/a.tar").write_bytes(whole[:1200])
    assert pack(tmp_path / "in", "--out", tmp_path / "out", "--resolution", 8) == 2
    assert "a.tar: truncated" in capsys.readouterr().err
    (tmp_path / "in/a.tar").write_bytes(whole)
    (tmp_path / "in/manifest.json.partial").write_text("{}")
    assert pack(tmp_path / "in", "--out", tmp_path / "out", "--resolution", 8) == 2
    assert "packing was interrupted" in capsys.readouterr().err


def test_an_image_folder_with_a_tar_in_it_is_still_images(tmp_path):
    save_images(tmp_path / "in", {"p.png": picture(5)})
    write_tar(tmp_path / "in/backup.tar", {"originals/p.jpg": encoded(picture(0))})
    assert pack(tmp_path / "in", "--out", tmp_path / "out", "--resolution", 8) == 0
    assert ShardSet(tmp_path / "out").keys == ["p"]
