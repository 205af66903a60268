import zipfile

import material
import numpy as np
import pytest
from material import encoded, error_line, write_files

from rdmd_fast.data.packing.sources import celeba
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError

WIDTH, HEIGHT = 178, 218


def rows(count=12):
    """(name, Male, Smiling, split) of a small CelebA that holds every combination once."""
    return [(f"{i + 1:06d}.jpg", i % 2 == 0, i // 2 % 2 == 1, i // 4 % 3) for i in range(count)]


def picture(number):
    """A picture whose colour tells its number and whose central 140x140 pixels are brighter."""
    pixels = np.full((HEIGHT, WIDTH, 3), 4 * number, np.uint8)
    top, left = (HEIGHT - 140) // 2, (WIDTH - 140) // 2
    pixels[top : top + 140, left : left + 140] += 100
    return pixels


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return {name: encoded(picture(i), "JPEG", quality=95) for i, (name, *_) in enumerate(rows())}


@pytest.fixture
def folder(tmp_path, template):
    folder = tmp_path / "celeba"
    write_files(folder / "img_align_celeba", template)
    sign = {True: " 1", False: "-1"}
    lines = [f"{name} {sign[male]} {sign[smiling]}" for name, male, smiling, _ in rows()]
    (folder / celeba.ATTRIBUTES).write_text("\n".join([str(len(lines)), "Male Smiling ", *lines]) + "\n")
    (folder / celeba.PARTITION).write_text("".join(f"{name} {split}\n" for name, _, _, split in rows()))
    return folder


def pack(source, out, *words):
    return material.pack(f"celeba:{source}", "--out", out, "--resolution", 32, *words)


def expected_keys(male, split):
    return [name[:-4] for name, is_male, _, number in rows() if is_male == male and number == split]


def test_images_are_divided_by_attribute_and_official_split(folder, tmp_path):
    assert pack(folder, tmp_path / "out", "--attribute", "Male", "--crop", 140) == 0
    for side, male in (("Male", True), ("not_Male", False)):
        for number, split in enumerate(("train", "val", "test")):
            shards = ShardSet(tmp_path / "out" / side / split)
            assert shards.keys == expected_keys(male, number) and shards.shape == (32, 32, 3)
            for i, key in enumerate(shards.keys):
                # The crop is the bright centre alone; JPEG is worth a level or two.
                assert np.abs(shards.read(i).astype(int) - (4 * (int(key) - 1) + 100)).max() <= 3
    assert pack(folder, tmp_path / "out", "--attribute", "Male", "--crop", 140) == 0
    assert pack(folder, tmp_path / "out", "--attribute", "Smiling", "--crop", 140) == 0
    assert ShardSet(tmp_path / "out/Smiling/train").keys == [
        name[:-4] for name, _, smiling, split in rows() if smiling and split == 0
    ]


def test_without_a_crop_the_largest_square_is_kept(folder, tmp_path):
    assert pack(folder, tmp_path / "out", "--attribute", "Male") == 0
    image = ShardSet(tmp_path / "out/Male/train").read(0).astype(int)
    assert abs(image[0, 0, 0] - 0) <= 5 and abs(image[16, 16, 0] - 100) <= 3


def test_the_official_layout_with_a_zip_of_images_gives_the_same_shards(folder, tmp_path):
    pack(folder, tmp_path / "plain", "--attribute", "Male")
    official = tmp_path / "official"
    for part, name in (("Anno", celeba.ATTRIBUTES), ("Eval", celeba.PARTITION)):
        (official / part).mkdir(parents=True)
        (official / part / name).write_bytes((folder / name).read_bytes())
    (official / "Img").mkdir()
    with zipfile.ZipFile(official / "Img/img_align_celeba.zip", "w") as archive:
        for path in sorted((folder / "img_align_celeba").iterdir()):
            archive.write(path, f"img_align_celeba/{path.name}")
    assert pack(official, tmp_path / "zipped", "--attribute", "Male") == 0
    for part in ("Male/train", "not_Male/test"):
        first, second = ShardSet(tmp_path / "plain" / part), ShardSet(tmp_path / "zipped" / part)
        assert second.keys == first.keys
        np.testing.assert_array_equal(first.read(0), second.read(0))


def test_without_the_official_split_a_hold_out_is_asked_for(folder, tmp_path, capsys):
    assert pack(folder, tmp_path / "out", "--attribute", "Male", "--holdout", 0.5) == 2
    assert "tells the official split" in capsys.readouterr().err
    (folder / celeba.PARTITION).unlink()
    assert pack(folder, tmp_path / "out", "--attribute", "Male") == 2
    assert "give --holdout" in capsys.readouterr().err
    assert pack(folder, tmp_path / "out", "--attribute", "Male", "--holdout", 0.5) == 0
    train, test = (ShardSet(tmp_path / "out/Male" / split).keys for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 3)
    assert sorted(train + test) == [name[:-4] for name, male, _, _ in rows() if male]


@pytest.mark.parametrize(("attribute", "named"), [
    ("male", "did you mean Male?"), ("Smilin", "did you mean Smiling"), ("zzz", "Male, Smiling"),
])  # fmt: skip
def test_an_unknown_attribute_names_the_nearest(folder, attribute, named):
    with pytest.raises(InputError, match=named.replace("?", r"\?")):
        celeba.read_attribute(folder / celeba.ATTRIBUTES, attribute)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: edit(f / celeba.ATTRIBUTES, "12\n", "13\n"), "lists 12 images where its first line says 13"),
    (lambda f: edit(f / celeba.ATTRIBUTES, "12\n", "x\n"), "no image count"),
    (lambda f: edit(f / celeba.ATTRIBUTES, "000002.jpg -1 -1", "000002.jpg 0 -1"), "line 4"),
    (lambda f: edit(f / celeba.ATTRIBUTES, "000002.jpg -1 -1", "000002.jpg -1"), "line 4"),
    (lambda f: (f / celeba.ATTRIBUTES).write_bytes(b"\xff\xfe\x00"), "cannot be read as text"),
    (lambda f: (f / celeba.ATTRIBUTES).write_text(""), "no image count"),
    (lambda f: (f / celeba.ATTRIBUTES).unlink(), "holds no list_attr_celeba.txt"),
    (lambda f: edit(f / celeba.PARTITION, "000005.jpg 1", "000005.jpg 7"), "line 5"),
    (lambda f: edit(f / celeba.PARTITION, "000005.jpg 1\n", ""), "lacks 1 of 12 images, first 000005.jpg"),
    (lambda f: (f / "img_align_celeba/000005.jpg").unlink(), "lacks 1 of the 12 images"),
    (lambda f: (f / "img_align_celeba/000005.jpg").write_bytes(b"x"), "000005.jpg"),
    (lambda f: (f / "img_align_celeba").rename(f / "img"), "holds neither img_align_celeba/"),
])  # fmt: skip
def test_damage_is_one_line(folder, tmp_path, capsys, damage, message):
    damage(folder)
    assert pack(folder, tmp_path / "out", "--attribute", "Male") == 2
    assert message in error_line(capsys, "skipped, unreadable: ")
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_no_attribute_and_one_that_all_have_are_refused(folder, tmp_path, capsys):
    assert pack(folder, tmp_path / "out") == 2
    assert "needs --attribute" in capsys.readouterr().err
    edit(folder / celeba.ATTRIBUTES, "-1", " 1")
    assert pack(folder, tmp_path / "out", "--attribute", "Male") == 2
    assert "not_Male/train" in capsys.readouterr().err
