"""``rdmd translate``: a folder of images or shards through a trained generator."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .errors import InputError

EPILOG = """example:
  rdmd translate --model runs/digits_2to3/export --input shards/digits/2/test --output out/threes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, metavar="DIR", help="RUN/export or RUN/best of the rdmd stage")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="a folder of images, or of shards")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where PNGs of the same names go")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def run(arguments: argparse.Namespace) -> int:
    """Translate every image; names and folder structure are kept, the suffix becomes .png.

    Raises:
        InputError: no export, nothing to translate, an unreadable image, or an output that cannot be written.
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
    output = Path(arguments.output)
    count, samples = open_images(arguments.input, shape)
    with tqdm(total=count, unit="img", disable=None) as bar:
        for names, images in _batches(samples, arguments.batch_size):
            translated = translate_batch(generator, images, device)
            for name, image in zip(names, translated, strict=True):
                _save_png(output / f"{name}.png", image)
            bar.update(len(names))
    print(f"{output}: {count} images")
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


def open_images(folder: str, shape: tuple[int, int, int]) -> tuple[int, Iterator[tuple[str, np.ndarray]]]:
    """(count, iterator of (name without suffix, uint8 [H, W, C])) of a shard set or an image folder.

    Folder images are cropped and resized to the generator's resolution, as `rdmd pack` does; shards must have it.
    """
    from .data.images import image_keys, list_images, load_image
    from .data.shards import ShardSet

    path = Path(folder)
    if (path / "manifest.json").is_file() or any(path.glob("*.tar")):
        shards = ShardSet(path)
        expected = (shape[1], shape[2], shape[0])
        if shards.kind != "image" or tuple(shards.shape) != expected:
            raise InputError(
                f"--input {folder}: samples of shape {tuple(shards.shape)}, the generator takes {expected}"
            )
        return len(shards), ((shards.keys[index], shards.read(index)) for index in range(len(shards)))
    if shape[0] != 3:
        raise InputError(f"--input {folder}: image files are RGB, the generator takes {shape[0]} channels: use shards")
    files = list_images(path)
    return len(files), (
        (key, load_image(path / file, shape[1])) for key, file in zip(image_keys(files), files, strict=True)
    )


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


@torch.no_grad()
def translate_batch(generator: torch.nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """uint8 [N, H, W, C] in, uint8 [N, H, W, C] out."""
    from .figures import to_uint8
    from .kernels.image_normalize import image_normalize

    x = image_normalize(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), torch.float32)
    y = generator(x)
    return to_uint8(y).permute(0, 2, 3, 1).cpu().numpy()


def _save_png(path: Path, image: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from None
