import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from rdmd_fast.errors import InputError
from rdmd_fast.monitoring import drawing
from rdmd_fast.monitoring.drawing import image_grid, toy_picture


def tiles_of(path, rows, columns, side):
    """The tiles of an unlabelled grid, uint8 [rows, columns, side, side, 3]."""
    picture = np.asarray(Image.open(path))
    starts = [drawing.MARGIN + i * (side + drawing.GUTTER) for i in range(max(rows, columns))]
    return np.array(
        [[picture[top : top + side, left : left + side] for left in starts[:columns]] for top in starts[:rows]]
    )


def test_small_images_are_enlarged_without_smoothing_and_come_back_exactly(tmp_path):
    pixels = torch.randint(0, 256, (2, 3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = pixels / 127.5 - 1
    image_grid([("", images[0]), ("", images[1])], tmp_path / "grid.png")
    tiles = tiles_of(tmp_path / "grid.png", 2, 3, 48)
    expected = pixels.permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_array_equal(tiles[:, :, 3::6, 3::6], expected)
    np.testing.assert_array_equal(tiles[:, :, ::6, 5::6], expected)


def test_large_images_keep_their_size_and_one_channel_becomes_grey(tmp_path):
    image_grid([("", torch.zeros(2, 1, 64, 64))], tmp_path / "new" / "grid.png")
    tiles = tiles_of(tmp_path / "new" / "grid.png", 1, 2, 64)
    assert (tiles == 128).all()


def test_values_out_of_range_saturate_and_nan_still_draws(tmp_path):
    row = torch.tensor([-3.0, 3.0, float("nan"), float("inf")]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    image_grid([("", row)], tmp_path / "grid.png")
    assert tiles_of(tmp_path / "grid.png", 1, 4, 48)[0, :, 0, 0, 0].tolist() == [0, 255, 128, 255]


def test_labels_stand_left_of_the_tiles_and_short_rows_stay_white(tmp_path):
    dark = -torch.ones(3, 3, 8, 8)
    image_grid([("source", dark), ("λ = 0.1\nstep 20", dark[:1])], tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    first_tile = picture.shape[1] - drawing.MARGIN - 3 * 48 - 2 * drawing.GUTTER
    ink = (picture[:, : first_tile - 1] < 128).any(axis=(1, 2))
    assert ink[drawing.MARGIN : drawing.MARGIN + 48].any()
    assert ink[drawing.MARGIN + 48 + drawing.GUTTER :].any()
    assert (picture[drawing.MARGIN + 60 :, first_tile + 50 :] == 255).all()
    assert (picture[:, : drawing.MARGIN - 1] == 255).all()


def test_a_failed_write_leaves_the_old_picture_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    image_grid([("", torch.zeros(1, 3, 8, 8))], path)
    before = path.read_bytes()

    def interrupted(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        image_grid([("", torch.ones(1, 3, 8, 8))], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_bad_grids_are_refused(tmp_path):
    for rows in ([], [("a", torch.zeros(1, 3, 8, 8)), ("b", torch.zeros(1, 3, 9, 8))], [("", torch.zeros(3, 8, 8))]):
        with pytest.raises(InputError):
            image_grid(rows, tmp_path / "grid.png")


def test_image_grids_need_no_matplotlib():
    code = "import sys, rdmd_fast.monitoring.drawing; sys.exit('matplotlib' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_toy_picture_draws_every_cloud_and_the_asked_number_of_segments(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig

    def recorded(figure, *args, **kwargs):
        drawn.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", recorded)
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(60, 2)), rng.normal(size=(80, 2))
    output = source + np.array([10.0, 0.0])
    toy_picture(source, torch.tensor(output), target, tmp_path / "toy.png", "shift", segments=7)
    panels = drawn[0].axes
    segments = next(c for c in panels[1].collections if hasattr(c, "get_segments")).get_segments()
    np.testing.assert_allclose(segments, np.stack([source[:7], output[:7]], axis=1))
    clouds = [panel.collections[-1].get_offsets() for panel in panels]
    for cloud, expected in zip(clouds, (source, output, target), strict=True):
        np.testing.assert_allclose(cloud, expected)
    assert {panel.get_aspect() for panel in panels} == {1.0}
    assert {panel.get_xlim() for panel in panels} == {panels[0].get_xlim()}
    assert panels[0].get_xlim()[0] < source[:, 0].min() < output[:, 0].max() < panels[0].get_xlim()[1]


def test_the_toy_picture_is_a_whole_png(tmp_path):
    cloud = np.random.default_rng(0).normal(size=(30, 2))
    toy_picture(cloud, cloud, cloud, tmp_path / "pictures" / "toy.png")
    with Image.open(tmp_path / "pictures" / "toy.png") as picture:
        picture.load()
        assert picture.width > 2 * picture.height
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_bad_clouds_are_refused(tmp_path):
    cloud = np.zeros((5, 2))
    with pytest.raises(InputError, match="paired"):
        toy_picture(cloud, cloud[:4], cloud, tmp_path / "toy.png")
    with pytest.raises(InputError, match="NaN"):
        toy_picture(cloud, cloud * np.nan, cloud, tmp_path / "toy.png")


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib .*rdmd_fast\[eval\]"):
        toy_picture(np.zeros((5, 2)), np.zeros((5, 2)), np.zeros((5, 2)), tmp_path / "toy.png")
