"""Image files in: from a picture to a square uint8 RGB array, and from a nested folder to sorted keys."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rdmd_fast.data.shards.decode_images import check_webp_size, to_rgb
from rdmd_fast.errors import InputError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


# Of those that Pillow knows, the ones of these suffixes: it would run Ghostscript on others, whatever they are named.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
"""Of a picture to pack, 179 million: Pillow refuses more, as a file of a few KiB can ask for gigabytes."""

Job = TypeVar("Job")
Result = TypeVar("Result")


def load_picture(file: str | Path | BinaryIO) -> Image.Image:
    """A picture in RGB, upright by its EXIF orientation.

    Args:
        file: image file, by path or open.

    Raises:
        OSError, ValueError and others: unreadable image (``decode_images.UNREADABLE``).
    """
    if isinstance(file, str | Path):
        if not Path(file).is_file():  # a pipe would never end
            raise ValueError("not a regular file")
        with open(file, "rb") as content:
            return load_picture(content)
    check_webp_size(file.read(32), MOST_PIXELS)
    file.seek(0)
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:  # its message holds a memory address
        raise ValueError("not an image of a known format") from None
    with opened:
        return to_rgb(ImageOps.exif_transpose(opened))


def load_image(file: str | Path | BinaryIO, resolution: int, crop: int | None = None) -> np.ndarray:
    """The central square of ``load_picture``, resized by ``central_square``; errors as there and below.

    Returns:
        uint8 [resolution, resolution, 3].
    """
    return np.asarray(central_square(load_picture(file), resolution, crop))


def central_square(image: Image.Image, resolution: int, crop: int | None = None) -> Image.Image:
    """Crop the central square of a picture and resize it by a Lanczos filter.

    Args:
        image: of any size.
        resolution: side of the result in pixels; smaller squares are enlarged.
        crop: side of the central square in pixels; None takes the largest.

    Raises:
        ValueError: an image smaller than ``crop``.
    """
    width, height = image.size
    side = crop or min(width, height)
    if side > min(width, height):
        raise ValueError(f"{width}x{height} pixels are too few for a central square of {side}")
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == resolution else square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def list_files(folder: Path) -> list[str]:
    """Files below ``folder`` as sorted relative POSIX paths; hidden ones are left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def is_image(path: str) -> bool:
    """Whether a path has the suffix of an image file."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def list_images(folder: str | Path) -> list[str]:
    """Image files below ``folder`` by suffix, as sorted relative POSIX paths; hidden ones are left out.

    Raises:
        InputError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    found = list(filter(is_image, list_files(folder)))
    if not found:
        raise InputError(f"{folder}: no images below this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def image_keys(paths: Sequence[str]) -> list[str]:
    """WebDataset keys of relative paths: the path without suffix and with "_" for other dots of the name.

    Files that differ in their suffix alone keep it, as ``name_png`` and ``name_jpg``.

    Raises:
        InputError: two files still share a key.
    """

    def key(path: str, keep_suffix: bool = False) -> str:
        parent, _, name = path.rpartition("/")
        name = (name if keep_suffix else name.rpartition(".")[0]).replace(".", "_")
        return f"{parent}/{name}" if parent else name

    plain = Counter(map(key, paths))
    keys = [key(path, keep_suffix=plain[key(path)] > 1) for path in paths]
    taken: dict[str, str] = {}
    for path, name in zip(paths, keys, strict=True):
        if taken.setdefault(name, path) != path:
            raise InputError(f"{taken[name]} and {path} would share the key {name!r}: rename one of them")
    return keys


def map_in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """``function(job)`` of each job in order, computed on ``workers`` threads, ``ahead`` (2 a worker) at most ahead.

    Threads, not processes: Pillow decodes, resizes and encodes outside Python's lock.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    most = 2 * workers if ahead is None else ahead
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            # A bounded window: pool.map would hold every result at once.
            if len(pending) > most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """One thread a core that this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)))


def below(file: Path, folder: str | Path | None) -> bool:
    return folder is not None and file.resolve().is_relative_to(Path(folder).resolve())
