"""Image files in: from a picture to a square uint8 RGB array, and from a nested folder to sorted keys."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rdmd_fast.errors import InputError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))

# What Pillow raises for files that are broken, empty, cut short, absurdly large or not images at all.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB.

    Transparency is laid over white, as a browser page shows it; 16-bit grey keeps its high byte.

    Raises:
        ValueError: 32-bit integer or float grey, whose range is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; save it as 8- or 16-bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_image(path: str | Path, resolution: int) -> np.ndarray:
    """Turn a picture upright (EXIF orientation), crop its central square, resize it by a Lanczos filter.

    Args:
        path: image file.
        resolution: side of the result in pixels; smaller pictures are enlarged.

    Returns:
        uint8 [resolution, resolution, 3].

    Raises:
        OSError, ValueError, SyntaxError, EOFError, DecompressionBombError: unreadable image (``UNREADABLE``).
    """
    with Image.open(path) as opened:
        image = to_rgb(ImageOps.exif_transpose(opened))
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side != resolution:
        square = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(square)


def list_images(folder: str | Path) -> list[str]:
    """Image files below ``folder`` by suffix, as sorted relative POSIX paths; hidden ones are left out.

    Raises:
        InputError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    if not found:
        raise InputError(f"{folder}: no images below this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)


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


def load_images(
    folder: Path, paths: Sequence[str], resolution: int, workers: int | None = None
) -> Iterator[np.ndarray | Exception]:
    """Load each path in order on a few threads; an unreadable image yields its exception instead."""

    def load(path: str) -> np.ndarray | Exception:
        try:
            return load_image(folder / path, resolution)
        except UNREADABLE as error:
            return error

    workers = workers or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        for path in paths:
            pending.append(pool.submit(load, path))
            # A bounded window: pool.map would hold every decoded image of the folder at once.
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
