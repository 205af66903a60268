import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.image_distances import l2, mean_colour_cosine, mse_per_pixel, psnr, ssim, unit_range


@pytest.fixture
def pair():
    # More images than one conversion block holds, each with its own error.
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(70, 3, 5, 4)).astype(np.float32)
    return x, np.clip(x + rng.normal(size=x.shape) * np.linspace(0.01, 0.5, 70)[:, None, None, None], -1, 1)


def test_psnr_and_mse_match_scikit_image(pair):
    x, y = pair
    expected = [peak_signal_noise_ratio(a.astype(float), b, data_range=2) for a, b in zip(x, y, strict=True)]
    assert psnr(x, y) == pytest.approx(np.mean(expected), rel=1e-6)
    assert mse_per_pixel(x, torch.tensor(y)) == pytest.approx(mean_squared_error(x.astype(float), y), rel=1e-6)


def test_psnr_matches_torchmetrics(pair):
    x, y = map(torch.as_tensor, pair)
    expected = torchmetrics_psnr(y, x.double(), data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
    assert psnr(x, y) == pytest.approx(expected.item(), rel=1e-6)


def explicit_ssim(x, y, side):
    """Wang et al. 2004, Equation 13, of one channel, from sums over every window that lies in the image."""
    values = []
    for top in range(x.shape[0] - side + 1):
        for left in range(x.shape[1] - side + 1):
            a, b = (image[top : top + side, left : left + side].ravel() for image in (x, y))
            covariance = np.cov(a, b)
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            means = 2 * a.mean() * b.mean() + c1, a.mean() ** 2 + b.mean() ** 2 + c1
            spreads = 2 * covariance[0, 1] + c2, covariance[0, 0] + covariance[1, 1] + c2
            values.append(means[0] * spreads[0] / (means[1] * spreads[1]))
    return np.mean(values)


@pytest.mark.parametrize(("height", "width", "side"), [(9, 12, 7), (8, 8, 7), (6, 9, 5), (4, 3, 3)])
def test_ssim_matches_its_definition_in_windows_that_fit(height, width, side):
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, size=(3, 3, height, width))
    y = np.clip(x + 0.3 * rng.normal(size=x.shape), -1, 1)
    expected = np.mean(
        [
            explicit_ssim(a, b, side)
            for a, b in zip(x.reshape(9, height, width), y.reshape(9, height, width), strict=True)
        ]
    )
    assert ssim(x, y) == pytest.approx(expected, rel=1e-9)
    assert ssim(x, x) == pytest.approx(1)


def test_l2_is_the_mean_of_the_norms_and_not_the_norm_of_the_means(pair):
    x, y = pair
    norms = np.linalg.norm((x - y).reshape(70, -1), axis=1)
    assert l2(x, y) == pytest.approx(norms.mean(), rel=1e-6)
    assert norms.mean() < 0.95 * np.sqrt(np.mean(norms**2))
    assert l2(torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)) == pytest.approx(2 * np.sqrt(48))


def test_equal_images_have_no_distance_and_infinite_psnr(pair):
    assert l2(pair[0], pair[0]) == 0
    assert psnr(pair[0], pair[0]) == float("inf")


def coloured(*colours):
    """Images whose left half is black and whose right half has the colour, [0, 1] RGB."""
    images = torch.zeros(len(colours), 3, 4, 4)
    images[..., 2:] = torch.tensor(colours)[:, :, None, None]
    return images * 2 - 1


def test_colour_cosine_compares_hue_and_not_brightness_or_shape():
    red, dim_red, green = [1.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.0, 1.0, 0.0]
    assert mean_colour_cosine(coloured(red), coloured(dim_red).flip(-1)) == pytest.approx(1)
    assert mean_colour_cosine(coloured(red, red), coloured(red, green)) == pytest.approx(0.5)
    yellow = coloured([1.0, 1.0, 0.0])
    assert mean_colour_cosine(coloured(red), yellow) == pytest.approx(np.sqrt(0.5))
    assert mean_colour_cosine(coloured(red), coloured([0.0, 0.0, 0.0])) == 0


def test_overshoot_is_clipped_before_colours_are_compared():
    overshoot = coloured([1.0, 0.0, 0.0]) * 1.5
    assert unit_range(overshoot).max() == 1
    assert mean_colour_cosine(overshoot, coloured([0.2, 0.0, 0.0])) == pytest.approx(1)


def test_bad_batches_are_refused(pair):
    x, _ = pair
    for metric in (l2, mse_per_pixel, psnr, ssim, mean_colour_cosine):
        with pytest.raises(InputError, match="pairs"):
            metric(x, x[:5])
        with pytest.raises(InputError, match=r"\[N, C, H, W\]"):
            metric(x[0], x[0])
        with pytest.raises(InputError, match="floating"):
            metric(x, np.zeros(x.shape, dtype=np.uint8))
        with pytest.raises(InputError, match="NaN"):
            metric(x, np.full_like(x, np.nan))
    with pytest.raises(InputError, match="3 pixels"):
        ssim(x[..., :2], x[..., :2])
