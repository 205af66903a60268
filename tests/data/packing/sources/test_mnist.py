import colorsys
import contextlib
import gzip
import struct

import material
import numpy as np
import pytest
import torch

from rdmd_fast.data.packing.sources import mnist
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

COUNTS = {"train": 40, "t10k": 20}


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def data_of(stem):
    generator = np.random.default_rng(len(stem))
    images = generator.integers(0, 256, (COUNTS[stem], 28, 28), dtype=np.uint8)
    return images, np.arange(COUNTS[stem], dtype=np.uint8) % 10


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for stem in COUNTS:
        images, labels = data_of(stem)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def pack(source, out, *words):
    return material.pack(f"mnist:{source}", "--out", out, *words)


def test_each_digit_is_painted_in_the_hue_of_its_place(folder, tmp_path):
    assert pack(folder, tmp_path / "out", "--resolution", 28, "--digits", 3, 2, "--seed", 5) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["2", "3"]
    for stem, split, start in (("train", "train", 0), ("t10k", "test", 1 << 32)):
        images, labels = data_of(stem)
        for digit in (2, 3):
            shards = ShardSet(tmp_path / "out" / str(digit) / split)
            indices = np.flatnonzero(labels == digit)
            assert shards.keys == [f"digit{digit}_{index:05d}" for index in indices]
            for i, index in enumerate(indices):
                hue = Philox(5).uniform(Stream.HUE, torch.tensor([start + index])).item()
                for row, column in ((0, 0), (13, 7), (27, 27)):
                    grey = images[index, row, column] / 255
                    expected = np.array(colorsys.hsv_to_rgb(hue, 1.0, grey)) * 255
                    assert np.abs(shards.read(i)[row, column] - expected).max() <= 0.5 + 1e-6


def test_32_pixels_resize_the_grey_image_and_leave_one_hue(folder, tmp_path):
    assert pack(folder, tmp_path / "out", "--resolution", 32) == 0
    assert len(list((tmp_path / "out").glob("*/*/manifest.json"))) == 20
    shards = ShardSet(tmp_path / "out/7/train")
    assert shards.shape == (32, 32, 3) and len(shards) == 4
    image = shards.read(0).astype(float)
    strongest = image.max(axis=2)
    assert (image.min(axis=2) == 0).all()  # saturation 1: the weakest channel is black
    ratio = image[strongest > 100] / strongest[strongest > 100][:, None]
    assert ratio.std(axis=0).max() < 0.01
    assert abs(strongest.mean() - data_of("train")[0][7].mean()) < 3


def test_gzipped_files_give_the_same_shards(folder, tmp_path):
    pack(folder, tmp_path / "plain", "--resolution", 32, "--digits", 2)
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    pack(folder, tmp_path / "zipped", "--resolution", 32, "--digits", 2)
    for split in ("train", "test"):
        plain, zipped = (tmp_path / name / "2" / split / "shard-000000.tar" for name in ("plain", "zipped"))
        assert plain.read_bytes() == zipped.read_bytes()


def test_idx_files_are_read_whole_and_big_endian(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 2, 5), dtype=np.uint8)
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("a", "a.gz"):
        np.testing.assert_array_equal(mnist.read_idx(tmp_path / name), array)


@pytest.mark.parametrize("zipped", [False, True])
def test_every_cut_of_an_idx_file_is_refused(tmp_path, zipped):
    data = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    data = gzip.compress(data) if zipped else data
    path = tmp_path / ("a.gz" if zipped else "a")
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError) as caught:
            mnist.read_idx(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_random_damage_of_a_gzipped_file_is_refused_or_harmless(tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (2, 9, 9), dtype=np.uint8)
    data = gzip.compress(idx(array))
    generator, path = np.random.default_rng(2), tmp_path / "a.gz"
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            np.testing.assert_array_equal(mnist.read_idx(path), array)


@pytest.mark.parametrize(("data", "message"), [
    (b"<html>", "no IDX file of bytes"),
    (struct.pack(">BBBBI", 0, 0, 0x0D, 1, 4) + bytes(16), "no IDX file of bytes"),
    (struct.pack(">BBBBI", 0, 0, 8, 1, 4) + bytes(5), "too long"),
    (struct.pack(">BBBBII", 0, 0, 8, 2, 2**31, 2**31), "declares"),
])  # fmt: skip
def test_other_files_are_told_apart(tmp_path, data, message):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=message):
        mnist.read_idx(tmp_path / "a")


@pytest.mark.parametrize(("name", "data", "message"), [
    ("train-labels-idx1-ubyte", idx(np.zeros(39, np.uint8)), "40 images where"),
    ("train-labels-idx1-ubyte", idx(np.full(40, 10, np.uint8)), "holds label 10"),
    ("train-labels-idx1-ubyte", idx(np.zeros((40, 1, 1), np.uint8)), "3-D labels"),
    ("t10k-images-idx3-ubyte", None, "holds neither t10k-images-idx3-ubyte nor"),
])  # fmt: skip
def test_files_that_do_not_belong_together_are_refused(folder, tmp_path, capsys, name, data, message):
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    assert pack(folder, tmp_path / "out", "--resolution", 32) == 2
    assert message in material.error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused(folder, tmp_path, capsys):
    for words, message in (
        (["--digits", 2], "needs --resolution"),
        (["--resolution", 32, "--digits", 12], "--digits 12"),
        (["--resolution", 32, "--holdout", 0.1], "--holdout: does nothing for MNIST"),
    ):
        assert pack(folder, tmp_path / "out", *words) == 2
        assert message in capsys.readouterr().err
