"""One row of numbers a set of translations: how near to the target domain, how true to the sources."""

from pathlib import Path

import numpy as np
import torch

from rdmd_fast.metrics.checks import image_batch
from rdmd_fast.metrics.feature_cache import cached_features
from rdmd_fast.metrics.feature_extractor import FeatureExtractor
from rdmd_fast.metrics.frechet import frechet_distance
from rdmd_fast.metrics.image_distances import l2, mean_colour_cosine, mse_per_pixel, psnr, ssim
from rdmd_fast.metrics.judges import DigitJudge
from rdmd_fast.metrics.kernel_distance import kernel_distance
from rdmd_fast.metrics.paired import nearest_is_true
from rdmd_fast.pixels import PixelImages

LPIPS_BATCH = 32
Images = torch.Tensor | PixelImages


class ImageReport:
    """Rows of a table, all against the same real target images.

    Args:
        target: real images of the target domain [N, C, H, W] in [-1, 1], or PixelImages, as in ``row``.
        judge, label: adds ``share_3nn`` (outputs that 3-NN calls ``label``, if one is given) and ``frechet`` (in the
            judge's features).
        extractor: adds ``fid``, ``kid`` and ``kid_std`` in its features.
        lpips: adds ``lpips`` to the sources; True loads it, or give a PerceptualDistance.
        seed: of the subsets of KID.
        cache: folder where the target's features are kept, None to compute them here.
        batch_size: pairs at a time for lpips.
        truth: the true translations of the sources that rows are of, in their order, where they are known.

    Raises:
        InputError: a network does not take the images, or lpips cannot be used.
    """

    def __init__(
        self,
        target,
        judge: DigitJudge | None = None,
        label: int | None = None,
        extractor: FeatureExtractor | None = None,
        lpips: bool | torch.nn.Module = False,
        seed: int = 0,
        cache: Path | None = None,
        batch_size: int = LPIPS_BATCH,
        truth=None,
    ):
        self.truth = None if truth is None else image_batch(truth, "true translations")
        self.target = image_batch(target, "target images")
        self.judge, self.label, self.extractor, self.seed = judge, label, extractor, seed
        if lpips is True:
            from rdmd_fast.networks.feature_networks import PerceptualDistance

            lpips = PerceptualDistance()
        self.lpips, self.batch_size = None if lpips is False else lpips, batch_size
        self._judged_target = judge.features(self.target) if judge else None
        self._target_features = cached_features(extractor, self.target, cache) if extractor else None

    def row(self, name: str, source, outputs, **more) -> dict[str, str | float | int]:
        """Numbers of one set of translations, those that apply.

        Args:
            name: of the row.
            source: the images [N, C, H, W] in [-1, 1] that were translated.
            outputs: their translations, in the same order.
            more: further columns, at the end.

        Returns:
            ``name``, ``images`` and ``real_images`` (counts), then of the target ``share_3nn``, ``frechet``, ``fid``,
            ``kid``, ``kid_std``, and of the sources ``l2``, ``mse_per_pixel``, ``psnr``, ``ssim``, ``lpips``,
            ``colour_cosine`` (see metrics.image_distances), and of the truth ``true_l2``, ``true_psnr``, ``true_ssim``,
            ``true_nearest`` and ``true_top5`` (see metrics.paired).
        """
        source, outputs = image_batch(source, "source images"), image_batch(outputs, "output images")
        values = {"name": name, "images": len(outputs), "real_images": len(self.target)}
        values |= self._distances_to_target(outputs) | self._distances_to_source(source, outputs)
        return values | self._distances_to_truth(outputs) | more

    def _distances_to_target(self, outputs: Images) -> dict[str, float]:
        values = {}
        if self.judge and self.label is not None:
            values["share_3nn"] = float(np.mean(self.judge.knn_labels(outputs) == self.label))
        if self.judge:
            values["frechet"] = frechet_distance(self.judge.features(outputs), self._judged_target)
        if self.extractor:
            features = self.extractor(outputs)
            values["fid"] = frechet_distance(features, self._target_features)
            values["kid"], values["kid_std"] = kernel_distance(features, self._target_features, seed=self.seed)
        return values

    def _distances_to_source(self, source: Images, outputs: Images) -> dict[str, float]:
        metrics = {"l2": l2, "mse_per_pixel": mse_per_pixel, "psnr": psnr, "ssim": ssim}
        if self.lpips is not None:
            metrics["lpips"] = self._lpips
        if outputs.shape[1] == 3:
            metrics["colour_cosine"] = mean_colour_cosine
        return {name: metric(source, outputs) for name, metric in metrics.items()}

    def _distances_to_truth(self, outputs: Images) -> dict[str, float]:
        if self.truth is None:
            return {}
        metrics = {"true_l2": l2, "true_psnr": psnr, "true_ssim": ssim}
        found = nearest_is_true(outputs, self.truth)
        values = {name: metric(self.truth, outputs) for name, metric in metrics.items()}
        return values | {"true_nearest": found.top1, "true_top5": found.top5}

    @torch.no_grad()
    def _lpips(self, source: Images, outputs: Images) -> float:
        from rdmd_fast.networks.feature_networks import naming

        device = next(self.lpips.parameters()).device
        pairs = zip(source.split(self.batch_size), outputs.split(self.batch_size), strict=True)
        with naming("lpips", tuple(source.shape), device, "--batch-size"):
            distances = [self.lpips(a.float().to(device), b.float().to(device)).double().cpu() for a, b in pairs]
        return torch.cat(distances).mean().item()
