"""Decoded bytes to network input.

    x = u / 127.5 - 1        u in {0, ..., 255},  x in [-1, 1], both ends exact

Images stay uint8 until they are on the device: a quarter of the bytes of fp32 cross the bus.
"""

import torch
from torch import Tensor


def image_normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map bytes to [-1, 1].

    Args:
        images: uint8 [N, C, H, W] of any memory format, usually channels_last.
        dtype: floating dtype of the result; the value is computed in fp32 and rounded once.

    Returns:
        ``dtype`` [N, C, H, W] in the memory format of ``images``.

    Raises:
        TypeError: ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, want torch.uint8")
    return images.to(torch.float32).div_(127.5).sub_(1).to(dtype)
