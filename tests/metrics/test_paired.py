import numpy as np
import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.metrics import paired
from rdmd_fast.metrics.paired import fitted_colour_map, nearest_is_true
from rdmd_fast.pixels import PixelImages


def images(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(paired, "BLOCK", 8)


def test_own_targets_are_found():
    targets = images(0, 20, 3, 4, 4)
    assert nearest_is_true(targets + 0.01 * images(1, *targets.shape), targets) == (1.0, 1.0)
    assert nearest_is_true(targets.roll(1, 0), targets).top1 == 0


def test_places_on_a_line_have_known_ranks():
    """Target i is at i, output i at i + d: as many targets are nearer than the true one as lie within d of it."""
    places = torch.arange(30.0)[:, None, None, None] / 100
    for shift, top1, top5 in ((0.4, 1, 1), (0.6, 1 / 30, 1), (2.2, 1 / 30, 1), (2.6, 1 / 30, 5 / 30)):
        found = nearest_is_true(places + shift / 100, places)
        # The last outputs, beyond all targets, have fewer of them near: those within 2 * shift of the true one.
        ranks = [sum(abs(i + shift - j) < shift - 1e-9 for j in range(30)) for i in range(30)]
        assert found.top1 == pytest.approx(np.mean([rank < 1 for rank in ranks]))
        assert found.top5 == pytest.approx(np.mean([rank < 5 for rank in ranks]))
        assert found == pytest.approx((top1, top5))


def test_equal_outputs_find_nothing():
    flat = torch.zeros(12, 3, 2, 2)
    assert nearest_is_true(flat, flat) == (0.0, 0.0)


def test_a_colour_map_is_found_again():
    x = images(0, 20, 3, 4, 5)
    matrix, bias = images(1, 3, 3), images(2, 3)
    y = torch.einsum("dc,nchw->ndhw", matrix, x) + bias[:, None, None]
    found = fitted_colour_map(x, y)
    torch.testing.assert_close(found.matrix, matrix)
    torch.testing.assert_close(found.bias, bias)
    torch.testing.assert_close(found(x), y)
    assert found.residual == pytest.approx(0, abs=1e-12)


def test_a_noisy_map_is_that_of_least_squares():
    x, y = images(3, 20, 3, 4, 5).float(), images(4, 20, 3, 4, 5).float()
    found = fitted_colour_map(x, y.numpy())
    columns, wanted = (z.double().movedim(1, -1).reshape(-1, 3).numpy() for z in (x, y))
    solution, squares, *_ = np.linalg.lstsq(np.c_[columns, np.ones(len(columns))], wanted, rcond=None)
    np.testing.assert_allclose(found.matrix, solution[:3].T, atol=1e-9)
    np.testing.assert_allclose(found.bias, solution[3], atol=1e-9)
    assert found.residual == pytest.approx(squares.sum() / wanted.size)
    assert found.residual == pytest.approx((found(x.double()) - y).square().mean().item())


def test_grey_pictures_have_the_smallest_matrix():
    grey = images(5, 10, 1, 4, 4).expand(-1, 3, -1, -1)
    found = fitted_colour_map(grey, -grey)
    torch.testing.assert_close(found.matrix, torch.full((3, 3), -1 / 3, dtype=torch.double))
    flat = fitted_colour_map(torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2))
    assert flat.matrix.abs().max() == 0 and (flat.bias == 1).all() and flat.residual == 0


def test_pixels_are_read_as_images():
    pixels = torch.from_numpy(np.random.default_rng(6).integers(0, 256, (20, 3, 4, 4), dtype=np.uint8))
    assert nearest_is_true(PixelImages(pixels), PixelImages(pixels)) == (1.0, 1.0)
    found = fitted_colour_map(PixelImages(pixels), PixelImages(255 - pixels))
    torch.testing.assert_close(found.matrix, -torch.eye(3, dtype=torch.double), atol=1e-6, rtol=0)


@pytest.mark.parametrize("measure", [nearest_is_true, fitted_colour_map])
def test_other_shapes_are_refused(measure):
    with pytest.raises(InputError, match="give pairs"):
        measure(images(0, 3, 3, 2, 2), images(0, 4, 3, 2, 2))
    with pytest.raises(InputError, match="floating-point"):
        measure(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), images(0, 2, 3, 2, 2))
