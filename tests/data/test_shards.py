import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from rdmd_fast.data.shards import ShardSet
from rdmd_fast.data.writer import ShardWriter
from rdmd_fast.errors import InputError


def images(count, side=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def pack(folder, samples, shard_size=4, prefix="nested/photo"):
    with ShardWriter(folder, {}, "test", shard_size) as writer:
        for i, sample in enumerate(samples):
            writer.write(f"{prefix}_{i}", sample)
        writer.commit()
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded(array, form):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def from_webdataset(folder, decoder=None):
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    return list(dataset.decode(decoder) if decoder else dataset.decode())


def test_packed_images_equal_the_originals_and_what_webdataset_reads(tmp_path):
    originals = images(10)
    shards = ShardSet(pack(tmp_path / "set", originals))
    samples = from_webdataset(tmp_path / "set", "rgb8")
    assert (shards.kind, shards.shape, len(shards)) == ("image", (5, 5, 3), 10)
    assert shards.keys == [sample["__key__"] for sample in samples]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(shards.read(i), originals[i])
        np.testing.assert_array_equal(sample["png"], originals[i])


def test_long_and_non_ascii_keys_are_kept(tmp_path):
    key = "folder/" * 30 + "naïve-" + "x" * 120
    with ShardWriter(tmp_path / "set", {}, "test", 4) as writer:
        writer.write(key, images(1)[0])
        writer.commit()
    assert ShardSet(tmp_path / "set").keys == [from_webdataset(tmp_path / "set", "rgb8")[0]["__key__"]] == [key]


def test_packed_arrays_equal_what_webdataset_reads(tmp_path):
    originals = np.random.default_rng(1).normal(size=(9, 7)).astype(np.float32)
    shards = ShardSet(pack(tmp_path / "set", originals))
    assert (shards.kind, shards.shape) == ("array", (7,))
    for i, sample in enumerate(from_webdataset(tmp_path / "set")):
        np.testing.assert_array_equal(shards.read(i), originals[i])
        np.testing.assert_array_equal(sample["npy"], originals[i])
        assert shards.read(i).dtype == np.float32


def test_foreign_shards_with_other_members_equal_what_webdataset_reads(tmp_path):
    pixels = images(6, side=16)
    long_name = "deep/" * 40 + "café"
    for shard in range(2):
        members = [("README", b"no extension")]
        for i in range(3):
            key = long_name if shard == 1 and i == 2 else f"some.dir/{shard}-{i}"
            members += [(f"{key}.cls", b"7"), (f"{key}.JPG", encoded(pixels[3 * shard + i], "JPEG"))]
        write_tar(tmp_path / f"data-{shard}.tar", members)
    shards = ShardSet(tmp_path)
    samples = from_webdataset(tmp_path, "rgb8")
    assert (len(shards), shards.shape, shards.kind) == (6, (16, 16, 3), "image")
    assert shards.keys == [sample["__key__"] for sample in samples] and shards.keys[-1] == long_name
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(shards.read(i), sample["jpg"])


def test_foreign_grey_images_and_float64_arrays_are_converted(tmp_path):
    (tmp_path / "grey").mkdir()
    grey = images(1)[0, ..., 0]
    write_tar(tmp_path / "grey" / "a.tar", [("x.png", encoded(grey, "PNG"))])
    np.testing.assert_array_equal(ShardSet(tmp_path / "grey").read(0), np.repeat(grey[..., None], 3, 2))
    (tmp_path / "points").mkdir()
    buffer = io.BytesIO()
    np.save(buffer, np.array([0.1, 0.2]))
    write_tar(tmp_path / "points" / "a.tar", [("x.npy", buffer.getvalue())])
    read = ShardSet(tmp_path / "points").read(0)
    assert read.dtype == np.float32 and read.tolist() == np.float32([0.1, 0.2]).tolist()


def test_sets_of_very_many_shards_are_read_without_holding_them_open(tmp_path, monkeypatch):
    monkeypatch.setattr("rdmd_fast.data.shards._MAX_OPEN", 2)
    originals = images(12)
    shards = ShardSet(pack(tmp_path / "set", originals, shard_size=3))
    assert all((shards.read(i) == originals[i]).all() for i in range(12))


def test_an_index_outside_the_set_is_an_error(tmp_path):
    shards = ShardSet(pack(tmp_path / "set", images(3)))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            shards.read(index)


def test_missing_folder_and_missing_shards_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder.*rdmd pack"):
        ShardSet(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no \.tar shards"):
        ShardSet(tmp_path)
    folder = pack(tmp_path / "set", images(8))
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: shard is missing"):
        ShardSet(folder)


def test_a_truncated_packed_shard_is_refused_at_opening(tmp_path):
    folder = pack(tmp_path / "set", images(8))
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"shard-000001\.tar: truncated"):
        ShardSet(folder)


def test_a_shard_cut_while_open_is_an_error_at_the_sample(tmp_path):
    folder = pack(tmp_path / "set", images(8), shard_size=8)
    shards = ShardSet(folder)
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.truncate(6000)
    with pytest.raises(InputError, match="'nested/photo_7' is cut short"):
        shards.read(7)


@pytest.mark.parametrize("keep", [100, 512, 600, 1024, 1600, 2048, 2300])
def test_a_truncated_foreign_shard_is_refused_wherever_it_ends(tmp_path, keep):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(image, "PNG")) for i, image in enumerate(images(2))])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"a\.tar: truncated"):
        ShardSet(tmp_path)


def test_an_undecodable_sample_is_named(tmp_path):
    good = encoded(images(1)[0], "PNG")
    write_tar(tmp_path / "a.tar", [("x.png", good), ("y.png", good[:60])])
    with pytest.raises(InputError, match=r"a\.tar: sample 'y' cannot be decoded"):
        ShardSet(tmp_path).read(1)


def test_a_pickled_array_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([1.0, 2.0], dtype=object), allow_pickle=True)
    write_tar(tmp_path / "a.tar", [("x.npy", buffer.getvalue())])
    with pytest.raises(InputError, match="cannot be decoded"):
        ShardSet(tmp_path)


def test_differing_shapes_are_named(tmp_path):
    small, large = images(1)[0], images(1, side=6)[0]
    write_tar(tmp_path / "a.tar", [("x.png", encoded(small, "PNG")), ("y.png", encoded(large, "PNG"))])
    with pytest.raises(InputError, match=r"'y' has shape \(6, 6, 3\) where the set has \(5, 5, 3\)"):
        ShardSet(tmp_path).read(1)


def test_two_images_of_one_key_are_refused(tmp_path):
    good = encoded(images(1)[0], "PNG")
    write_tar(tmp_path / "a.tar", [("x.png", good), ("x.jpg", good)])
    with pytest.raises(InputError, match="share the key 'x'"):
        ShardSet(tmp_path)


def test_shards_without_usable_samples_list_what_they_hold(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.txt", b"1"), ("x.cls", b"1")])
    with pytest.raises(InputError, match="only cls, txt"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"version": 99}'])
def test_a_damaged_manifest_is_one_line(tmp_path, damage):
    folder = pack(tmp_path / "set", images(3))
    (folder / "manifest.json").write_bytes(damage)
    with pytest.raises(InputError, match=r"manifest\.json") as caught:
        ShardSet(folder)
    assert "\n" not in str(caught.value)


def test_an_index_of_another_packing_is_refused(tmp_path):
    first, second = pack(tmp_path / "a", images(3)), pack(tmp_path / "b", images(4))
    (first / "index.json").write_bytes((second / "index.json").read_bytes())
    with pytest.raises(InputError, match="does not belong"):
        ShardSet(first)


def test_labels_of_foreign_shards_are_those_that_webdataset_reads(tmp_path):
    pixels = images(6)
    for shard in range(2):
        members = []
        for i in range(3):
            label = 5 * shard + i
            pair = [
                (f"{shard}/{i}.cls", f"{label}\n".encode()),
                (f"{shard}/{i}.png", encoded(pixels[label % 6], "PNG")),
            ]
            members += pair if i else reversed(pair)
        write_tar(tmp_path / f"{shard}.tar", members)
    shards = ShardSet(tmp_path)
    assert shards.labels.dtype == np.int64 and shards.classes is None
    assert (
        shards.labels.tolist() == [0, 1, 2, 5, 6, 7] == [sample["cls"] for sample in from_webdataset(tmp_path, "rgb8")]
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [([], "'y' has no .cls member"), ([("y.cls", b"cat")], "no class number"), ([("y.cls", b"-1")], "no class number")],
)
def test_labels_are_whole_and_read_only_when_asked_for(tmp_path, members, message):
    good = encoded(images(1)[0], "PNG")
    write_tar(tmp_path / "a.tar", [("x.png", good), ("x.cls", b"1"), ("y.png", good), *members])
    shards = ShardSet(tmp_path)
    np.testing.assert_array_equal(shards.read(1), images(1)[0])
    with pytest.raises(InputError, match=message):
        _ = shards.labels


def test_shards_without_labels_have_none(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.png", encoded(images(1)[0], "PNG"))])
    assert ShardSet(tmp_path).labels is None
    assert ShardSet(pack(tmp_path / "set", images(3))).labels is None


def test_half_labelled_sets_are_refused(tmp_path):
    with ShardWriter(tmp_path / "set", {}, "test", 4) as writer:
        writer.write("a", images(1)[0], 3)
        with pytest.raises(InputError, match="some samples of this set have a class label, some have none"):
            writer.write("b", images(1)[0])
