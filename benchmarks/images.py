"""Encoded images for the benchmarks of the data: files and tars of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from webdataset import TarWriter

BATCH, SIDE, SHARDS = 64, 64, 8
FORMATS = {"jpeg": ("jpg", {"quality": 90}), "png": ("png", {})}


def encode(number: int, form: str, options: dict) -> bytes:
    """Encode a smooth picture with some grain: about the bytes of a photograph of that size."""
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(1))
    grain = np.asarray(image, dtype=np.int16) + random.integers(-5, 6, (SIDE, SIDE, 3))
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, form, **options)
    return buffer.getvalue()


def write(folder: Path, suffix: str, files: list[bytes]) -> None:
    """Write encoded images below a folder as single files, and as WebDataset tars."""
    for name in ("files", "tars"):
        (folder / name).mkdir(parents=True)
    for number, data in enumerate(files):
        (folder / "files" / f"{number:06d}.{suffix}").write_bytes(data)
    each = len(files) // SHARDS
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"tars/{shard:02d}.tar"), encoder=False) as tar:
            for number in range(shard * each, (shard + 1) * each):
                tar.write({"__key__": f"{number:06d}", suffix: files[number]})
