"""What every metric checks of its inputs, and the optional packages that metrics need."""

import numpy as np
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.pixels import PixelImages


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
