"""Packing image folders with classes, zip archives and arrays."""

import struct
import zipfile

import numpy as np
import pytest
import torch
from material import encoded, error_line, files_of, npy, npz, pack, random_pixels, save_images, write_files

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import SampleStream
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream


def refused(capsys, out, *words):
    """The one line with which packing is refused; nothing complete may be left behind."""
    capsys.readouterr()
    assert pack(*words, "--out", out) == 2
    assert not files_of(out)
    return error_line(capsys, "skipped, unreadable: ")


def png(value, side=4):
    return encoded(np.full((side, side, 3), value, np.uint8))


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def values(shards):
    return [float(shards.read(i).flat[0]) for i in range(len(shards))]


ANIMALS = {
    "train/cat/a.png": png(10),
    "train/cat/deep/b.png": png(11),
    "train/dog/a.png": png(20),
    "train/wild/a.png": png(30),
    "train/wild/b.png": png(31),
    "train/wild/notes.txt": b"not an image",
}

# -- class labels ------------------------------------------------------------------------------------------------------


def test_first_level_folders_are_classes(tmp_path):
    import webdataset

    write_files(tmp_path / "animals", ANIMALS)
    words = ["--resolution", 4, "--labels", "--shard-size", 2]
    assert pack(tmp_path / "animals/train", "--out", tmp_path / "out", *words) == 0
    shards = ShardSet(tmp_path / "out")
    assert (shards.classes, shards.labels.tolist()) == (["cat", "dog", "wild"], [0, 0, 1, 2, 2])
    assert shards.labels.dtype == np.int64
    assert values(shards) == [10, 11, 20, 30, 31]
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [(sample["__key__"], sample["cls"]) for sample in read] == list(zip(shards.keys, shards.labels, strict=True))


def test_labels_survive_a_hold_out_and_skipped_files(tmp_path):
    files = {f"{kind}/{i:03d}.png": png(10 * label + i % 10) for label, kind in enumerate("ab") for i in range(60)}
    files["a/007.png"] = b"broken"
    write_files(tmp_path / "photos", files)
    assert pack(tmp_path / "photos", "--out", tmp_path / "out", "--resolution", 4, "--labels", "--holdout", 0.25) == 0
    sets = [ShardSet(tmp_path / "out" / split) for split in ("train", "test")]
    assert sum(map(len, sets)) == 119
    for shards in sets:
        assert shards.classes == ["a", "b"]
        assert shards.labels.tolist() == ["ab".index(key[0]) for key in shards.keys]
        assert [value // 10 for value in values(shards)] == shards.labels.tolist()


def test_labels_follow_positions_through_epochs(tmp_path):
    write_files(tmp_path / "animals", ANIMALS)
    pack(tmp_path / "animals/train", "--out", tmp_path / "out", "--resolution", 4, "--labels")
    stream = SampleStream(ShardSet(tmp_path / "out"), Philox(3), Stream.TARGET_ORDER)
    positions = torch.arange(12)
    labels, images = stream.labels(positions), stream.batch(positions)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [int(image.flatten()[0]) // 10 - 1 for image in images]
    assert torch.cat([stream.labels(part) for part in positions.split(5)]).tolist() == labels.tolist()


def test_a_set_without_labels_says_so(tmp_path):
    write_files(tmp_path / "animals", ANIMALS)
    pack(tmp_path / "animals/train", "--out", tmp_path / "out", "--resolution", 4)
    shards = ShardSet(tmp_path / "out")
    assert shards.labels is None and shards.classes is None
    with pytest.raises(InputError, match="no class labels; pack them with --labels"):
        SampleStream(shards, Philox(0), Stream.TARGET_ORDER).labels([0])


def test_an_image_outside_every_class_folder_is_named(tmp_path, capsys):
    write_files(tmp_path / "photos", {"a/1.png": png(1), "2.png": png(2)})
    line = refused(capsys, tmp_path / "out", tmp_path / "photos", "--resolution", 4, "--labels")
    assert "2.png lies in no subfolder" in line


def test_a_broken_link_counts_as_unreadable(tmp_path, capsys):
    write_files(tmp_path / "photos", {"1.png": png(1)})
    (tmp_path / "photos/2.png").symlink_to("nowhere")
    assert "1 of 2 files are unreadable" in refused(capsys, tmp_path / "out", tmp_path / "photos", "--resolution", 4)


# -- zip archives ------------------------------------------------------------------------------------------------------


def test_a_zip_packs_as_its_unpacked_folder_does(tmp_path):
    write_files(tmp_path / "animals", ANIMALS)
    write_zip(tmp_path / "animals.zip", {**ANIMALS, "__MACOSX/._a.png": b"x", "train/.hidden.png": b"x"})
    before = sorted(tmp_path.rglob("*"))
    for source, out in ((tmp_path / "animals", "folder"), (tmp_path / "animals.zip", "zip")):
        assert pack(source, "--out", tmp_path / out, "--resolution", 4) == 0
    assert (tmp_path / "folder/shard-000000.tar").read_bytes() == (tmp_path / "zip/shard-000000.tar").read_bytes()
    new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - set(before)}
    assert new == {"folder", "zip"}
    assert pack(tmp_path / "animals.zip/train/wild", "--out", tmp_path / "wild", "--resolution", 4) == 0
    assert ShardSet(tmp_path / "wild").keys == ["a", "b"] and values(ShardSet(tmp_path / "wild")) == [30, 31]


@pytest.mark.parametrize("name", [
    "../evil.png", "/evil.png", "a/../../evil.png", "a\\..\\evil.png", "a//b.png", "./a.png",
])  # fmt: skip
def test_zip_members_with_path_games_are_refused(tmp_path, capsys, name):
    write_zip(tmp_path / "x.zip", {"good.png": png(1), name: png(2)})
    assert "no plain relative path" in refused(capsys, tmp_path / "out", tmp_path / "x.zip", "--resolution", 4)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr("a.png", png(2))
    assert "'a.png' is there twice" in refused(capsys, tmp_path / "out", tmp_path / "x.zip", "--resolution", 4)


def test_damaged_zips_are_refused_in_one_line(tmp_path, capsys):
    whole = write_zip(tmp_path / "whole.zip", ANIMALS, zipfile.ZIP_STORED).read_bytes()
    damaged = {"empty": b"", "text": b"<html></html>", "cut": whole[:-40], "half": whole[: len(whole) // 2]}
    damaged["content"] = whole.replace(png(10), png(10)[:60] + bytes(len(png(10)) - 60))
    for name, data in damaged.items():
        (tmp_path / f"{name}.zip").write_bytes(data)
        line = refused(capsys, tmp_path / "out", tmp_path / f"{name}.zip", "--resolution", 4)
        assert f"{name}.zip" in line
    assert "Bad CRC-32 for file 'train/cat/a.png'" in line


def test_a_member_that_unpacks_to_gigabytes_is_not_read(tmp_path, capsys):
    data = bytearray(write_zip(tmp_path / "x.zip", {"a.png": png(1)}, zipfile.ZIP_STORED).read_bytes())
    directory = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, directory + 24, 3 << 30)  # the central directory's uncompressed size
    (tmp_path / "x.zip").write_bytes(data)
    assert "unpacks to 3221225472 bytes" in refused(capsys, tmp_path / "out", tmp_path / "x.zip", "--resolution", 4)


def test_a_folder_that_is_not_in_the_archive_is_named(tmp_path, capsys):
    write_zip(tmp_path / "x.zip", ANIMALS)
    line = refused(capsys, tmp_path / "out", tmp_path / "x.zip/test", "--resolution", 4)
    assert "x.zip/test: no files there; the archive's folders are train" in line


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_latents_in_a_folder_are_packed_as_they_are(tmp_path):
    latents = np.random.default_rng(0).normal(size=(5, 4, 3, 2))
    types = (np.float16, np.float32, np.float64, ">f4", np.float32)
    arrays = [latent.astype(kind) for latent, kind in zip(latents, types, strict=True)]
    write_files(tmp_path / "z", {f"{i}.npy": npy(array) for i, array in enumerate(arrays)})
    assert pack(tmp_path / "z", "--out", tmp_path / "out", "--holdout", 0.2) == 0
    assert (len(ShardSet(tmp_path / "out/train")), len(ShardSet(tmp_path / "out/test"))) == (4, 1)
    for split in ("train", "test"):
        shards = ShardSet(tmp_path / "out" / split)
        assert (shards.kind, shards.shape) == ("array", (4, 3, 2))
        for i, key in enumerate(shards.keys):
            np.testing.assert_array_equal(shards.read(i), arrays[int(key)].astype(np.float32))


@pytest.mark.parametrize("shape", [(7, 3), (7, 2, 4, 4)])
def test_one_large_file_is_packed_row_by_row(tmp_path, shape):
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (tmp_path / "all.v1.npy").write_bytes(npy(rows))
    assert pack(tmp_path / "all.v1.npy", "--out", tmp_path / "out", "--shard-size", 3) == 0
    shards = ShardSet(tmp_path / "out")
    assert shards.keys == [f"all_v1_{i:07d}" for i in range(7)]
    np.testing.assert_array_equal(np.stack([shards.read(i) for i in range(7)]), rows)


def test_another_file_of_the_same_size_is_another_set(tmp_path):
    for value in (0.0, 1.0):
        (tmp_path / "z.npy").write_bytes(npy(np.full((3, 2), value)))
        status = pack(tmp_path / "z.npy", "--out", tmp_path / "out")
    assert status == 2


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('canary').write_text('')",)


def header(shape):
    return npy(np.zeros(3, np.float32)).replace(b"(3,), }" + b" " * 30, shape.ljust(37))


@pytest.mark.parametrize(("files", "message"), [
    ({"a.npy": npy(np.zeros((4, 2, 2), np.float32)), "b.png": png(1)}, r"images \(b.png\) and .npy files \(a.npy\)"),
    ({"a.npy": npy(np.zeros(3, np.int64))}, "holds int64"),
    ({"a.npy": npy(np.zeros((2, 2)))}, r"has shape \(2, 2\)"),
    ({"a.npy": npy(np.array([1.0, np.nan]))}, "not finite"),
    ({"a.npy": npy(np.array([1e300]))}, "not finite"),
    ({"a.npy": npy(np.array([Bomb()]), allow_pickle=True)}, "a.npy"),
    ({"a.npy": npy(np.zeros(300))[:-8]}, "a.npy"),
    ({"a.npy": npy(np.zeros(300))[:20]}, "a.npy"),
    ({"a.npy": b""}, "a.npy"),
    ({"a.npy": npz(a=np.zeros((3, 2)))}, "several arrays"),
    ({"a.npy": npz(a=np.zeros((3, 2)))[:-20]}, "a.npy"),
    ({"a.npy": header(b"(8000000000000000,), }")}, "a.npy"),
    ({"a.npy": npy(np.zeros(3)), "b.npy": npy(np.zeros(4))}, r"b: npy of shape \(4,\)"),
    ({"readme.txt": b""}, "no images and no arrays"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_no_sample_can_be_made_of_is_refused(tmp_path, capsys, monkeypatch, files, message):
    import re

    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "z", files)
    assert re.search(message, refused(capsys, tmp_path / "out", tmp_path / "z"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("data", "message"), [
    (npy(np.zeros((3, 2), np.int32)), "int32"),
    (npy(np.zeros(3)), r"[3]"),
    (npz(a=np.zeros((3, 2))), "several arrays"),
    (npz(a=np.zeros((3, 2)))[:-20], "not a whole .npy file"),
    (npy(np.zeros((3, 2)))[:-1], "not a whole .npy file"),
    (npy(np.array([[Bomb()]]), allow_pickle=True), "not a whole .npy file"),
    (npy(np.array([[0.0], [np.inf]])), "row 1 holds values that are not finite"),
])  # fmt: skip
def test_one_large_file_that_does_not_fit_is_refused(tmp_path, capsys, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "z.npy").write_bytes(data)
    assert message in refused(capsys, tmp_path / "out", tmp_path / "z.npy")
    assert not (tmp_path / "canary").exists()


# -- latents of images -------------------------------------------------------------------------------------------------


@pytest.fixture
def autoencoder(tmp_path, monkeypatch):
    """A stand-in: 2x2 means of each channel, and a fourth channel of ones."""
    calls = []

    class Autoencoder(torch.nn.Module):
        def __init__(self, folder):
            super().__init__()
            assert (folder / "config.json").exists() if hasattr(folder, "exists") else folder

        def encode(self, images):
            assert images.dtype == torch.float32 and images.abs().max() <= 1
            calls.append(len(images))
            means = torch.nn.functional.avg_pool2d(images, 2)
            return torch.cat([means, torch.ones_like(means[:, :1])], dim=1)

    monkeypatch.setattr("rdmd_fast.model_files.autoencoder.Autoencoder", Autoencoder)
    write_files(tmp_path / "vae", {"config.json": b"{}", "weights.safetensors": b"1"})
    return tmp_path / "vae", calls


def test_an_encoder_turns_images_into_latents(tmp_path, autoencoder, capsys):
    folder, calls = autoencoder
    pixels = random_pixels(0, 35, 4, 4, 3)
    save_images(tmp_path / "photos", {f"{'ab'[i % 2]}/{i:02d}.png": image for i, image in enumerate(pixels)})
    words = [tmp_path / "photos", "--out", tmp_path / "out", "--resolution", 4, "--encoder", folder, "--labels"]
    assert pack(*words, "--device", "cpu") == 0
    assert calls == [16, 16, 3]
    shards = ShardSet(tmp_path / "out")
    assert (shards.kind, shards.shape, len(shards)) == ("array", (4, 2, 2), 35)
    for i, key in enumerate(shards.keys):
        image = pixels[int(key[-2:])].astype(np.float64) / 127.5 - 1
        expected = image.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
        np.testing.assert_allclose(shards.read(i)[:3], expected, atol=1e-6)
        assert (shards.read(i)[3] == 1).all() and "ab"[shards.labels[i]] == key[0]
    assert pack(*words) == 0 and len(calls) == 3
    assert "already complete" in capsys.readouterr().out
    (folder / "weights.safetensors").write_bytes(b"2")
    assert pack(*words) == 2


@pytest.mark.parametrize(("words", "message"), [
    (["{images}", "--resolution", 4, "--encoder", "{images}"], "no config.json there"),
    (["{images}", "--resolution", 4, "--device", "cpu"], "give --encoder too"),
    (["{arrays}", "--encoder", "{vae}"], "--encoder: is for images"),
    (["{arrays}", "--resolution", 4], "--resolution: is for images"),
    (["{images}", "--resolution", 4, "--crop", 5], "too few for a central square of 5"),
    (["{images}", "--resolution", 4, "--crop", 0], "at least 1"),
    (["{images}", "--resolution", 4, "--hues", 3], "--hues: does nothing for image or array files"),
    (["digits", "--crop", 8], "--crop: does nothing for digits, which take --hues, --resolution"),
    (["toy:circles", "--labels"], "--labels: does nothing for toys"),
    (["{images}/nowhere.zip", "--resolution", 4], "no such folder"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, autoencoder, words, message):
    write_files(tmp_path / "images", {"a.png": png(1)})
    write_files(tmp_path / "arrays", {"a.npy": npy(np.zeros(3))})
    folders = {name: tmp_path / name for name in ("images", "arrays", "vae")}
    assert message in refused(capsys, tmp_path / "out", *(str(word).format(**folders) for word in words))
