"""What `rdmd translate` and `rdmd baseline` read: images, .npy latents or shards, by number and in one fixed order."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from rdmd_fast.data.image_files import below
from rdmd_fast.errors import InputError, is_plain


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
        from rdmd_fast.data.image_files import load_picture
        from rdmd_fast.data.shards.decode_images import UNREADABLE

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
        from rdmd_fast.data.shards.decode_arrays import decode_array
        from rdmd_fast.data.shards.decode_images import UNREADABLE

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
    folder: str | Path,
    shape: tuple[int, int, int],
    image_shape: tuple[int, int, int],
    size: str = "crop",
    output: str | Path | None = None,
) -> Samples:
    """The samples of a shard set, an image folder or a folder of .npy arrays.

    Args:
        shape: (C, H, W) that the network takes.
        image_shape: the same of images; another one where an autoencoder encodes them.
        size: "crop", "resize" or "tiles": whether images of another size are taken.
        output: a folder whose files are no inputs, should it lie inside ``folder``.

    Raises:
        InputError: nothing there that the network takes.
    """
    from rdmd_fast.data.image_files import list_files

    path = Path(folder)
    if output is not None and Path(output).resolve() == path.resolve():
        raise InputError(f"--output {output}: is --input, results would replace what they are made of; name another")
    if (path / "manifest.json").is_file() or any(path.glob("*.tar")):
        return _open_shards(path, shape, image_shape, size)
    files = [file for file in list_files(path) if not below(path / file, output)]
    if any(file.endswith(".npy") for file in files):
        return _open_arrays(path, files, shape, size)
    return _open_images(path, image_shape, size, output)


def _open_shards(path: Path, shape, image_shape, size: str) -> Shards:
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
    for key in shards.keys:
        parts = key.split("/")
        if not is_plain(key) or ".." in parts or "" in parts:
            raise InputError(
                f"--input {path}: sample {key!r} has no name for a file below --output; pack the set again"
            )
    return Shards(path, shards.keys, latents, shards)


def _open_arrays(path: Path, files: list[str], shape, size: str) -> ArrayFiles:
    from rdmd_fast.data.image_files import is_image

    image = next(filter(is_image, files), None)
    if image:
        raise InputError(f"--input {path}: holds arrays and images ({image}), name a folder of one kind")
    _no_size_for_latents(path, size)
    arrays = [file for file in files if file.endswith(".npy")]
    return ArrayFiles(path, arrays, [file.removesuffix(".npy") for file in arrays], shape)


def _no_size_for_latents(path: Path, size: str) -> None:
    if size != "crop":
        raise InputError(f"--size {size}: is for images, --input {path} holds latents of the network's own size")


def _open_images(path: Path, shape, size: str, output) -> ImageFiles:
    from rdmd_fast.data.image_files import list_images

    found = list_images(path)
    files = [file for file in found if not below(path / file, output)]
    channels, height, width = shape
    if not files:
        raise InputError(f"--input {path}: all images below this folder are in --output {output}, name another")
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


def output_names(files: Sequence[str]) -> list[str]:
    """Names without suffix of files; those that differ in their suffix alone keep it, as ``name_png``.

    Raises:
        InputError: two files still share a name.
    """
    plain = Counter(str(PurePosixPath(file).with_suffix("")) for file in files)
    names, taken = [], {}
    for file in files:
        path = PurePosixPath(file)
        name = str(path.with_suffix(""))
        if plain[name] > 1:
            name = str(path.with_name(path.stem + path.suffix.replace(".", "_")))
        if taken.setdefault(name, file) != file:
            raise InputError(f"--input: {taken[name]} and {file} would both become {name}, rename one of them")
        names.append(name)
    return names
