"""What many tests are made of: images and arrays as bytes, folders, tars and packed sets of them, small networks."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdmd_fast import cli
from rdmd_fast.data.packing.shard_writer import ShardWriter
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.networks import build_network

# -- bytes -------------------------------------------------------------------------------------------------------------


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(number: int = 0) -> np.ndarray:
    """Random levels of 8×8 pixels from seed ``number``."""
    return random_pixels(number, 8, 8, 3)


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of_size(width: int, height: int, pixels: bytes, extra: bytes = b"") -> bytes:
    """A png that claims its size whatever ``pixels`` hold; ``extra`` are chunks before them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


# -- files -------------------------------------------------------------------------------------------------------------


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def save_images(folder: Path, images: dict[str, np.ndarray], **options) -> Path:
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name, **options)
    return folder


def write_pictures(folder: Path, *names: str) -> Path:
    """Random pictures of 8×8 pixels, the n-th from seed n, in the format that the name tells, or PNG."""
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}
    files = {name: encoded(picture(number), kinds.get(Path(name).suffix, "PNG")) for number, name in enumerate(names)}
    return write_files(folder, files)


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, samples, each: int = 100, key: str = "{}", labels=None) -> Path:
    """A packed set of ``each`` samples a shard, with ``labels`` by number."""
    with ShardWriter(folder, {}, "test", each) as writer:
        for number, sample in enumerate(samples):
            writer.write(key.format(number), sample, labels and labels[number])
        writer.commit()
    return folder


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pack(*words) -> int:
    return cli.main(["pack", *map(str, words)])


# -- networks ----------------------------------------------------------------------------------------------------------


def small_unet(*multipliers: int) -> dict:
    """Options of a SongUNet of 16 channels with a level for each multiplier."""
    sizes = {"model_channels": 16, "channel_mult": list(multipliers), "num_blocks": 1, "attn_resolutions": []}
    return {"kind": "song_unet", **sizes}


def toy_rdmd(**sections) -> dict:
    """A small distillation between toys that does nothing but train; ``sections`` take the place of its own."""
    network = {"kind": "mlp", "hidden": 16, "depth": 1}
    data = {"source": {"toy": "gaussian"}, "target": {"toy": "8gaussians"}}
    values = {"stage": "rdmd", "data": data, "teacher": "analytic", "network": network, "generator": dict(network)}
    values |= {"rdmd": {"weighting": "sigma2"}, "train": {"steps": 1_000_000, "global_batch_size": 8}}
    quiet = {"telemetry": {"log_every": 1, "sample_every": 0, "tensorboard": False}, "validation": {"count": 16}}
    return values | quiet | {"checkpoint": {"every": 0}} | sections


def generator_of(network: dict, shape: tuple[int, ...], **more) -> tuple[ExportConfig, torch.nn.Module]:
    """Config of a generator's export and its network, new from seed 0."""
    values = {"role": "generator", "reading": "mlp", "generator_sigma": 1.0, "network": network, "diffusion": {}}
    config = ExportConfig.model_validate(values | {"sample_shape": list(shape)} | more)
    torch.manual_seed(0)
    conditioned = config.transport_weights is not None
    return config, build_network(config.network, tuple(shape), dropout=False, conditioned=conditioned)


def save_script(module: torch.nn.Module, path: Path) -> Path:
    """Save as TorchScript, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path


class FakeLPIPS(torch.nn.Module):
    """Stands in for lpips.LPIPS: a distance of the same call and shape."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"
        self.weight = torch.nn.Parameter(torch.full((1, 3, 1, 1), 0.5))

    def forward(self, first, second):
        return (self.weight * (first - second) ** 2).mean((1, 2, 3), keepdim=True)


# -- what is said ------------------------------------------------------------------------------------------------------


def error_line(capsys, *beside: str) -> str:
    """The one line of standard error, an error's; lines that begin as one of ``beside`` do not count."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith(beside)]
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0]


# -- accounts ----------------------------------------------------------------------------------------------------------


def as_another(action, user=54321, group=54321):
    """What ``action()`` returns or raises, as text, in a process of another account."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "broke"
        try:
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text
