"""The images that an evaluation measures: of shards or of a folder, all of them or some chosen by a seed."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.data.file_walk import tell_left_out
from rdmd_fast.data.pictures import UNREADABLE, load_image, load_picture
from rdmd_fast.data.sample_names import image_keys, pairing_name
from rdmd_fast.data.shards.folder_kind import Contents, Kind, look_into
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.threads import default_workers, map_in_order
from rdmd_fast.errors import InputError
from rdmd_fast.metrics.feature_cache import images_sha256
from rdmd_fast.pixels import PixelImages
from rdmd_fast.randomness import Philox, Stream


class ImageSet(NamedTuple):
    """Images in a fixed order.

    Attributes:
        path: the folder.
        names: of the images: paths below the folder without suffix, or keys of shards.
        images: [N, 3, H, W].
    """

    path: Path
    names: list[str]
    images: PixelImages

    def summary(self) -> dict:
        """Tell a report of the set; the hash is of the pixels as they are measured, in their order."""
        return {"path": str(self.path), "images": len(self.images), "sha256": images_sha256(self.images)}


class OpenImages(NamedTuple):
    """Images that have been found but not read.

    Attributes:
        option: how the command line calls the folder.
        size: (H, W) of shards, None for files of any size.
        load: ``load(name, size)`` gives uint8 [H, W, 3].
        first_file: of files of any size.
    """

    path: Path
    option: str
    names: list[str]
    size: tuple[int, int] | None
    load: Callable[[str, tuple[int, int]], np.ndarray]
    first_file: Path | None = None

    def read(self, size: tuple[int, int], names: Sequence[str] | None = None) -> ImageSet:
        """Read the images of ``names`` (all by default) at (H, W) pixels.

        Files are cropped square and resized as ``rdmd pack`` does; shards must have the size.

        Raises:
            InputError: shards of another size, an image that cannot be read, or files where H and W differ.
        """
        if self.size not in (None, size):
            found, wanted = ("x".join(map(str, each)) for each in (self.size, size))
            raise InputError(
                f"{self.option} {self.path}: has images of {found}, {wanted} are measured: pack at that size"
            )
        if self.size is None and size[0] != size[1]:
            raise InputError(f"{self.option} {self.path}: files are cropped square, {size[0]}x{size[1]} need shards")
        names = list(self.names if names is None else names)
        pixels = np.empty((len(names), *self.load(names[0], size).shape), np.uint8)
        for index, image in enumerate(map_in_order(lambda name: self.load(name, size), names, default_workers())):
            pixels[index] = image
        return ImageSet(self.path, names, PixelImages(torch.from_numpy(pixels).permute(0, 3, 1, 2)))

    def chosen(self, count: int | None, seed: int, position: int) -> list[str]:
        """Choose ``count`` of the names in their order, drawn by the seed; all if there are no more, or for None."""
        if count is None or count >= len(self.names):
            return self.names
        order = Philox(seed).permutation(Stream.METRIC_SAMPLES, position, len(self.names))
        return [self.names[index] for index in sorted(order[:count].tolist())]

    def check_pairs(self, names: Sequence[str]) -> None:
        """Raise InputError if a source of ``names`` has no translation here."""
        present = set(self.names)
        missing = [name for name in names if name not in present]
        if missing:
            raise InputError(
                f"{self.option} {self.path}: has no translation of source {missing[0]!r} ({len(missing)} of "
                f"{len(names)} are missing): images are paired by name, translate all of --source"
            )


def open_images(folder: str, option: str, results: Sequence[str] = ()) -> OpenImages:
    """Find the images of a shard set (anything that ``data.source`` may name) or of a folder of files.

    Args:
        results: folders whose files are none of them, should they lie inside ``folder``.

    Raises:
        InputError: none there, or latents.
    """
    path = Path(folder)
    if path.is_dir():
        contents = look_into(path, results)
        if contents.kind is Kind.NOTHING and results:
            raise InputError(f"{option} {path}: no images below this folder, those in --outputs aside; name another")
        contents.require_samples()
        if contents.kind is Kind.IMAGES:
            return _open_files(contents, option)
        if contents.kind is Kind.ARRAYS:
            raise _arrays(option, path)
    shards = ShardSet(folder)
    if shards.kind != "image":
        raise _arrays(option, path)
    tell_left_out(folder, shards.left_out)
    index_of = _by_pairing_name(shards.sample_names, range(len(shards)), f"{option} {path}")
    return OpenImages(
        path, option, list(index_of), tuple(shards.shape[:2]), lambda name, _: shards.read(index_of[name])
    )


def _arrays(option: str, path: Path) -> InputError:
    return InputError(f"{option} {path}: holds arrays, images are measured: decode them, see rdmd translate --help")


def _open_files(contents: Contents, option: str) -> OpenImages:
    tell_left_out(contents.folder, contents.left_out)
    names = image_keys(contents.paths)
    file_of = _by_pairing_name(names, contents.paths, f"{option} {contents.folder}")

    def load(name: str, size: tuple[int, int]) -> np.ndarray:
        file = contents.folder / file_of[name]
        try:
            return load_image(file, size[0])
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise InputError(f"{file}: not a readable image ({reason}), take it out or save it again") from None

    return OpenImages(contents.folder, option, list(file_of), None, load, contents.folder / contents.paths[0])


def _by_pairing_name(names: Sequence[str], values: Sequence, where: str) -> dict:
    """``values`` by their names in the form in which they pair; InputError for two that look alike."""
    found = dict(zip(map(pairing_name, names), values, strict=True))
    if len(found) < len(names):
        twice = next(name for name, count in Counter(map(pairing_name, names)).items() if count > 1)
        raise InputError(
            f"{where}: two images are called {twice!r}, spelled in two ways of Unicode; rename one of them"
        )
    return found


def first_side(images: OpenImages) -> int:
    """Give the side of the central square of the first file."""
    try:
        return min(load_picture(images.first_file).size)
    except UNREADABLE as error:
        raise InputError(f"{images.first_file}: not a readable image ({error}), take it out or save it again") from None
