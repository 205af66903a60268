"""What `rdmd translate` and `rdmd baseline` write: an image file or a .npy array a sample, whole or not at all."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rdmd_fast.errors import InputError

# Suffix -> what Pillow is asked for. At quality 95 without subsampled colour, losses are hardly visible.
FORMATS = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}
LONGEST = {"jpg": 65_500, "webp": 16_383}
"""Pixels of a side that libjpeg (JPEG_MAX_DIMENSION) and libwebp (WEBP_MAX_DIMENSION) write at most."""


class Outputs(NamedTuple):
    """Files below ``folder``.

    Attributes:
        images: suffix of image files (a key of ``FORMATS``), or None for none.
        arrays: whether there are .npy files.
    """

    folder: Path
    images: str | None
    arrays: bool

    def files(self, names: Iterable[str]) -> Iterator[str]:
        """Relative paths of the files of samples."""
        suffixes = ["npy"] * self.arrays + [self.images] * bool(self.images)
        return (f"{name}.{suffix}" for name in names for suffix in suffixes)

    def are_there(self, name: str) -> bool:
        """Whether all files of a sample are whole."""
        return all(is_whole(self.folder / file) for file in self.files([name]))

    def write(self, name: str, array: np.ndarray | None, image: np.ndarray | None) -> None:
        """Write float32 [C, H, W] and uint8 [H, W, 3 or 1]; InputError for what cannot be written."""
        if self.arrays:
            _replace(self.folder / f"{name}.npy", lambda file: np.save(file, array))
        if self.images:
            height, width = image.shape[:2]
            if max(height, width) > LONGEST.get(self.images, max(height, width)):
                raise InputError(
                    f"--format {self.images}: {name} has {width}×{height} pixels, {LONGEST[self.images]:,} a side is "
                    "the most of this format; use png"
                )
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            _replace(self.folder / f"{name}.{self.images}", lambda file: picture.save(file, **FORMATS[self.images]))


def is_whole(path: Path) -> bool:
    """Whether a file that ``Outputs`` wrote has its beginning and its end: files of a crashed machine may not."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            length = file.seek(0, 2)
            file.seek(-min(12, length), 2)
            tail = file.read()
            if head[:6] == b"\x93NUMPY":
                file.seek(0)
                return _is_whole_array(file, length)
    except OSError:
        return False
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return tail[4:8] == b"IEND"
    if head[:2] == b"\xff\xd8":
        return tail[-2:] == b"\xff\xd9"
    return head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 == length


def _is_whole_array(file, length: int) -> bool:
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return False
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return False
    return length == file.tell() + dtype.itemsize * int(np.prod(shape))


def _replace(path: Path, save: Callable) -> None:
    """``replace_file``; what stops it is an error of --output."""
    from rdmd_fast.files import replace_file

    try:
        replace_file(path, save)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from None
