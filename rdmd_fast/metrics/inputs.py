"""What every metric checks of its inputs, and the optional packages that metrics need."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch

from rdmd_fast.errors import InputError


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``; raises InputError that names the extra to install when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, extra) from error


def expect(package: str, extra: str) -> None:
    """``require`` of a package that is imported later, if at all: its import takes a second and memory."""
    if importlib.util.find_spec(package) is None:
        raise _missing(package, extra)


def _missing(module: str, extra: str) -> InputError:
    package = "POT" if module == "ot" else module.partition(".")[0]
    return InputError(f"{package} is not installed: run `pip install rdmd_fast[{extra}]`")


def fp64_rows(values, name: str) -> np.ndarray:
    """``values`` (array or tensor, any device and dtype) as fp64 [n, d].

    Raises InputError when it is not a non-empty matrix or holds NaN or infinity.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise InputError(f"{name} has shape {list(rows.shape)}: give a non-empty [samples, dimensions] array")
    if not np.isfinite(rows).all():
        raise InputError(f"{name} holds NaN or infinity: check whether the network that made it diverged")
    return rows


class PixelImages:
    """Pixels, uint8 [N, C, H, W] on the CPU, that are read as images in [-1, 1]: k / 127.5 - 1.

    Indexing, iteration and ``split`` give float32, so that a set takes a quarter of the memory of its images.
    """

    def __init__(self, pixels: torch.Tensor):
        self.pixels, self.shape = pixels, pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> torch.Tensor:
        return self.pixels[index].float().div_(127.5).sub_(1)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """Float32 [size, C, H, W] one after another; the last may be shorter."""
        return (self[first : first + size] for first in range(0, len(self), size))


def image_batch(images, name: str) -> torch.Tensor | PixelImages:
    """``images`` (array or tensor, any device) as a floating-point CPU tensor [N, C, H, W], dtype kept.

    PixelImages are given back as they are. Raises InputError for another rank, for integer tensors (they would not be
    in [-1, 1]), for an empty batch and for NaN or infinity.
    """
    if isinstance(images, PixelImages) and len(images):
        return images
    batch = torch.as_tensor(getattr(images, "pixels", images)).detach().cpu()
    if batch.ndim != 4 or batch.numel() == 0:
        raise InputError(f"{name} has shape {list(batch.shape)}: give a non-empty [N, C, H, W] batch")
    if not batch.is_floating_point():
        raise InputError(f"{name} has dtype {batch.dtype}: give floating-point images in [-1, 1]")
    if not torch.isfinite(batch).all():
        raise InputError(f"{name} holds NaN or infinity: check whether the network that made it diverged")
    return batch
