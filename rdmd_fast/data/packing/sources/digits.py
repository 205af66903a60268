"""scikit-learn's handwritten digits (1,797 grey images of 8x8, 17 levels), each painted in several hues.

Held out is every fifth image of a digit, in the data's own order and starting with its first: 36 of the 177
"2"s, hence 288 samples at 8 hues.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

SEED = 0
HELD_OUT_EVERY = 5
SPLITS = ("train", "test")


def hue_to_rgb(hue: np.ndarray) -> np.ndarray:
    """Fully saturated colours (HSV with s = v = 1): hue [...] in [0, 1) to RGB [..., 3] in [0, 1]."""
    sector = np.asarray(hue, dtype=np.float64)[..., None] * 6
    # Each channel is a trapezoid of period 6 centred on its own primary at 0, 2 and 4.
    distance = np.abs((sector - np.array([0.0, 2.0, 4.0]) + 3) % 6 - 3)
    return np.clip(2 - distance, 0, 1)


def coloured_digits(
    digit: int, split: str, hues: int = 8, resolution: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The samples of one digit in one split, image by image, each in ``hues`` copies.

    Args:
        digit: 0 to 9.
        split: "train" or "test".
        hues: copies of each image; the hue of copy h of image i is the h-th uniform of position i in stream
            HUE of seed 0, so fewer copies are a subset of more.
        resolution: side in pixels; the grey image is resized before it is painted, by a bicubic filter. None: 8.

    Yields:
        (key, image): key like ``digit2_00017_hue3`` where 17 is the image's index in the data; image uint8
        [side, side, 3], the hue's colour times the grey value on black.

    Raises:
        InputError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed: pip install 'rdmd_fast[eval]'"
        ) from error
    data = load_digits()
    of_digit = np.flatnonzero(data.target == digit)
    held_out = np.arange(len(of_digit)) % HELD_OUT_EVERY == 0
    indices = of_digit[held_out if split == "test" else ~held_out]
    hue = Philox(SEED).uniform(Stream.HUE, torch.from_numpy(indices), hues).numpy()
    colours = hue_to_rgb(hue)
    for row, index in enumerate(indices):
        grey = _resized(data.images[index] / 16, resolution)
        for copy in range(hues):
            image = np.rint(255 * grey[..., None] * colours[row, copy]).astype(np.uint8)
            yield f"digit{digit}_{index:05d}_hue{copy}", image


def _resized(grey: np.ndarray, side: int | None) -> np.ndarray:
    """Grey values in [0, 1], [H, W], at ``side`` x ``side``; as they are for None."""
    if side is None or grey.shape == (side, side):
        return grey
    image = Image.fromarray(grey.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64).clip(0, 1)
