"""Images of any size through pieces of one size: what is cut apart comes together again."""

import itertools
import tracemalloc

import numpy as np
import pytest
from material import random_pixels
from PIL import Image

from rdmd_fast.errors import InputError
from rdmd_fast.translation.sizes import Crop, Resize, Tiles, make_size, tile_axis

AXES = [
    (8, 8, 0.25), (9, 8, 0.25), (15, 8, 0.25), (16, 8, 0.0), (100, 8, 0.25), (101, 7, 0.5), (64, 16, 0.9),
    (5, 1, 0.5),
]  # fmt: skip


def picture(height: int, width: int) -> np.ndarray:
    return random_pixels(height * 100 + width, height, width, 3)


@pytest.mark.parametrize(("length", "side", "overlap"), AXES)
def test_weights_of_tiles_sum_to_one_and_tiles_are_few_enough(length, side, overlap):
    tiles = tile_axis(length, side, overlap)
    total = np.zeros(length)
    for start, weights in tiles:
        assert weights.dtype == np.float32 and len(weights) == side and weights.min() > 0
        total[start : start + side] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    common = [first + side - second for (first, _), (second, _) in itertools.pairwise(tiles)]
    assert all(each >= min(round(overlap * side), side - 1) for each in common)
    assert tiles[0][0] == 0 and tiles[-1][0] == length - side
    fewer = side + (len(tiles) - 2) * (side - min(round(overlap * side), side - 1))  # pixels that one less would cover
    assert len(tiles) == 1 or fewer < length


def test_two_tiles_fade_by_a_raised_cosine():
    (_, left), (start, right) = tile_axis(12, 8, 0.5)
    assert start == 4
    u = (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(right[:4], (1 - np.cos(np.pi * u)) / 2, atol=1e-6)
    np.testing.assert_allclose(left[4:], (1 + np.cos(np.pi * u)) / 2, atol=1e-6)
    assert (left[:4] == 1).all() and (right[4:] == 1).all()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("shape", [(8, 6), (9, 31), (40, 7), (3, 50), (8, 1), (1, 1), (2, 2)])
def test_tiles_that_nothing_changes_make_the_same_image(shape, overlap):
    tiles, image = Tiles(8, 6, overlap), picture(*shape)
    pieces = np.stack(list(tiles.split(image)))
    assert pieces.shape[1:] == (8, 6, 3) and pieces.dtype == np.uint8
    np.testing.assert_array_equal(tiles.join(pieces.astype(np.float32), *shape), image)
    constant = np.full(pieces.shape, 17.4, np.float32)
    np.testing.assert_array_equal(tiles.join(constant, *shape), np.full((*shape, 3), 17))


def test_tiles_lie_where_they_were_cut():
    """Each pixel of a piece is told where it came from; only pixels of that place may end there."""
    tiles, (height, width) = Tiles(8, 8, 0.25), (21, 30)
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(tiles.join(map(np.float32, tiles.split(image)), height, width), image)


def test_tiles_are_never_all_in_memory():
    """With a share of 0.9 they are a hundred times the image's 14,700 bytes; its float canvas is four times them."""
    tiles, image = Tiles(10, 10, 0.9), picture(70, 70)
    tracemalloc.start()
    try:
        tiles.join(map(np.float32, tiles.split(image)), 70, 70)
        assert tracemalloc.get_traced_memory()[1] < 20 * image.nbytes
    finally:
        tracemalloc.stop()


def test_seams_are_smooth():
    """Neighbours that disagree by 100 levels: no step between two pixels is larger than the cosine's steepest."""
    tiles = Tiles(64, 64, 0.5)
    pieces = np.zeros((2, 64, 64, 3), np.float32)
    pieces[1] = 100
    line = tiles.join(pieces, 64, 96)[0, :, 0].astype(int)
    steps = np.diff(line)
    assert line[0] == 0 and line[-1] == 100 and steps.min() >= 0
    assert steps.max() <= np.ceil(100 * np.pi / 2 / 32)


@pytest.mark.parametrize("shape", [(8, 8), (20, 9), (3, 5)])
def test_resize_is_lanczos_there_and_back(shape):
    size, image = Resize(8, 8), picture(*shape)
    small = Image.fromarray(image).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(size.split(image), np.asarray(small)[None])
    back = np.asarray(small.resize(shape[::-1], Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(size.join(size.split(image), *shape), back)
    if shape == (8, 8):
        np.testing.assert_array_equal(back, image)


def test_crop_is_the_central_square():
    image = picture(8, 14)
    (piece,) = Crop(8, 8).split(image)
    np.testing.assert_array_equal(piece, image[:, 3:11])
    np.testing.assert_array_equal(Crop(8, 8).join(piece[None], 8, 14), piece)


@pytest.mark.parametrize(("name", "overlap"), [("crop", 0.5), ("resize", 0.5), ("tiles", 1.0), ("tiles", float("nan"))])
def test_overlap_is_of_tiles_and_a_share(name, overlap):
    with pytest.raises(InputError, match="--overlap"):
        make_size(name, 8, 8, overlap)
