"""Features of images by a network that the user names, for FID and KID."""

from pathlib import Path

import numpy as np
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.checks import image_batch
from rdmd_fast.networks.feature_networks import FeatureNetwork, PixelInput, naming


class FeatureExtractor:
    """``extractor(images)``: images [N, C, H, W] in [-1, 1] to fp64 features [N, D].

    Attributes:
        sha256: of the file.
        pixels: "uint8" if images are rounded to 8 bits for it, "float" if it takes them as they are.

    Raises:
        InputError: the network does not take the images, or gives another shape than [N, D] or [N, D, 1, 1], or
            values that are not finite.
    """

    def __init__(self, network: FeatureNetwork, device: torch.device | str = "cpu", batch_size: int = 64):
        self.network, self.device, self.batch_size = network, device, batch_size
        self.path, self.sha256, self.pixels = network.path, network.sha256, network.pixels

    def __call__(self, images) -> np.ndarray:
        batch = image_batch(images, "image batch")
        return np.concatenate([self._features(part) for part in batch.split(self.batch_size)])

    def _features(self, images: torch.Tensor) -> np.ndarray:
        with naming(self.path, tuple(images.shape), self.device, "--batch-size"):
            features = self.network.measure(images.to(self.device)).cpu()
        if features.ndim == 1 and len(images) == 1:
            features = features[None]  # squeeze() in a network drops a batch's dimension, too, where that is of one
        if features.shape[:1] != images.shape[:1] or features.ndim not in (2, 4) or features.shape[2:].numel() != 1:
            raise InputError(
                f"{self.path}: gives features of shape {list(features.shape)} for {len(images)} images: a metric needs "
                "[N, D] or [N, D, 1, 1], save the network with pooled features"
            )
        features = features.flatten(1).double().numpy()
        if not np.isfinite(features).all():
            raise InputError(f"{self.path}: gives NaN or infinity for images in [-1, 1], name another feature network")
        return features


def load_extractor(
    path: str | Path, pixels: PixelInput = "auto", device: torch.device | str = "cpu", batch_size: int = 64
) -> FeatureExtractor:
    """The feature network of a TorchScript file: a program, which is run.

    Args:
        pixels: "uint8" (0 to 255, as FID's Inception takes them), "float" ([-1, 1]) or "auto": uint8 if the file's
            forward has an argument ``return_features``, as that Inception's has, else float.
        batch_size: images at a time.

    Raises:
        InputError: no TorchScript file there.
    """
    return FeatureExtractor(FeatureNetwork(path, pixels, device), device, batch_size)
