"""Between uint8 pixels and images in [-1, 1]."""

from collections.abc import Iterator

import torch


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to the nearest of {0, ..., 255}, values outside cut off; same shape and device.

    NaN becomes mid grey: a picture must not stop a training run.
    """
    return ((images.detach().float().nan_to_num() + 1) * 127.5).round().clamp(0, 255).byte()


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
