"""How far an output image lies from its input: distances, PSNR, SSIM and mean colour.

All take two batches [N, C, H, W] in [-1, 1], arrays, tensors or PixelImages, and average over the images in fp64. They
raise InputError for other shapes, integer images and values that are not finite.
"""

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.metrics.checks import image_batch

DATA_RANGE = 2.0
SSIM_WINDOW = 7  # pixels, scikit-image's default
# Images converted at a time: a whole 256x256 test set in fp64 need not fit in memory.
BLOCK = 64


def _pairs(x, y) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = image_batch(x, "first image batch"), image_batch(y, "second image batch")
    if x.shape != y.shape:
        raise InputError(f"image batches have shapes {list(x.shape)} and {list(y.shape)}: give pairs")
    return x, y


def _squared_distances(x, y) -> tuple[torch.Tensor, int]:
    """Sums of squared differences, fp64 [N], and the number of elements of an image."""
    x, y = _pairs(x, y)
    blocks = zip(x.split(BLOCK), y.split(BLOCK), strict=True)
    return torch.cat([(a.double() - b.double()).square().sum((1, 2, 3)) for a, b in blocks]), x[0].numel()


def l2(x, y) -> float:
    """Mean over images of the Euclidean distance |x_i - y_i| in data units (pixels in [-1, 1])."""
    return _squared_distances(x, y)[0].sqrt().mean().item()


def mse_per_pixel(x, y) -> float:
    """Mean squared difference over images, pixels and channels, in data units squared."""
    squared, elements = _squared_distances(x, y)
    return squared.mean().item() / elements


def psnr(x, y) -> float:
    """Mean peak signal-to-noise ratio of the pairs in dB, data range 2; infinite if a pair is equal."""
    squared, elements = _squared_distances(x, y)
    return (10 * torch.log10(DATA_RANGE**2 * elements / squared)).mean().item()


def ssim(x, y) -> float:
    """Mean structural similarity of the pairs (Wang et al. 2004) by scikit-image, data range 2, mean over channels.

    Uniform windows of 7x7 pixels, scikit-image's default, or of the largest odd side that fits smaller images; they
    lie wholly inside the image. Also raises InputError for images of fewer than 3 pixels a side.
    """
    structural_similarity = require("skimage.metrics", "eval").structural_similarity
    x, y = _pairs(x, y)
    window = min(SSIM_WINDOW, *x.shape[2:])
    window -= 1 - window % 2
    if window < 3:
        raise InputError(f"images are {x.shape[2]}x{x.shape[3]}: SSIM needs 3 pixels a side")
    values = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), win_size=window, data_range=DATA_RANGE, channel_axis=0
        )
        for a, b in zip(x, y, strict=True)
    ]
    return float(sum(values) / len(values))


def unit_range(images) -> torch.Tensor:
    """Images [N, C, H, W] from [-1, 1] to [0, 1], clipped to what a saved picture would show."""
    return ((image_batch(images, "image batch") + 1) / 2).clamp(0, 1)


def _mean_colours(images) -> torch.Tensor:
    """The mean over the pixels of [0, 1], fp64 [N, C]."""
    blocks = image_batch(images, "image batch").split(BLOCK)
    return torch.cat([unit_range(block).mean((2, 3), dtype=torch.float64) for block in blocks])


def mean_colour_cosine(x, y) -> float:
    """Mean over images of the cosine between the mean colours of x_i and y_i, each an RGB vector in [0, 1]^3.

    1 when the hue of the mean colour is kept, whatever the brightness. A pair with a wholly black image
    counts as 0: there is no colour to keep.
    """
    colours = [_mean_colours(images) for images in (x, y)]
    if colours[0].shape != colours[1].shape:
        raise InputError(f"mean colours have shapes {[list(c.shape) for c in colours]}: give pairs of images")
    return torch.cosine_similarity(*colours, dim=1, eps=1e-12).mean().item()
