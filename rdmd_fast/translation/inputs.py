"""What `rdmd translate` and `rdmd baseline` read: images, .npy latents or shards, by number and in one fixed order."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from rdmd_fast.data.file_walk import tell_left_out
from rdmd_fast.data.sample_names import output_names
from rdmd_fast.errors import InputError


class Unreadable(InputError):
    """A sample that cannot be read."""


class Samples(Protocol):
    """Samples to translate; small enough to be sent to other processes, which open files themselves.

    Attributes:
        names: of each, with folders and without suffix.
        latents: float32 [C, H, W] arrays, rather than uint8 [H, W, 3] images of any size.
    """

    names: list[str]
    latents: bool

    def read(self, index: int) -> np.ndarray:
        """Sample ``index``, from any thread; raises Unreadable, or InputError for one of another shape."""


@dataclass
class ImageFiles:
    folder: Path
    files: list[str]
    names: list[str]
    latents: bool = False

    def read(self, index: int) -> np.ndarray:
        from rdmd_fast.data.pictures import UNREADABLE, load_picture

        path = self.folder / self.files[index]
        try:
            return np.asarray(load_picture(path))
        except UNREADABLE as error:
            raise Unreadable(f"{path}: not a readable image ({error}), take it out or save it again") from None


@dataclass
class ArrayFiles:
    folder: Path
    files: list[str]
    names: list[str]
    shape: tuple[int, int, int]
    latents: bool = True

    def read(self, index: int) -> np.ndarray:
        from rdmd_fast.data.pictures import UNREADABLE
        from rdmd_fast.data.shards.decode_arrays import decode_array

        path = self.folder / self.files[index]
        try:
            if not path.is_file():
                raise ValueError("not a regular file")
            array = decode_array(path.read_bytes())
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:120]
            raise Unreadable(f"{path}: not a .npy array of floats ({reason}), take it out or save it again") from None
        if array.shape != self.shape:
            raise InputError(f"{path}: has shape {array.shape}, the network takes {self.shape}")
        return array


@dataclass
class Shards:
    folder: Path
    names: list[str]
    latents: bool
    _shards: object = field(default=None, repr=False)

    def read(self, index: int) -> np.ndarray:
        try:
            return self._shards.read(index)
        except InputError as error:
            raise Unreadable(str(error)) from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": None}

    def __setstate__(self, state: dict) -> None:
        from rdmd_fast.data.shards.shard_set import ShardSet

        self.__dict__ = state | {"_shards": ShardSet(state["folder"])}


def open_inputs(
    folder: str | Path, shape: tuple[int, int, int], image_shape: tuple[int, int, int], size: str = "crop"
) -> Samples:
    """The samples of a shard set, an image folder or a folder of .npy arrays.

    Args:
        shape: (C, H, W) that the network takes.
        image_shape: the same of images; another one where an autoencoder encodes them.
        size: "crop", "resize" or "tiles": whether images of another size are taken.

    Raises:
        InputError: nothing there that the network takes, or samples of two kinds.
    """
    from rdmd_fast.data.shards.folder_kind import Kind, look_into

    contents = look_into(folder)
    contents.require_samples()
    if contents.kind in (Kind.PACKED, Kind.TARS):
        samples, left_out = _open_shards(contents.folder, shape, image_shape, size)
    else:
        left_out = contents.left_out
        images = contents.kind is Kind.IMAGES
        open_files, taken = (_open_images, image_shape) if images else (_open_arrays, shape)
        samples = open_files(contents.folder, contents.paths, taken, size)
    tell_left_out(folder, left_out)
    return samples


def _open_shards(path: Path, shape, image_shape, size: str) -> tuple[Shards, Counter[str]]:
    from rdmd_fast.data.shards.shard_set import ShardSet

    shards = ShardSet(path)
    latents = shards.kind == "array"
    expected = shape if latents else (*image_shape[1:], image_shape[0])
    found = tuple(shards.shape)
    if latents:
        _no_size_for_latents(path, size)
    if found != expected and (latents or size == "crop" or expected[-1] != 3):
        remedy = "" if latents or expected[-1] != 3 else "; choose --size resize or tiles, or pack the set again"
        raise InputError(f"--input {path}: samples of shape {found}, the network takes {expected}{remedy}")
    return Shards(path, shards.sample_names, latents, shards), shards.left_out


def _open_arrays(path: Path, files: list[str], shape, size: str) -> ArrayFiles:
    _no_size_for_latents(path, size)
    return ArrayFiles(path, files, output_names(files), shape)


def _no_size_for_latents(path: Path, size: str) -> None:
    if size != "crop":
        raise InputError(f"--size {size}: is for images, --input {path} holds latents of the network's own size")


def _open_images(path: Path, files: list[str], shape, size: str) -> ImageFiles:
    channels, height, width = shape
    if channels != 3:
        raise InputError(
            f"--input {path}: image files are RGB, the network takes {channels} channels: use shards, or name the "
            "--autoencoder of its latents"
        )
    if height != width and size == "crop":
        raise InputError(
            f"--input {path}: image files are cropped square, the network takes {height}×{width}: use --size resize "
            "or tiles"
        )
    return ImageFiles(path, files, output_names(files))
