import colorsys

import numpy as np
import pytest
import torch
from material import encoded, write_tar
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.frechet import frechet_distance
from rdmd_fast.metrics.image_report import ImageReport
from rdmd_fast.metrics.judges import DigitJudge
from rdmd_fast.metrics.tables import format_table

HUES = (0.0, 0.3, 0.7)
DIGITS = (2, 3, 8)


def colour_copies(grey):
    """uint8 [copies * N, 8, 8, 3]: every grey image of 0 .. 16 at every hue of HUES."""
    value = np.round(grey * 255 / 16)
    hues = np.array([colorsys.hsv_to_rgb(hue, 1, 1) for hue in HUES])
    return np.round(value[None, ..., None] * hues[:, None, None, None]).astype(np.uint8).reshape(-1, 8, 8, 3)


def grey_split(digit, split):
    data = load_digits()
    grey = data.images[data.target == digit]
    held_out = np.arange(len(grey)) % 5 == 0
    return grey[held_out] if split == "test" else grey[~held_out]


def in_unit_interval(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    for digit in DIGITS:
        for split in ("train", "test"):
            images = enumerate(colour_copies(grey_split(digit, split)))
            write_tar(folder / f"{digit}/{split}/000.tar", {f"{i:05d}.png": encoded(image) for i, image in images})
    return folder


@pytest.fixture(scope="module")
def judge(root):
    return DigitJudge(root)


@pytest.fixture(scope="module")
def test_images():
    return {digit: in_unit_interval(colour_copies(grey_split(digit, "test"))) for digit in DIGITS}


def test_it_reads_real_digits_and_says_how_well(judge, test_images):
    assert judge.classes.tolist() == list(DIGITS)
    assert tuple(judge.image_size) == (8, 8)
    assert 0.97 < judge.knn_accuracy <= 1
    assert 0.95 < judge.network_accuracy <= 1
    for digit in DIGITS:
        assert np.mean(judge.knn_labels(test_images[digit]) == digit) == pytest.approx(judge.recall(digit))


def test_labels_ignore_colour_and_come_from_distinct_images(judge, test_images):
    labels = judge.knn_labels(test_images[8]).reshape(len(HUES), -1)
    assert (labels == labels[0]).all()

    # With hue copies counted, the nearest neighbour would hold all three votes.
    train = np.concatenate([grey_split(digit, "train") for digit in DIGITS])
    target = np.concatenate([np.full(len(grey_split(digit, "train")), digit) for digit in DIGITS])
    three = KNeighborsClassifier(3).fit(train.reshape(len(train), -1), target)
    noisy = np.random.default_rng(0).uniform(0, 16, size=(300, 8, 8)).round()
    outputs = in_unit_interval(colour_copies(noisy)[:300])
    expected = three.predict(noisy.reshape(300, -1))
    one = KNeighborsClassifier(1).fit(train.reshape(len(train), -1), target)
    agreement = np.mean(judge.knn_labels(outputs) == expected)
    assert agreement > 0.97 > np.mean(one.predict(noisy.reshape(300, -1)) == expected)


def test_features_are_the_hidden_layer_that_the_network_classifies_by(judge, test_images):
    features = judge.features(test_images[3])
    assert features.shape == (len(test_images[3]), 16)
    logits = features @ judge._fitted.network.coefs_[-1] + judge._fitted.network.intercepts_[-1]
    grey = test_images[3].add(1).div(2).amax(1).flatten(1).numpy()
    np.testing.assert_array_equal(judge.classes[logits.argmax(1)], judge._fitted.network.predict(grey))


def test_the_judge_is_the_same_each_time(root, judge, test_images):
    np.testing.assert_array_equal(DigitJudge(root).features(test_images[2]), judge.features(test_images[2]))


def test_the_report_tells_a_translation_from_a_copy(judge, test_images):
    twos, threes = test_images[2][:90], test_images[3]
    report = ImageReport(threes, judge, 3)
    copied, ideal = report.row("copy", twos, twos), report.row("real threes", twos, threes[:90])
    assert (copied["name"], copied["images"], copied["real_images"]) == ("copy", 90, len(threes))
    assert copied["share_3nn"] < 0.1 < 0.9 < ideal["share_3nn"]
    assert copied["colour_cosine"] == pytest.approx(1)
    assert copied["l2"] == copied["mse_per_pixel"] == 0 < ideal["l2"]
    assert copied["psnr"] == float("inf") and copied["ssim"] == 1 > ideal["ssim"]
    assert ideal["frechet"] < 0.2 * copied["frechet"]
    assert copied["frechet"] == pytest.approx(frechet_distance(judge.features(twos), judge.features(threes)), rel=1e-9)


def test_bad_input_is_refused(judge, tmp_path):
    with pytest.raises(InputError, match="no digit folders"):
        DigitJudge(tmp_path)
    with pytest.raises(InputError, match="16x16"):
        judge.knn_labels(torch.zeros(2, 3, 16, 16))
    with pytest.raises(InputError, match="digit 5"):
        judge.recall(5)


def test_tables_align_text_left_and_numbers_right():
    rows = [{"name": "copy", "images": 90, "l2": 0.0}, {"name": "translation", "images": 8, "psnr": 12.34567}]
    assert format_table(rows).splitlines() == [
        "name         images  l2   psnr",
        "copy             90   0      -",
        "translation       8   -  12.35",
    ]
