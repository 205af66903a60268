import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.images import l2, mean_colour_cosine, mse_per_pixel, psnr, unit_range


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
    for metric in (l2, mse_per_pixel, psnr, mean_colour_cosine):
        with pytest.raises(InputError, match="pairs"):
            metric(x, x[:5])
        with pytest.raises(InputError, match=r"\[N, C, H, W\]"):
            metric(x[0], x[0])
        with pytest.raises(InputError, match="floating"):
            metric(x, np.zeros(x.shape, dtype=np.uint8))
        with pytest.raises(InputError, match="NaN"):
            metric(x, np.full_like(x, np.nan))
