import hashlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
import webdataset
from material import encoded, npy, npz, png_of_size, random_pixels, write_shards, write_tar

from rdmd_fast.data.packing.shard_writer import ShardWriter
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.shards.tar import walk_shard
from rdmd_fast.errors import InputError


def images(count, side=5):
    return random_pixels(0, count, side, side, 3)


def pack(folder, samples, shard_size=4):
    return write_shards(folder, samples, shard_size, "nested/photo_{}")


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
    write_shards(tmp_path / "set", images(1), key=key)
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
    grey = images(1)[0, ..., 0]
    write_tar(tmp_path / "grey" / "a.tar", [("x.png", encoded(grey))])
    np.testing.assert_array_equal(ShardSet(tmp_path / "grey").read(0), np.repeat(grey[..., None], 3, 2))
    write_tar(tmp_path / "points" / "a.tar", [("x.npy", npy(np.array([0.1, 0.2])))])
    read = ShardSet(tmp_path / "points").read(0)
    assert read.dtype == np.float32 and read.tolist() == np.float32([0.1, 0.2]).tolist()


def test_sets_of_very_many_shards_are_read_without_holding_them_open(tmp_path, monkeypatch):
    monkeypatch.setattr("rdmd_fast.data.shards.shard_set._MAX_OPEN", 2)
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
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(image)) for i, image in enumerate(images(2))])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"a\.tar: truncated"):
        ShardSet(tmp_path)


def test_an_undecodable_sample_is_named(tmp_path):
    good = encoded(images(1)[0])
    write_tar(tmp_path / "a.tar", [("x.png", good), ("y.png", good[:60])])
    with pytest.raises(InputError, match=r"a\.tar: sample 'y' cannot be decoded"):
        ShardSet(tmp_path).read(1)


def test_a_pickled_array_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.npy", npy(np.array([1.0, 2.0], dtype=object), allow_pickle=True))])
    with pytest.raises(InputError, match="cannot be decoded"):
        ShardSet(tmp_path)


def test_differing_shapes_are_named(tmp_path):
    small, large = images(1)[0], images(1, side=6)[0]
    write_tar(tmp_path / "a.tar", [("x.png", encoded(small)), ("y.png", encoded(large))])
    with pytest.raises(InputError, match=r"'y' has shape \(6, 6, 3\) where the set has \(5, 5, 3\)"):
        ShardSet(tmp_path).read(1)


def test_two_images_of_one_key_are_refused(tmp_path):
    good = encoded(images(1)[0])
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
            pair = (f"{shard}/{i}.cls", f"{label}\n".encode()), (f"{shard}/{i}.png", encoded(pixels[label % 6]))
            members += pair if i else reversed(pair)
        write_tar(tmp_path / f"{shard}.tar", members)
    shards = ShardSet(tmp_path)
    assert shards.labels.dtype == np.int64 and shards.classes is None
    read = [sample["cls"] for sample in from_webdataset(tmp_path, "rgb8")]
    assert shards.labels.tolist() == [0, 1, 2, 5, 6, 7] == read


@pytest.mark.parametrize(("members", "message"), [
    ([], "'y' has no .cls member"), ([("y.cls", b"cat")], "no class number"), ([("y.cls", b"-1")], "no class number"),
])  # fmt: skip
def test_labels_are_whole_and_read_only_when_asked_for(tmp_path, members, message):
    good = encoded(images(1)[0])
    write_tar(tmp_path / "a.tar", [("x.png", good), ("x.cls", b"1"), ("y.png", good), *members])
    shards = ShardSet(tmp_path)
    np.testing.assert_array_equal(shards.read(1), images(1)[0])
    with pytest.raises(InputError, match=message):
        _ = shards.labels


def test_shards_without_labels_have_none(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.png", encoded(images(1)[0]))])
    assert ShardSet(tmp_path).labels is None
    assert ShardSet(pack(tmp_path / "set", images(3))).labels is None


def test_half_labelled_sets_are_refused(tmp_path):
    with ShardWriter(tmp_path / "set", {}, "test", 4) as writer:
        writer.write("a", images(1)[0], 3)
        with pytest.raises(InputError, match="some samples of this set have a class label, some have none"):
            writer.write("b", images(1)[0])


# -- what other people's tars and indexes ask for ----------------------------------------------------------------------


def reindexed(folder, change):
    """Apply ``change(manifest, index)`` to a packed set, and put the index's hash right."""
    manifest, index = (json.loads((folder / name).read_text()) for name in ("manifest.json", "index.json"))
    change(manifest, index)
    (folder / "index.json").write_text(json.dumps(index))
    manifest["index_sha256"] = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("change", [
    lambda manifest, index: manifest.update(shape=[10**6, 10**6, 3]),
    lambda manifest, index: manifest.update(shape=[5, 5]),
    lambda manifest, index: manifest.update(shape=None),
    lambda manifest, index: manifest.update(kind="pickle"),
    lambda manifest, index: manifest.update(classes=7),
    lambda manifest, index: index[0].update(file="../other/shard-000000.tar"),
    lambda manifest, index: index[0].update(keys=[1, 2, 3, 4]),
    lambda manifest, index: index[0].update(keys=["a"]),
    lambda manifest, index: index[0]["offsets"].__setitem__(0, -512),
    lambda manifest, index: index[0]["sizes"].__setitem__(0, 10**15),
    lambda manifest, index: index[0]["sizes"].__setitem__(0, 1.5),
    lambda manifest, index: index[0].update(labels=["a"] * 4),
    lambda manifest, index: index.__setitem__(0, [1]),
])  # fmt: skip
def test_an_index_that_makes_no_sense_is_refused(tmp_path, change, tolerant):
    reindexed(pack(tmp_path / "set", images(4)), change)
    with pytest.raises(InputError, match="unreadable packing"):
        ShardSet(tmp_path / "set", tolerant=tolerant, cache_dir=tmp_path / "cache")


def with_size(path, size):
    """The tar with another size in its second header, the checksum right."""
    data = bytearray(path.read_bytes())
    at = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"][1]
    data[at + 124 : at + 136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True) if size < 0 else b"%011o\0" % size
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)


@pytest.mark.parametrize("size", [-1024, -512, -(2**40), 8**11 - 1])
def test_a_member_that_leads_back_or_beyond_ends_the_walk(tmp_path, size):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(image)) for i, image in enumerate(images(4))])
    with_size(tmp_path / "a.tar", size)
    members, faults = walk_shard(tmp_path / "a.tar")
    assert [member.key for member in members] == ["0", "2", "3"] and len(faults) == 1
    with pytest.raises(InputError, match=r"a\.tar"):
        ShardSet(tmp_path)


def test_pipes_and_devices_are_no_shards(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").symlink_to("/dev/zero")
    for spec in (tmp_path, tmp_path / "a.tar", tmp_path / "b.tar"):
        with pytest.raises(InputError, match="not a regular file"):
            ShardSet(spec)


def bomb(side):
    """A png of a few bytes that claims ``side`` squared pixels."""
    return png_of_size(side, side, zlib.compress(bytes(1000)))


@pytest.mark.parametrize(("name", "data", "says"), [
    ("0.png", bomb(5000), "pixels"),
    ("0.png", bomb(100_000), "cannot be decoded"),
    ("0.npy", npz(a=np.zeros(4)), "several arrays"),
    ("0.npy", npy(np.array([1.0, np.nan])), "not finite"),
    ("0.npy", npy(np.array([1e300])), "not finite"),
    ("0.npy", npy(np.zeros(4)).replace(b"(4,)", b"(4000000000,)"), "cannot be decoded"),
    ("0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 8999 + b"1", "cannot be decoded"),
    ("0.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2) + b"{\n", "its header is no header"),
    ("0.npy", b"\x93NUMPY\x09\x09", "unknown .npy version"),
])  # fmt: skip
def test_samples_that_ask_for_more_than_they_are_cannot_be_decoded(tmp_path, recwarn, name, data, says):
    write_tar(tmp_path / "a.tar", [(name, data)])
    with pytest.raises(InputError, match=says):
        ShardSet(tmp_path)
    assert not recwarn


def test_columns_first_arrays_are_read_as_they_were_saved(tmp_path):
    values = np.arange(24.0).reshape(2, 3, 4)
    write_tar(tmp_path / "a.tar", [("0.npy", npy(np.asfortranarray(values)))])
    np.testing.assert_array_equal(ShardSet(tmp_path).read(0), values.astype(np.float32))
