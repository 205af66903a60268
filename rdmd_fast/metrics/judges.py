"""Does a translated digit read as the target digit? Judges trained on real images alone.

Images are compared by their grey value, the largest of the colour channels (the V of HSV), so that the judges
see the shape and not the colour, which a good translation keeps.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError
from rdmd_fast.extras import check_installed, require
from rdmd_fast.metrics.checks import image_batch
from rdmd_fast.metrics.image_distances import BLOCK, unit_range

if TYPE_CHECKING:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier

NEIGHBOURS = 3
HIDDEN_UNITS = (64, 16)


def _grey(images) -> np.ndarray:
    """Grey values in [0, 1], fp64 [N, H * W], of images [N, C, H, W] in [-1, 1]."""
    blocks = image_batch(images, "image batch").split(BLOCK)
    return torch.cat([unit_range(block).amax(1).flatten(1) for block in blocks]).double().numpy()


def _distinct_grey(shards: ShardSet) -> np.ndarray:
    """Distinct grey images, fp64 [N, H * W] in [0, 1].

    The hue copies of an image have one grey image; each counts once, or its copies would be its neighbours.
    """
    grey = np.stack([shards.read(i).max(axis=-1) for i in range(len(shards))])
    return np.unique(grey.reshape(len(grey), -1), axis=0) / 255.0


class _Fitted(NamedTuple):
    """The judges, and the held-out images they were checked on."""

    knn: KNeighborsClassifier
    network: MLPClassifier
    test_images: np.ndarray
    test_labels: np.ndarray


class DigitJudge:
    """3-NN and a small feature network, fitted to ROOT/<digit>/train and checked on ROOT/<digit>/test.

    Deterministic, and fitted within seconds when first asked: a run that validates later begins before. Attributes:
    ``classes`` (int [K]), ``image_size`` (H, W), and ``knn_accuracy`` and ``network_accuracy`` in [0, 1] on the
    held-out images. Raises InputError when ``root`` holds no such folders, their sizes differ, or scikit-learn is
    missing.
    """

    def __init__(self, root: str | Path):
        folders = sorted(
            (f for f in Path(root).glob("*") if f.name.isdigit() and (f / "train").is_dir()),
            key=lambda f: int(f.name),
        )
        if len(folders) < 2:
            raise InputError(f"{root}: no digit folders such as 2/train and 3/train, run `rdmd pack digits` first")
        self.classes = np.array([int(f.name) for f in folders])
        self._shards = {split: [ShardSet(folder / split) for folder in folders] for split in ("train", "test")}
        shards = [*self._shards["train"], *self._shards["test"]]
        self.image_size = tuple(shards[0].shape[:2])
        for other in shards:
            if tuple(other.shape[:2]) != self.image_size:
                size = tuple(other.shape[:2])
                raise InputError(f"{other.path}: {size} images among {self.image_size}, pack at one size")
        check_installed("sklearn", "eval")

    @functools.cached_property
    def _fitted(self) -> _Fitted:
        neighbors = require("sklearn.neighbors", "eval")
        neural_network = require("sklearn.neural_network", "eval")
        images, labels = self._load("train")
        knn = neighbors.KNeighborsClassifier(min(NEIGHBOURS, len(images))).fit(images, labels)
        network = neural_network.MLPClassifier(HIDDEN_UNITS, alpha=1e-3, max_iter=500, tol=1e-3, random_state=0)
        network.fit(images, labels)
        return _Fitted(knn, network, *self._load("test"))

    def _load(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        images = [_distinct_grey(shards) for shards in self._shards[split]]
        labels = [np.full(len(grey), digit) for grey, digit in zip(images, self.classes, strict=True)]
        return np.concatenate(images), np.concatenate(labels)

    @functools.cached_property
    def knn_accuracy(self) -> float:
        fitted = self._fitted
        return float(fitted.knn.score(fitted.test_images, fitted.test_labels))

    @functools.cached_property
    def network_accuracy(self) -> float:
        fitted = self._fitted
        return float(fitted.network.score(fitted.test_images, fitted.test_labels))

    def _checked_grey(self, images) -> np.ndarray:
        height, width = images.shape[-2:]
        if (height, width) != tuple(self.image_size):
            raise InputError(f"images are {height}x{width} and the judge's {self.image_size}: translate at its size")
        return _grey(images)

    def knn_labels(self, images) -> np.ndarray:
        """Digit of each image by its three nearest real training images; images [N, C, H, W], int64 [N]."""
        return self._fitted.knn.predict(self._checked_grey(images))

    def features(self, images) -> np.ndarray:
        """Last hidden activations of the network, fp64 [N, 16], for images [N, C, H, W] in [-1, 1]."""
        activations, network = self._checked_grey(images), self._fitted.network
        for weight, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
            activations = np.maximum(activations @ weight + bias, 0)
        return activations

    def check(self, label: int) -> None:
        """InputError for a digit that it does not know."""
        if label not in self.classes:
            raise InputError(f"digit {label} is not among {self.classes.tolist()}: pack it or name another")

    def recall(self, label: int) -> float:
        """Share of a digit's real held-out images that 3-NN labels right: what a perfect generator scores."""
        self.check(label)
        fitted = self._fitted
        return float(np.mean(fitted.knn.predict(fitted.test_images[fitted.test_labels == label]) == label))
