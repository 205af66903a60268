"""What the cases share: a generator that changes nothing, commands in this process, pictures and tars."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from rdmd_fast import cli
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks import build_network

NETWORK = {"kind": "song_unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


class Done(NamedTuple):
    """A command's exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Export of the identity on 8×8 RGB images."""
    values = {"role": "generator", "reading": "mlp", "generator_sigma": 1.0, "network": NETWORK}
    config = ExportConfig.model_validate(values | {"sample_shape": [3, 8, 8], "diffusion": {}})
    weights = build_network(config.network, (3, 8, 8), dropout=False).state_dict()
    weights |= {name: torch.zeros_like(each) for name, each in weights.items() if "aux_conv" in name}
    folder = tmp_path_factory.mktemp("model") / "export"
    write_export(folder, config, weights)
    return folder


@pytest.fixture
def rdmd(capfd):
    """``rdmd(word, …)`` runs a command in this process."""

    def run(*words) -> Done:
        capfd.readouterr()
        status = cli.main(list(map(str, words)))
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def translate(rdmd, model):
    return lambda source, output, *more: rdmd(
        "translate", "--model", model, "--input", source, "--output", output, "--device", "cpu", *more
    )


def picture(number: int = 0, height: int = 8, width: int = 8) -> np.ndarray:
    """Random levels, uint8 [height, width, 3]."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_pictures(folder: Path, *names: str | bytes) -> Path:
    """Random pictures, in a format that Pillow knows by the names, or PNG."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG")
        path.write_bytes(encoded(picture(number), kind))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def packed_keys(folder: Path) -> list[str]:
    from rdmd_fast.data.shards.shard_set import ShardSet

    return ShardSet(folder).keys
