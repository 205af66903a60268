"""Images encoded to an autoencoder's latents while they are packed."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from rdmd_fast.data.packing.sources import SampleSet
from rdmd_fast.errors import InputError
from rdmd_fast.kernels.image_normalize import image_normalize


def encoded(sets: list[SampleSet], folder: str, device: str) -> list[SampleSet]:
    """The same sets of image samples as float32 latents [C, h, w] of the diffusers AutoencoderKL in ``folder``.

    The autoencoder is loaded when the first sample is asked for, and is part of each set's content.

    Raises:
        InputError: no autoencoder in ``folder``.
    """
    from rdmd_fast.model_files.autoencoder import autoencoder_folder

    digest = _digest(autoencoder_folder(folder))

    @cache
    def encoder() -> Callable[[torch.Tensor], np.ndarray]:
        from rdmd_fast.model_files.autoencoder import Autoencoder
        from rdmd_fast.processes.devices import pick_device

        on = pick_device(device)
        autoencoder = Autoencoder(folder).to(on)
        return lambda images: autoencoder.encode(images.to(on)).float().cpu().numpy()

    def encode_images(images: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return encoder()(image_normalize(pixels, torch.float32))

    return [
        dataclasses.replace(
            each,
            content={**each.content, "encoder_sha256": digest},
            encode=encode_images,
        )
        for each in sets
    ]


def _digest(folder: Path) -> str:
    """Of the autoencoder's configuration and weights."""
    if not (folder / "config.json").is_file():
        raise InputError(f"--encoder {folder}: no config.json there; name the folder of a diffusers AutoencoderKL")
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
