"""Pictures of a run's samples: images as they are, latents through their decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .distributed import World
from .errors import InputError

Rows = list[tuple[str, torch.Tensor]]


def picture_writer(decoder: str | None, shape: tuple[int, ...], world: World) -> Callable[[Rows, Path], None] | None:
    """A function that writes rows of (label, samples [N, C, H, W]) as a grid; None if such samples have no picture.

    Args:
        decoder: folder of a diffusers AutoencoderKL for latents; None draws samples of one or three channels.
        shape: of a sample.
        world: where latents are decoded; only the main rank keeps a decoder.

    Raises:
        InputError: no decoder there, or one for other samples.
    """
    from .drawing import image_grid

    if decoder is None:
        return image_grid if len(shape) == 3 and shape[0] in (1, 3) else None
    from .latents import Autoencoder

    autoencoder = Autoencoder(decoder)
    if len(shape) != 3 or shape[0] != autoencoder.channels:
        raise InputError(
            f"telemetry.decoder: {decoder} decodes latents of {autoencoder.channels} channels, the data has shape "
            f"{tuple(shape)}: name the autoencoder that has encoded it"
        )
    if not world.is_main:
        return lambda rows, path: None

    def write(rows: Rows, path: Path) -> None:
        # On the device for the time of a picture alone: the memory is the training's.
        autoencoder.to(world.device)
        image_grid([(label, autoencoder.decode(samples)) for label, samples in rows], path)
        autoencoder.to("cpu")

    return write


def no_picture(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Stands in where samples cannot be drawn."""
