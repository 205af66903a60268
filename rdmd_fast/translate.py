"""``rdmd translate``: a folder of images, of latents or of shards through a trained generator."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .errors import InputError, is_plain

EPILOG = """examples:
  rdmd translate --model runs/digits_2to3/export --input shards/digits/2/test --output out/threes
  rdmd translate --model runs/latent_cat2wild/export --autoencoder sd-vae --input photos/cats --output out/wild

Latents, from shards or a folder of .npy arrays [C, H, W], become .npy files. With --autoencoder images are encoded
first, and each .npy has its decoded .png beside it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, metavar="DIR", help="RUN/export or RUN/best of the rdmd stage")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="a folder of images or latents, or of shards")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where files of the same names go")
    parser.add_argument(
        "--autoencoder", metavar="DIR", help="diffusers AutoencoderKL folder: encodes images, decodes latents to PNGs"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time (64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--transport-weight",
        type=float,
        metavar="λ",
        help="of a generator that was trained for a range of λ: more keeps more of the input (its geometric mean)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Translate every sample; names and folder structure are kept, the suffix becomes .png, or .npy for latents.

    Raises:
        InputError: no export, nothing to translate, an unreadable sample, or an output that cannot be written.
    """
    from tqdm import tqdm

    from .networks.exported import load_generator

    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: must be at least 1")
    device = pick_device(arguments.device)
    generator = load_generator(arguments.model).to(device)
    shape = tuple(generator.config.sample_shape)
    if len(shape) != 3:
        raise InputError(f"--model {arguments.model}: is for points of shape {shape}, translate takes images")
    autoencoder = _open_autoencoder(arguments.autoencoder, shape, device) if arguments.autoencoder else None
    if arguments.transport_weight is not None:
        generator = partial(generator, transport_weight=arguments.transport_weight)
    inputs = open_inputs(arguments.input, shape, autoencoder)
    output = Path(arguments.output)
    with tqdm(total=inputs.count, unit="img", disable=None) as bar:
        for names, samples in _batches(inputs.samples, arguments.batch_size):
            translated = translate_batch(generator, samples, device, autoencoder)
            if inputs.latents or autoencoder:
                _write_arrays(output, names, translated)
            if autoencoder or not inputs.latents:
                _write_images(output, names, autoencoder.decode(translated) if autoencoder else translated)
            bar.update(len(names))
    print(f"{output}: {inputs.count} {'images' if autoencoder or not inputs.latents else 'latents'}")
    return 0


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device, use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


# -- in ----------------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Samples to translate.

    Attributes:
        count: of samples.
        latents: float32 [C, H, W] arrays, rather than uint8 [H, W, C] images.
        samples: (name without suffix, array) of each.
    """

    count: int
    latents: bool
    samples: Iterator[tuple[str, np.ndarray]]


def _open_autoencoder(folder: str, shape: tuple[int, int, int], device: torch.device):
    from .latents import Autoencoder

    autoencoder = Autoencoder(folder)
    if autoencoder.channels != shape[0]:
        raise InputError(
            f"--autoencoder {folder}: has latents of {autoencoder.channels} channels, the generator takes {shape[0]}"
        )
    return autoencoder.to(device)


def open_inputs(folder: str, shape: tuple[int, int, int], autoencoder=None) -> Inputs:
    """The samples of a shard set, an image folder or a folder of .npy arrays.

    Folder images are cropped and resized to the resolution that the generator (or the autoencoder before it) takes, as
    `rdmd pack` does; shards and arrays must have it.

    Args:
        shape: (C, H, W) that the generator takes.
        autoencoder: an ``Autoencoder`` that encodes images, or None.

    Raises:
        InputError: nothing there that the generator takes.
    """
    path = Path(folder)
    image_shape = autoencoder.image_shape(shape) if autoencoder else shape
    if (path / "manifest.json").is_file() or any(path.glob("*.tar")):
        return _open_shards(path, shape, image_shape)
    arrays = [file for file in sorted(path.rglob("*.npy")) if not file.name.startswith(".")]
    return _open_arrays(path, arrays, shape) if arrays else _open_images(path, image_shape)


def _open_shards(path: Path, shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> Inputs:
    from .data.shards import ShardSet

    shards = ShardSet(path)
    latents = shards.kind == "array"
    expected = shape if latents else (*image_shape[1:], image_shape[0])
    if tuple(shards.shape) != expected:
        raise InputError(f"--input {path}: samples of shape {tuple(shards.shape)}, the generator takes {expected}")
    for key in shards.keys:
        parts = key.split("/")
        if not is_plain(key) or ".." in parts or "" in parts:
            raise InputError(
                f"--input {path}: sample {key!r} has no name for a file below --output; pack the set again"
            )
    return Inputs(len(shards), latents, ((key, shards.read(index)) for index, key in enumerate(shards.keys)))


def _open_arrays(path: Path, files: list[Path], shape: tuple[int, int, int]) -> Inputs:
    from .data.contents import decode_array
    from .data.formats import UNREADABLE
    from .data.images import IMAGE_SUFFIXES

    image = next((file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES), None)
    if image:
        raise InputError(f"--input {path}: holds arrays and images ({image.name}), name a folder of one kind")

    def load(file: Path) -> np.ndarray:
        try:
            if not file.is_file():
                raise ValueError("not a regular file")
            array = decode_array(file.read_bytes())
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{file}: not a .npy array of floats ({reason}), take it out or save it again") from None
        if array.shape != shape:
            raise InputError(f"{file}: has shape {array.shape}, the generator takes {shape}")
        return array

    names = [file.relative_to(path).with_suffix("").as_posix() for file in files]
    return Inputs(len(files), True, ((name, load(file)) for name, file in zip(names, files, strict=True)))


def _open_images(path: Path, shape: tuple[int, int, int]) -> Inputs:
    from .data.formats import UNREADABLE
    from .data.images import image_keys, list_images, load_image

    files = list_images(path)
    channels, height, width = shape
    if channels != 3:
        raise InputError(
            f"--input {path}: image files are RGB, the generator takes {channels} channels: use shards, or name the "
            "--autoencoder of its latents"
        )
    if height != width:
        raise InputError(
            f"--input {path}: image files are cropped square, the generator takes {height}×{width}: use shards"
        )

    def load(file: str) -> np.ndarray:
        try:
            return load_image(path / file, height)
        except UNREADABLE as error:
            raise InputError(f"{path / file}: not a readable image ({error}), take it out or save it again") from None

    return Inputs(len(files), False, ((key, load(file)) for key, file in zip(image_keys(files), files, strict=True)))


def _batches(samples: Iterator[tuple[str, np.ndarray]], size: int):
    names, images = [], []
    for name, image in samples:
        names.append(name)
        images.append(image)
        if len(names) == size:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)


# -- out ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def translate_batch(
    generator: torch.nn.Module, samples: np.ndarray, device: torch.device, autoencoder=None
) -> torch.Tensor:
    """uint8 images [N, H, W, C] or float32 latents [N, C, H, W] in; float32 [N, C, H, W] out, in data units."""
    from .kernels.image_normalize import image_normalize

    x = torch.from_numpy(samples).to(device)
    if samples.dtype == np.uint8:
        x = image_normalize(x.permute(0, 3, 1, 2), torch.float32)
        x = autoencoder.encode(x) if autoencoder else x
    return generator(x)


def _write_arrays(folder: Path, names: list[str], latents: torch.Tensor) -> None:
    for name, array in zip(names, latents.cpu().numpy(), strict=True):
        _replace(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))


def _write_images(folder: Path, names: list[str], images: torch.Tensor) -> None:
    from .drawing import to_uint8

    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    for name, image in zip(names, pixels, strict=True):
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        _replace(folder / f"{name}.png", lambda file, picture=picture: picture.save(file, format="PNG"))


def _replace(path: Path, save: Callable) -> None:
    """``replace_file``; what stops it is an error of --output."""
    from .drawing import replace_file

    try:
        replace_file(path, save)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from None
