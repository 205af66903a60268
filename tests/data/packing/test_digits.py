import colorsys
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from rdmd_fast.data.packing.sources.digits import coloured_digits, hue_to_rgb
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream


def test_hues_agree_with_colorsys():
    hues = np.concatenate([np.linspace(0, 1, 601)[:-1], [1 - 1e-9]])
    expected = [colorsys.hsv_to_rgb(hue, 1, 1) for hue in hues]
    np.testing.assert_allclose(hue_to_rgb(hues), expected, atol=1e-12)


def test_a_digit_is_its_hue_times_its_grey_values():
    data = load_digits()
    for key, image in list(coloured_digits(2, "test"))[:40]:
        index, copy = map(int, re.fullmatch(r"digit2_(\d{5})_hue(\d)", key).groups())
        assert data.target[index] == 2
        hue = Philox(0).uniform(Stream.HUE, torch.tensor([index]), 8)[0, copy].item()
        expected = 255 * data.images[index][..., None] / 16 * np.array(colorsys.hsv_to_rgb(hue, 1, 1))
        assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
        assert np.abs(image - expected).max() <= 0.5 + 1e-9


def test_splits_are_disjoint_and_together_hold_every_image():
    data = load_digits()
    for digit in (2, 3):
        of_split = {
            split: [int(key.split("_")[1]) for key, _ in coloured_digits(digit, split, hues=1)]
            for split in ("train", "test")
        }
        assert not set(of_split["train"]) & set(of_split["test"])
        assert sorted(of_split["train"] + of_split["test"]) == np.flatnonzero(data.target == digit).tolist()
        assert of_split["test"] == np.flatnonzero(data.target == digit)[::5].tolist()


def test_held_out_twos_number_at_least_280_and_fewer_hues_are_a_subset():
    eight = dict(coloured_digits(2, "test"))
    assert len(eight) == 288
    for key, image in coloured_digits(2, "test", hues=3):
        np.testing.assert_array_equal(image, eight[key])


def test_enlarged_digits_keep_their_hues_and_shrink_to_what_they_were():
    small, large = dict(coloured_digits(3, "test", 2)), dict(coloured_digits(3, "test", 2, 16))
    assert small.keys() == large.keys()
    for key, image in large.items():
        assert image.dtype == np.uint8 and image.shape == (16, 16, 3)
        grey, small_grey = image.max(-1).astype(float), torch.from_numpy(small[key].max(-1))[None, None].double()
        # PyTorch's antialiased bicubic filter is Pillow's; levels of 8×8 are rounded already.
        reference = F.interpolate(small_grey, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 255)[0, 0]
        assert np.abs(grey - reference.numpy()).max() <= 2
        means = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
        assert np.abs(means - small[key]).mean() < 8
        colours = (np.abs(each.astype(float)).sum((0, 1)) for each in (small[key], image))
        first, second = (colour / np.linalg.norm(colour) for colour in colours)
        assert first @ second > 0.9999


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"rdmd_fast\[eval\]"):
        next(coloured_digits(2, "test"))
