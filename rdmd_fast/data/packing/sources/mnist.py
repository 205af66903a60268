"""MNIST's IDX files, each digit painted in a random hue as in the literature on optimal transport.

A coloured digit is HSV(hue, 1, grey): the grey image is resized first, then multiplied by a fully saturated
colour. One hue a sample, a function of the seed and of the sample's place in its file.
"""

import gzip
import hashlib
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rdmd_fast.data.packing.sources import Sample, SampleSet
from rdmd_fast.data.packing.sources.digits import hue_to_rgb
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

PREFIX = "mnist:"
STEMS = {"train": "train", "test": "t10k"}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
MAX_BYTES = 1 << 30  # of one file, unpacked; MNIST's largest has 47 MB
TEST_POSITIONS = 1 << 32  # where the test file's hues begin, far behind the training file's


def mnist_sets(args) -> list[SampleSet]:
    """Sets DIGIT/train and DIGIT/test of the digits that --digits names.

    Raises:
        InputError: a file is missing or damaged, or images and labels do not belong together.
    """
    if args.resolution is None:
        raise InputError("packing MNIST needs --resolution, the images' side in pixels, for example 32")
    folder = Path(args.source.removeprefix(PREFIX))
    chosen = list(range(10)) if args.digits is None else sorted(set(args.digits))
    outside = next((digit for digit in chosen if not 0 <= digit <= 9), None)
    if outside is not None:
        raise InputError(f"--digits {outside}: a digit is 0 to 9")
    data = {split: _read_split(folder, stem) for split, stem in STEMS.items()}
    sets = []
    for digit in chosen:
        for split, (images, labels) in data.items():
            indices = np.flatnonzero(labels == digit)
            content = {
                "source": str(folder.resolve()),
                "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
                "digit": digit,
                "split": split,
                "resolution": args.resolution,
                "seed": args.seed,
                "shard_size": args.shard_size,
            }
            start = TEST_POSITIONS if split == "test" else 0
            hues = Philox(args.seed).uniform(Stream.HUE, start + torch.from_numpy(indices))[:, 0].numpy()
            sample = partial(_coloured, digit, images, indices, hue_to_rgb(hues), args.resolution)
            sets.append(SampleSet(f"{digit}/{split}", content, len(indices), sample))
    return sets


def _coloured(
    digit: int, images: np.ndarray, indices: np.ndarray, colours: np.ndarray, side: int, position: int
) -> Sample:
    grey = Image.fromarray(images[indices[position]])
    if grey.size != (side, side):
        grey = grey.resize((side, side), Image.Resampling.LANCZOS)
    painted = np.rint(np.asarray(grey)[..., None] * colours[position]).astype(np.uint8)
    return f"digit{digit}_{indices[position]:05d}", painted, None


def _read_split(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, H, W], labels uint8 [N])."""
    (image_path, images), (label_path, labels) = (_read_named(folder, f"{stem}-{kind}") for kind in (IMAGES, LABELS))
    if images.ndim != 3 or labels.ndim != 1:
        raise InputError(
            f"{image_path}, {label_path}: hold {images.ndim}-D images and {labels.ndim}-D labels; download both"
        )
    if len(images) != len(labels):
        raise InputError(
            f"{image_path}: {len(images)} images where {label_path} has {len(labels)} labels; download both"
        )
    if len(labels) and labels.max() > 9:
        raise InputError(f"{label_path}: holds label {labels.max()}, a digit is 0 to 9; take MNIST's files")
    return images, labels


def _read_named(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    candidates = [folder / (name + suffix) for suffix in ("", ".gz")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise InputError(f"{folder}: holds neither {name} nor {name}.gz; put MNIST's four files there")
    return path, read_idx(path)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes, gzipped or not: uint8 of the shape that it declares.

    Raises:
        InputError: another format, cut short, too long or absurdly large.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise InputError(
                    f"{path}: no IDX file of bytes (it starts with {magic.hex() or 'nothing'}); download it again"
                )
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise InputError(f"{path}: cut short in its header; download it again")
            shape = tuple(np.frombuffer(header, dtype=">u4").tolist())
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise InputError(f"{path}: declares {size} bytes of shape {shape}, over {MAX_BYTES}; download it again")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); download it again") from None
    if len(data) != size:
        fault = "cut short" if len(data) < size else "too long"
        raise InputError(f"{path}: {fault} for its shape {shape}; download it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
