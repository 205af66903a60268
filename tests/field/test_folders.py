"""Which files of a folder are taken, by every command alike, and what is said of the others."""

import json
import os
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from material import as_another, encoded, files_of, picture, write_pictures, write_tar

from rdmd_fast.data.file_walk import walk_files
from rdmd_fast.data.shards.folder_kind import Kind, look_into
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError


def test_a_folder_that_may_not_be_listed_is_an_error_that_names_it(shared):
    write_pictures(shared / "photos", "cats/a.png", "dogs/b.png")
    os.chmod(shared / "photos/dogs", 0)
    said = as_another(lambda: walk_files(shared / "photos"))
    assert f"InputError: {shared}/photos/dogs: cannot be listed (Permission denied)" in said


@pytest.mark.parametrize("target", [".", "..", "inner", "inner/deep/.."])
def test_a_link_back_up_is_not_followed_and_said(tmp_path, rdmd, target):
    photos = write_pictures(tmp_path / "photos", "a.png", "inner/b.png", "inner/deep/c.png")
    os.symlink(target, photos / "inner/loop", target_is_directory=True)
    os.symlink(photos, photos / "inner/deep/up", target_is_directory=True)
    os.symlink("itself", photos / "itself")
    done = rdmd("pack", photos, "--out", tmp_path / "set", "--resolution", 8)
    wanted = ["a", "inner/b", "inner/deep/c"]
    if target == "inner":  # a link that leads nowhere is no folder and no image
        assert ShardSet(tmp_path / "set").keys == wanted
        return
    assert set(ShardSet(tmp_path / "set").keys) >= set(wanted)
    assert "link to a folder that it lies in" in done.err
    assert len(ShardSet(tmp_path / "set").keys) <= 2 * len(wanted)


def test_each_real_folder_is_taken_once_along_a_path(tmp_path):
    write_pictures(tmp_path / "photos", "a/1.png", "b/2.png")
    os.symlink("../b", tmp_path / "photos/a/to_b")
    os.symlink("../a", tmp_path / "photos/b/to_a")
    files = walk_files(tmp_path / "photos")
    assert files.paths == ["a/1.png", "a/to_b/2.png", "b/2.png", "b/to_a/1.png"]
    assert dict(files.left_out) == {
        "link to a folder that it lies in (a/to_b/to_a)": 1,
        "link to a folder that it lies in (b/to_a/to_b)": 1,
    }


def test_images_of_other_formats_and_thumbnails_of_servers_are_said(tmp_path, rdmd, translate):
    photos = write_pictures(tmp_path / "photos", "cats/a.png", "cats/b.jfif", "dogs/c.PNG", "@eaDir/a.png/thumb.png")
    write_pictures(photos, "cats/@eaDir/a.jpg")
    for name in ("cats/x.heic", "cats/y.HEIC", "z.avif", "notes.txt"):
        (photos / name).write_bytes(b"unread")
    packed = rdmd("pack", photos, "--out", tmp_path / "set", "--resolution", 8, "--labels")
    assert packed.status == 0 and ShardSet(tmp_path / "set").keys == ["cats/a", "cats/b", "dogs/c"]
    assert json.loads((tmp_path / "set/manifest.json").read_text())["classes"] == ["cats", "dogs"]
    translated = translate(photos, tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == ["cats/a.png", "cats/b.png", "dogs/c.png"]
    for done in (packed, translated):
        assert "left out 1 × .avif files, 2 × .heic files, 2 × folder @eaDir" in done.err
        assert "txt" not in done.err


def test_images_beside_the_tar_they_came_from_are_the_images(tmp_path, rdmd, translate):
    photos = write_pictures(tmp_path / "photos", *(f"{number}.png" for number in range(6)))
    write_tar(photos / "backup.tar", {f"down/{number}.png": encoded(picture(number)) for number in range(2)})
    (photos / "manifest.json").write_text('{"name": "album", "icons": [], "version": 1}')
    done = translate(photos, tmp_path / "out")
    assert done.status == 0 and len(sorted(files_of(tmp_path / "out"))) == 6
    assert "left out 1 × .tar files" in done.err
    assert rdmd("pack", photos, "--out", tmp_path / "set", "--resolution", 8).status == 0
    assert len(ShardSet(tmp_path / "set").keys) == 6
    done = rdmd("evaluate", "--outputs", photos, "--source", photos, "--target", photos, "--resolution", 8)
    assert done.status == 0 and "target: 6 images" in done.out


@pytest.mark.parametrize("stray", ["more.tar", "levels.npy", "manifest.json"])
def test_a_mixed_folder_is_refused_by_every_command_with_a_files_name(tmp_path, rdmd, translate, stray):
    photos = write_pictures(tmp_path / "photos", "a.png", "b.png")
    if stray == "more.tar":
        write_tar(photos / stray, {"c.png": encoded(picture(3))})
    elif stray == "levels.npy":
        np.save(photos / stray, np.zeros((3, 8, 8), np.float32))
    else:
        write_pictures(tmp_path / "other", "c.png")
        rdmd("pack", tmp_path / "other", "--out", tmp_path / "set", "--resolution", 8)
        shutil.copytree(tmp_path / "set", photos, dirs_exist_ok=True)
    for done in (
        translate(photos, tmp_path / "out"),
        rdmd("pack", photos, "--out", tmp_path / "new", "--resolution", 8),
        rdmd("pack", "--check", photos),
        rdmd("evaluate", "--outputs", photos, "--source", photos, "--target", photos),
    ):
        assert done.status == 2 and str(photos) in done.err and stray in done.err and "a.png" in done.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_tars_beside_another_programs_manifest_are_tars(tmp_path, translate):
    write_tar(tmp_path / "tars/part-0.tar", {"a.png": encoded(picture())})
    (tmp_path / "tars/manifest.json").write_text("[1, 2]")
    assert look_into(tmp_path / "tars").kind is Kind.TARS
    assert translate(tmp_path / "tars", tmp_path / "out").status == 0 and sorted(files_of(tmp_path / "out")) == [
        "a.png"
    ]


@pytest.mark.parametrize("inside", ["", "results"])
def test_an_output_inside_its_input_is_refused_by_every_command(tmp_path, rdmd, translate, inside):
    photos = write_pictures(tmp_path / "photos", "a.png", "b.png")
    os.symlink(photos, tmp_path / "link")
    before = sorted(files_of(photos))
    place = tmp_path / "link" / inside
    for done in (
        translate(photos, place),
        rdmd("pack", photos, "--out", place, "--resolution", 8),
        rdmd(
            *("evaluate", "--outputs", photos, "--source", photos, "--target", photos, "--resolution", 8),
            *("--picture", place / "grid.png"),
        ),
    ):
        assert done.status == 2 and str(place) in done.err and "results would mix" in done.err
    assert sorted(files_of(photos)) == before


def test_shards_never_go_beside_images_or_over_another_programs_manifest(tmp_path, rdmd):
    source = write_pictures(tmp_path / "photos", "a.png")
    for stray in ("b.png", "manifest.json"):
        out = tmp_path / stray.partition(".")[0]
        out.mkdir()
        (out / stray).write_text("{}")
        done = rdmd("pack", source, "--out", out, "--resolution", 8, "--force")
        assert done.status == 2 and stray in done.err and sorted(files_of(out)) == [stray]


def test_members_with_dots_in_their_names_are_images_of_their_own(tmp_path, rdmd, translate):
    names = ["plain.png", *(f"img v1.{number}.png" for number in range(3)), "deep/cat.final.png"]
    pictures = {name: encoded(picture(number)) for number, name in enumerate(names)}
    write_tar(tmp_path / "tars/a.tar", pictures)
    assert translate(tmp_path / "tars", tmp_path / "out").status == 0
    assert sorted(files_of(tmp_path / "out")) == sorted(names)
    assert rdmd("pack", tmp_path / "tars", "--out", tmp_path / "set", "--resolution", 8).status == 0
    wanted = ["plain", "img v1_0", "img v1_1", "img v1_2", "deep/cat_final"]
    assert ShardSet(tmp_path / "set").keys == wanted


def test_members_that_are_no_samples_are_counted_and_said(tmp_path, rdmd, translate):
    members = {}
    for number in range(3):
        members |= {
            f"{number}.png": encoded(picture(number)),
            f"{number}.seg.png": encoded(picture(9)),
        }
    members |= {"x.heic": b"", "y.bmp": b"", "@eaDir/z.png": b"", "0.txt": b"caption", "0.v2.png": encoded(picture(8))}
    write_tar(tmp_path / "tars/a.tar", members)
    said = (
        "left out 1 × .bmp members, 1 × .heic members, 3 × .seg.png members, 1 × .v2.png members, 1 × members in @eaDir"
    )
    for done in (
        translate(tmp_path / "tars", tmp_path / "out"),
        rdmd("pack", tmp_path / "tars", "--out", tmp_path / "set", "--resolution", 8),
        rdmd("pack", "--check", tmp_path / "tars"),
    ):
        assert done.status == 0 and said in done.err
    assert sorted(files_of(tmp_path / "out")) == ["0.png", "1.png", "2.png"]
    assert ShardSet(tmp_path / "set").keys == ["0", "1", "2"]


def test_a_word_that_comes_again_and_again_is_a_field_and_no_sample(tmp_path, translate):
    names = [f"{number}.{word}.png" for number in range(2) for word in ("input", "target")]
    write_tar(tmp_path / "tars/a.tar", {name: encoded(picture()) for name in names})
    done = translate(tmp_path / "tars", tmp_path / "out")
    assert done.status == 2 and "only input.png, target.png" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("first, second", [("jpg", "png"), ("webp", "jpeg")])
def test_a_photo_and_its_mask_under_one_key_are_refused_or_one_is_chosen(tmp_path, rdmd, translate, first, second):
    members = {}
    for number in range(4):
        members[f"{number:04d}.{first}"] = encoded(picture(number), {"jpg": "JPEG"}.get(first, first))
        members[f"{number:04d}.{second}"] = encoded(np.full((8, 8, 3), 255, np.uint8), second)
    write_tar(tmp_path / "tars/a.tar", members)
    assert translate(tmp_path / "tars", tmp_path / "out").status == 2
    done = rdmd("pack", tmp_path / "tars", "--out", tmp_path / "set", "--resolution", 8)
    assert done.status == 2 and f"share the key '0000' ({first} and {second})" in done.err
    assert f"--extension {first}" in done.err and not (tmp_path / "set/manifest.json").exists()
    done = rdmd("pack", tmp_path / "tars", "--out", tmp_path / "set", "--resolution", 8, "--extension", second)
    assert done.status == 0 and "4 samples" in done.out


def test_files_that_differ_in_their_suffix_alone_are_said(tmp_path, rdmd):
    photos = write_pictures(tmp_path / "photos", "a.jpg", "a.png", "b.jpg", "b.png", "c.jpg")
    done = rdmd("pack", photos, "--out", tmp_path / "both", "--resolution", 8)
    assert "a.jpg and a.png differ in their suffix alone, as 2 names do" in done.err
    rdmd("pack", photos, "--out", tmp_path / "one", "--resolution", 8, "--extension", ".jpg")
    assert ShardSet(tmp_path / "both").keys == ["a_jpg", "a_png", "b_jpg", "b_png", "c"]
    assert ShardSet(tmp_path / "one").keys == ["a", "b", "c"]


def test_what_is_no_folder_of_samples_is_called_what_it_is(tmp_path, rdmd, translate):
    photos = write_pictures(tmp_path / "photos", "a.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(photos / "a.png", "a.png")
    np.savez(tmp_path / "x.npz", np.zeros(3))
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    for name, said in (
        ("x.zip", f"x.zip: is a zip archive, which `rdmd pack {tmp_path}/x.zip"),
        ("x.npz", "x.npz: is a NumPy file"),
        ("x.tar.gz", "x.tar.gz: is a compressed archive; unpack it"),
        ("photos/a.png", "a.png: is one image; name the folder"),
        ("none", "no such folder"),
    ):
        for role in ("--source", "--target"):
            roles = {"--source": photos, "--target": photos} | {role: tmp_path / name}
            done = rdmd("evaluate", "--outputs", photos, *(word for pair in roles.items() for word in pair))
            assert done.status == 2 and said in done.err and "truncated" not in done.err
        assert said in translate(tmp_path / name, tmp_path / "out").err


def test_names_in_two_spellings_of_unicode_are_pairs(tmp_path, rdmd):
    names = [unicodedata.normalize(form, "Café.png") for form in ("NFC", "NFD")]
    for folder, name in zip(("source", "outputs"), names, strict=True):
        write_pictures(tmp_path / folder, name)
    done = rdmd(
        *("evaluate", "--outputs", tmp_path / "outputs", "--source", tmp_path / "source"),
        *("--target", tmp_path / "source", "--out", tmp_path / "report.json", "--resolution", 8),
    )
    assert done.status == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"][-1]["mse_per_pixel"] == 0
    write_pictures(tmp_path / "outputs", names[0])
    done = rdmd("evaluate", "--outputs", tmp_path / "outputs", "--source", tmp_path / "source", "--target", tmp_path)
    assert done.status == 2 and "two ways of Unicode" in done.err


@pytest.mark.parametrize("place", ["", "train", "train/run"])
def test_a_run_inside_its_data_is_refused(tmp_path, rdmd, capfd, place):
    from rdmd_fast import trainer

    photos = write_pictures(tmp_path / "photos", *(f"{number}.png" for number in range(10)))
    rdmd("pack", photos, "--out", tmp_path / "set", "--resolution", 8, "--holdout", 0.2)
    data = [f"data.source=[{tmp_path}/set/train]", f"data.target={tmp_path}/set/test::{tmp_path}/set"]
    config = str(Path(__file__).parents[2] / "configs/digits/rdmd_2to3.yaml")
    before = sorted(files_of(tmp_path / "set"))
    assert trainer.main(["--config", config, *data, f"run_dir={tmp_path}/set/{place}"]) == 2
    error = capfd.readouterr().err
    assert f"run_dir {tmp_path}/set" in error and "results would mix" in error
    assert sorted(files_of(tmp_path / "set")) == before


@pytest.mark.parametrize(("kind", "said"), [("images", "but images; make shards"), ("zip", "is a zip archive")])
def test_training_says_what_is_no_set_of_shards(tmp_path, kind, said):
    source = write_pictures(tmp_path / "photos", "a.png")
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.write(source / "a.png", "a.png")
        source = tmp_path / "x.zip"
    with pytest.raises(InputError, match=said):
        ShardSet(str(source), tolerant=True)
