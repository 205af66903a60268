import numpy as np
import pytest
import torch
from material import save_script

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.feature_cache import cached_features, images_sha256
from rdmd_fast.metrics.feature_extractor import load_extractor


class Pooled(torch.nn.Module):
    """Means of random filters' responses [N, D], as a program that takes images in [-1, 1]."""

    def __init__(self, dimensions: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.filters = torch.nn.Conv2d(3, dimensions, 3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(torch.tanh(self.filters(images))).mean((2, 3))


class OfPixels(Pooled):
    """The same of pixels from 0 to 255, called as FID's Inception is."""

    def forward(self, img, return_features: bool = False, use_fp16: bool = False):
        features = torch.tanh(self.filters(img.to(torch.float32) / 127.5 - 1)).mean((2, 3), keepdim=True)
        return features if return_features else features.sum(1)


class Spatial(Pooled):
    def forward(self, images):
        return self.filters(images)


class Pair(Pooled):
    def forward(self, images):
        return images, images


class Infinite(Pooled):
    def forward(self, images):
        return self.filters(images).mean((2, 3)) / 0.0


@pytest.fixture
def images():
    # Values that 8 bits hold, so that rounding changes none.
    return torch.randint(0, 256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(1)) / 127.5 - 1


def test_features_of_images_in_their_range_do_not_depend_on_the_batch(tmp_path, images):
    extractor = load_extractor(save_script(Pooled(), tmp_path / "f.pt"), batch_size=3)
    with torch.no_grad():
        expected = Pooled().eval()(images).numpy()
    assert extractor.pixels == "float"
    assert extractor(images).dtype == np.float64
    np.testing.assert_allclose(extractor(images), expected, atol=1e-6)


def test_a_file_with_return_features_gets_bytes_and_the_flag_decides_otherwise(tmp_path, images):
    path = save_script(OfPixels(), tmp_path / "inception.pt")
    with torch.no_grad():
        expected = Pooled().eval()(images).numpy()
    extractor = load_extractor(path)
    assert extractor.pixels == "uint8"
    np.testing.assert_allclose(extractor(images), expected, atol=1e-5)
    # What a saved picture would hold: values in between are rounded, values outside cut off.
    np.testing.assert_array_equal(extractor(images + 0.4 / 127.5), extractor(images))
    as_floats = load_extractor(path, "float")(images)
    with torch.no_grad():
        np.testing.assert_allclose(as_floats, OfPixels()(images, True).flatten(1).numpy(), atol=1e-6)
    assert np.abs(as_floats - expected).max() > 0.01


def test_what_is_no_feature_network_is_refused_in_one_line(tmp_path, images):
    with pytest.raises(InputError, match="no such file"):
        load_extractor(tmp_path / "none.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("not a network")
    for name in ("weights.pt", "text.pt"):
        with pytest.raises(InputError, match="not a TorchScript network"):
            load_extractor(tmp_path / name)
    for module, message in [(Spatial, r"\[7, 5, 6, 6\]"), (Pair, "tuple"), (Infinite, "NaN or infinity")]:
        extractor = load_extractor(save_script(module(), tmp_path / f"{module.__name__}.pt"))
        with pytest.raises(InputError, match=message):
            extractor(images)
    with pytest.raises(InputError, match=r"does not take samples of shape \[7, 1, 8, 8\]"):
        load_extractor(save_script(Pooled(), tmp_path / "f.pt"))(images[:, :1])


def test_features_are_kept_for_one_network_and_one_set_of_images(tmp_path, images):
    extractor, other = (load_extractor(save_script(Pooled(d), tmp_path / f"{d}.pt")) for d in (5, 6))
    folder = tmp_path / "cache"
    computed = []

    def features(extractor, images):
        def counted(batch):
            computed.append(len(batch))
            return extractor(batch)

        counted.sha256, counted.pixels = extractor.sha256, extractor.pixels
        return cached_features(counted, images, folder)

    first = features(extractor, images)
    np.testing.assert_array_equal(first, extractor(images))
    np.testing.assert_array_equal(features(extractor, images.clone()), first)
    assert computed == [7]
    # Another order, another count, another pixel, another network: none of them finds the first one's.
    changed = images.clone()
    changed[3, 1, 2, 2] += 1 / 127.5
    for each, batch in [(extractor, images.flip(0)), (extractor, images[:5]), (extractor, changed), (other, images)]:
        np.testing.assert_array_equal(features(each, batch), each(batch))
    assert computed == [7, 7, 5, 7, 7]
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_damaged_features_are_computed_again(tmp_path, images, damage):
    extractor = load_extractor(save_script(Pooled(), tmp_path / "f.pt"))
    expected = cached_features(extractor, images, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_array_equal(cached_features(extractor, images, tmp_path / "cache"), expected)
    assert path.read_bytes() == whole


def test_the_hash_of_images_tells_shapes_apart(images):
    assert images_sha256(images) == images_sha256(images.to(memory_format=torch.channels_last))
    assert images_sha256(images) != images_sha256(images.reshape(7, 3, 4, 16))
    assert images_sha256(torch.zeros(2, 3, 4, 4)) != images_sha256(torch.zeros(1, 3, 8, 4))
