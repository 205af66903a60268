"""Measures that need the truth: images whose true translation is known, such as the same emoji by another vendor."""

from typing import NamedTuple

import torch
from torch import Tensor

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.checks import image_batch

BLOCK = 256  # outputs compared with all targets at a time


class Found(NamedTuple):
    """Shares of the outputs whose true target is the nearest, ``top1``, or among the five nearest, ``top5``."""

    top1: float
    top5: float


class ColourMap(NamedTuple):
    """y = ``matrix`` x + ``bias`` of a pixel's channels, fp64 [C, C] and [C].

    ``residual`` is the mean squared error of the pairs that it was fitted to, over pixels and channels.
    """

    matrix: Tensor
    bias: Tensor
    residual: float

    def __call__(self, images: Tensor) -> Tensor:
        """The map of images [N, C, H, W], in their dtype."""
        mapped = torch.einsum("dc,nchw->ndhw", self.matrix, images.double()) + self.bias[:, None, None]
        return mapped.to(images.dtype)


def nearest_is_true(outputs, targets) -> Found:
    """How often an output is nearer, in L2, to its own target than to the others.

    A target that is as near as the true one counts as nearer, so that equal outputs, or equal targets, find nothing.

    Args:
        outputs: [N, C, H, W] in [-1, 1], array, tensor or PixelImages; output i belongs to target i.
        targets: of the same shape.

    Raises:
        InputError: other shapes, integer images, or values that are not finite.
    """
    outputs, targets = _pairs(outputs, targets)
    truth = _rows(targets)
    ranks = []
    for start in range(0, len(outputs), BLOCK):
        distances = torch.cdist(
            _rows(outputs[start : start + BLOCK]), truth, compute_mode="donot_use_mm_for_euclid_dist"
        )
        own = torch.arange(start, start + len(distances))
        true = distances.gather(1, own[:, None])
        ranks.append((distances <= true).sum(1) - 1)
    rank = torch.cat(ranks)
    return Found((rank < 1).double().mean().item(), (rank < 5).double().mean().item())


def fitted_colour_map(x, y) -> ColourMap:
    """The map of colours, linear with a bias, that brings the pixels of ``x`` nearest to those of ``y``.

    It is fitted by least squares over all pixels of all pairs, and of the maps that fit alike the one of the smallest
    matrix: a channel that never varies in ``x`` has no part in it.

    Args:
        x: [N, C, H, W], array, tensor or PixelImages.
        y: of the same shape; image i of ``x`` belongs to image i of ``y``.

    Raises:
        InputError: other shapes, integer images, or values that are not finite.
    """
    x, y = _pairs(x, y)
    blocks = range(0, len(x), BLOCK)
    count = x[:].numel() // x.shape[1]
    mean_x, mean_y = (sum(_colours(z[i : i + BLOCK]).sum(0) for i in blocks) / count for z in (x, y))
    xx, xy, yy = 0.0, 0.0, 0.0
    for i in blocks:
        a, b = _colours(x[i : i + BLOCK]) - mean_x, _colours(y[i : i + BLOCK]) - mean_y
        xx, xy, yy = xx + a.T @ a, xy + a.T @ b, yy + b.square().sum()
    matrix = (torch.linalg.pinv(xx, rtol=1e-12, hermitian=True) @ xy).T
    residual = yy - 2 * (matrix * xy.T).sum() + ((matrix @ xx) * matrix).sum()
    return ColourMap(matrix, mean_y - matrix @ mean_x, max(residual.item(), 0.0) / (count * x.shape[1]))


def _pairs(x, y):
    x, y = image_batch(x, "first image batch"), image_batch(y, "second image batch")
    if x.shape != y.shape:
        raise InputError(f"image batches have shapes {list(x.shape)} and {list(y.shape)}: give pairs")
    return x, y


def _rows(images: Tensor) -> Tensor:
    return images[:].double().flatten(1)


def _colours(images: Tensor) -> Tensor:
    """fp64 [pixels, C] of images [N, C, H, W]."""
    return images.double().movedim(1, -1).flatten(0, -2)
