"""How an image of any size goes through a generator of one size.

A size cuts an image into pieces of the generator's resolution (``split``) and makes an image of their translations
(``join``), both one after the other. Images are uint8 [H, W, 3]; pieces [h, w, 3]; translated pieces are levels from 0
to 255, float32 where ``blends`` and uint8 elsewhere. A size that blends may have any number of pieces, others have one.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from rdmd_fast.errors import InputError

OVERLAP = 0.25


class Crop(NamedTuple):
    """The central square at the generator's resolution, as `rdmd pack` prepares images; so is what comes out."""

    height: int
    width: int

    blends = False

    def split(self, image: np.ndarray) -> np.ndarray:
        from rdmd_fast.data.pictures import central_square

        if image.shape[:2] == (self.height, self.width):
            return image[None]
        return np.asarray(central_square(Image.fromarray(image), self.height))[None]

    def join(self, pieces: np.ndarray, height: int, width: int) -> np.ndarray:
        return pieces[0]


class Resize(NamedTuple):
    """The whole image, resized to the generator's resolution and back, both by a Lanczos filter (windowed sinc, 3
    lobes, widened where it shrinks). Its aspect changes on the way."""

    height: int
    width: int

    blends = False

    def split(self, image: np.ndarray) -> np.ndarray:
        return _resized(image, self.height, self.width)[None]

    def join(self, pieces: np.ndarray, height: int, width: int) -> np.ndarray:
        return _resized(pieces[0], height, width)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


class Tiles(NamedTuple):
    """Overlapping tiles at the image's own scale, blended by raised cosines that sum to one at every pixel.

    An image that is smaller than a tile is reflected at its borders to a tile's size, and cut out again.

    Attributes:
        overlap: least share of a tile's side that the next one covers too, from 0 to below 1.
    """

    height: int
    width: int
    overlap: float = OVERLAP

    blends = True

    def split(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """Views of ``image``: a share of 0.9 covers each pixel a hundred times."""
        margins = [_margin(*sides) for sides in zip(image.shape[:2], (self.height, self.width), strict=True)]
        if any(itertools.chain(*margins)):
            image = np.pad(image, (*margins, (0, 0)), mode="reflect")
        rows, columns = self._axes(*image.shape[:2])
        for (top, _), (left, _) in itertools.product(rows, columns):
            yield image[top : top + self.height, left : left + self.width]

    def join(self, pieces: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
        """Holds the image in float32 and the piece that it takes next."""
        (above, below), (before, after) = _margin(height, self.height), _margin(width, self.width)
        sides = above + height + below, before + width + after
        image = None
        rows, columns = self._axes(*sides)
        for piece, ((top, down), (left, across)) in zip(pieces, itertools.product(rows, columns), strict=True):
            if image is None:
                image = np.zeros((*sides, piece.shape[-1]), np.float32)
            image[top : top + self.height, left : left + self.width] += np.outer(down, across)[..., None] * piece
        return np.rint(image, out=image)[above : above + height, before : before + width].astype(np.uint8)

    def _axes(self, height: int, width: int):
        return tile_axis(height, self.height, self.overlap), tile_axis(width, self.width, self.overlap)


def tile_axis(length: int, side: int, overlap: float) -> list[tuple[int, np.ndarray]]:
    """Evenly spread tiles along an axis of ``length`` >= ``side`` pixels, as few as cover it.

    Args:
        overlap: least share of ``side`` that neighbours have in common, in [0, 1).

    Returns:
        (first pixel, weights float32 [side]) of each. At every pixel the weights of all tiles sum to 1; where two
        overlap each falls as a raised cosine, cos²(π u / 2), over u from 0 to 1.
    """
    common = min(round(overlap * side), side - 1)
    count = 1 if length == side else math.ceil((length - common) / (side - common))
    starts = np.rint(np.linspace(0, length - side, count)).astype(int).tolist()
    windows, total = [], np.zeros(length)
    for number, start in enumerate(starts):
        window = np.ones(side)
        if number > 0:
            window *= _rise(side, starts[number - 1] + side - start)
        if number + 1 < count:
            window *= _rise(side, start + side - starts[number + 1])[::-1]
        windows.append(window)
        total[start : start + side] += window
    return [
        (start, (window / total[start : start + side]).astype(np.float32))
        for start, window in zip(starts, windows, strict=True)
    ]


def _rise(side: int, length: int) -> np.ndarray:
    """Ones after a rise over the first ``length`` pixels, taken at their centres: never 0, so total never is."""
    window = np.ones(side)
    window[:length] = np.sin(np.pi / 2 * (np.arange(length) + 0.5) / max(length, 1)) ** 2
    return window


def _margin(length: int, side: int) -> tuple[int, int]:
    """Pixels that are missing to a tile's side, before and after."""
    missing = max(0, side - length)
    return missing // 2, missing - missing // 2


SIZES = {"crop": Crop, "resize": Resize, "tiles": Tiles}


def make_size(name: str, height: int, width: int, overlap: float | None = None) -> Crop | Resize | Tiles:
    """The size of that name for a generator of images ``height`` x ``width``.

    Raises:
        InputError: an overlap for another size than tiles, or out of range.
    """
    if overlap is None:
        return SIZES[name](height, width)
    if name != "tiles":
        raise InputError(f"--overlap {overlap:g}: is for --size tiles, leave it out")
    if not 0 <= overlap <= 0.9:
        raise InputError(f"--overlap {overlap:g}: give a share of a tile's side from 0 to 0.9")
    return Tiles(height, width, overlap)
