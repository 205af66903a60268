"""Features of a data set, kept on disk: networks such as Inception take longer than all else in an evaluation.

A file holds the features of one set of images by one network. Its name is a hash of both: of the file of the network,
of how it takes images, and of the images themselves as they are measured (shape, order and every value), so another
data set, another count or another resolution can never be taken for it. A file that is damaged is made again.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rdmd_fast.files import replace_file
from rdmd_fast.metrics.feature_extractor import FeatureExtractor
from rdmd_fast.pixels import PixelImages

FORMAT = 1


def images_sha256(images: torch.Tensor | PixelImages) -> str:
    """SHA-256 of a batch [N, C, H, W]: its shape, and its values as float32 in (n, h, w, c) order."""
    digest = hashlib.sha256(repr(list(images.shape)).encode())
    for part in images.split(256):
        digest.update(part.float().permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def cached_features(extractor: FeatureExtractor, images: torch.Tensor | PixelImages, folder: Path | None) -> np.ndarray:
    """``extractor(images)``, fp64 [N, D], from ``folder`` if it is there; else computed and left there.

    A folder that cannot be written costs a line and no more. None computes.
    """
    if folder is None:
        return extractor(images)
    key = repr([FORMAT, extractor.sha256, extractor.pixels, images_sha256(images)])
    path = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.features"
    features = _read(path, len(images))
    if features is None:
        features = extractor(images)
        try:
            replace_file(path, lambda file: file.write(_sealed(features)))
        except OSError as error:
            print(f"warning: {path}: features are not kept ({error.strerror or error})")
    return features


def _sealed(features: np.ndarray) -> bytes:
    content = save({"features": features})
    return hashlib.sha256(content).digest() + content


def _read(path: Path, count: int) -> np.ndarray | None:
    """The features of a file, None where there is none or not a whole one."""
    try:
        data = path.read_bytes()
        seal, content = data[:32], data[32:]
        if hashlib.sha256(content).digest() != seal:
            return None
        features = load(content)["features"]
    except (OSError, SafetensorError, LookupError, ValueError):
        return None
    return features if features.ndim == 2 and len(features) == count else None
