"""Validation while training: held-out sources through the EMA generator, and the best export kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.diffusion import omega
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.models import translator
from rdmd_fast.options import Options
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.transport_weight import reported_weights

Translate = Callable[[torch.Tensor], torch.Tensor]


class ValidationOptions(Options):
    """Metrics on held-out data."""

    every: int = Field(0, ge=0, description="iterations between validations, 0 for only at the end (ours)")
    count: int = Field(1000, ge=2, le=10**6, description="held-out samples of each domain that are used at most (ours)")
    judge: str | None = Field(
        None,
        description="folder of labelled shards ROOT/<digit>/train|test: adds the share that 3-NN calls judge_label",
    )
    judge_label: int | None = Field(None, description="label of the target domain for the judge")
    best_by: str | None = Field(
        None,
        description="metric that keeps RUN/best, lowest wins; unset: frechet with a judge, else sliced_w2 (images, "
        "latents; none without data.target_holdout) or squared_w2 (toys)",
    )


class ImageValidator:
    """Faithfulness and distance to the target on held-out images [n, C, H, W] in [-1, 1], or on latents.

    Latents have neither a data range nor colours: no PSNR, no colour cosine, no judge.
    """

    def __init__(
        self, options: ValidationOptions, source: torch.Tensor, target: torch.Tensor | None, latents: bool = False
    ):
        self.source, self.target, self.label, self.latents = source, target, options.judge_label, latents
        self.judge = None
        if options.judge and latents:
            raise InputError("validation.judge: judges images, data.source holds arrays, remove the key")
        if options.judge:
            from rdmd_fast.metrics.judges import DigitJudge

            self.judge = DigitJudge(options.judge)
        # Faithfulness alone is best in the identity map: without targets no export is the best.
        by_target = None if target is None else "frechet" if self.judge else "sliced_w2"
        self.best_by = options.best_by or by_target

    def measure(self, translate: Translate, transport_weight: float | None = None) -> dict[str, float]:
        """Metrics of a generator; what they are does not depend on its λ."""
        from rdmd_fast.metrics.frechet import frechet_distance
        from rdmd_fast.metrics.image_distances import l2, mean_colour_cosine, psnr

        outputs = translate(self.source).float().cpu()
        values = {"l2": l2(self.source, outputs)}
        if not self.latents:
            values["psnr"] = psnr(self.source, outputs)
        if not self.latents and outputs.shape[1] == 3:
            values["colour_cosine"] = mean_colour_cosine(self.source, outputs)
        if self.target is not None:
            values["sliced_w2"] = sliced_w2(outputs, self.target)
        if self.judge is not None:
            values["share_3nn"] = float(np.mean(self.judge.knn_labels(outputs) == self.label))
            if self.target is not None:
                features = self.judge.features
                values["frechet"] = frechet_distance(features(outputs), features(self.target))
        return values


class PointsValidator:
    """Distance to the target and transport cost of held-out points in the plane, beside exact optimal transport.

    Args:
        source: held-out sources [n, 2].
        target: held-out targets [m, 2]; a second half of them makes the noise floor, so at most m / 2 are compared.
    """

    def __init__(self, options: ValidationOptions, source: torch.Tensor, target: torch.Tensor):
        half = len(target) // 2
        count = min(len(source), half)
        if count < 2:
            raise InputError(f"{len(source)} held-out sources and {len(target)} targets: give 2 and 4 or more")
        self._prepare(options, source[:count], target[:count], target[half : half + count])

    def _prepare(self, options: ValidationOptions, source, target, second_target) -> None:
        from rdmd_fast.extras import check_installed

        check_installed("ot", "toy")
        check_installed("scipy", "eval")
        self.source, self.target, self.second_target = source, target, second_target
        self.best_by = options.best_by or "squared_w2"

    def measure(self, translate: Translate, transport_weight: float | None = None) -> dict[str, float]:
        """Metrics of a generator at ``transport_weight``, None for that of the configuration."""
        from rdmd_fast.metrics.exact_transport import toy_report

        outputs = translate(self.source).float().cpu()
        report = toy_report(self.source.numpy(), outputs.numpy(), self.target.numpy(), self.second_target.numpy())
        return report | self._closed_form(outputs, transport_weight)

    def _closed_form(self, outputs: torch.Tensor, transport_weight: float | None) -> dict[str, float]:
        return {}


class ToyValidator(PointsValidator):
    """The same on fresh points of two toys, and beside closed forms where there are any."""

    def __init__(self, options: ValidationOptions, source: ToyDistribution, target: ToyDistribution, seed: int, rdmd):
        philox, count = Philox(seed), options.count
        # Three independent sets from one stream: sources, targets, and targets again for the noise floor.
        positions = torch.arange(count)
        self.source_distribution, self.target_distribution, self.rdmd = source, target, rdmd
        self._prepare(
            options,
            source.sample(philox, Stream.EVALUATION, positions),
            target.sample(philox, Stream.EVALUATION, positions + count),
            target.sample(philox, Stream.EVALUATION, positions + 2 * count),
        )

    def _closed_form(self, outputs: torch.Tensor, transport_weight: float | None) -> dict[str, float]:
        """Measured linear map beside r*, where the closed form holds: source N(0, I), Gaussian target at 0."""
        rdmd = self.rdmd
        if transport_weight is not None:
            rdmd = rdmd.model_copy(update={"transport_weight": transport_weight})
        expected = closed_form_scales(self.source_distribution, self.target_distribution, rdmd)
        if expected is None:
            return {}
        from rdmd_fast.metrics.closed_forms import fit_linear_map, scale_and_rotation

        matrix, _ = fit_linear_map(self.source.numpy(), outputs.numpy())
        radius, angle = scale_and_rotation(matrix)
        # Along the target's axes the optimal map is diagonal, whatever their rotation.
        turn = np.deg2rad(self.target_distribution.rotation)
        axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        along = axes.T @ matrix @ axes
        return {
            "scale": radius,
            "rotation_degrees": angle,
            "axis_scale_0": float(along[0, 0]),
            "axis_scale_1": float(along[1, 1]),
            "axis_scale_0_expected": float(expected[0]),
            "axis_scale_1_expected": float(expected[1]),
        }


@dataclass(frozen=True)
class Validation:
    """What a run is validated by.

    Attributes:
        held_out_sources: [n, …], on the CPU; training sources stand in for missing ones.
        measure: metrics from the averaged weights, at each λ of ``reported_weights``; None without held-out data.
        best_by: the metric whose lowest value is kept; None for no best.
        points: measures points in the plane, of which a map is drawn; None for other samples.
    """

    held_out_sources: torch.Tensor
    measure: Callable[[dict[str, torch.Tensor]], dict[str, float]] | None = None
    best_by: str | None = None
    points: PointsValidator | None = None


def open_validation(config, world, export, source) -> Validation:
    """Choose the validation by the kind of data."""
    options, data = config.validation, config.data
    if isinstance(data.source, ToyDistribution) and isinstance(data.target, ToyDistribution):
        validator = ToyValidator(options, data.source, data.target, config.seed, config.rdmd)
        sources = validator.source
    elif data.source_holdout:
        sources = held_out_images(data.source_holdout, options.count, data.cache_dir)
        if tuple(sources.shape[1:]) != tuple(source.shape):
            raise InputError(
                f"data.source_holdout: samples of shape {tuple(sources.shape[1:])}, data.source has {source.shape}: "
                "pack both alike"
            )
        targets = None
        if data.target_holdout:
            targets = held_out_images(data.target_holdout, options.count, data.cache_dir)
        if options.judge and options.judge_label is None:
            raise InputError("validation.judge_label: missing, name the label of the target domain")
        validator = None
        if sources.ndim == 4:
            validator = ImageValidator(options, sources, targets, latents=source.stream.shards.kind == "array")
        elif tuple(sources.shape[1:]) == (2,) and targets is not None:
            validator = PointsValidator(options, sources, targets)
    else:
        return Validation(source.batch(torch.arange(config.telemetry.sample_count)).cpu())
    if validator is None:
        return Validation(sources)

    def measure(weights: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            f"{name}{suffix}": value
            for suffix, weight in reported_weights(export.weight_range).items()
            for name, value in validator.measure(translator(weights, export, world.device, weight), weight).items()
        }

    points = validator if isinstance(validator, PointsValidator) else None
    return Validation(sources, measure, validator.best_by, points)


def closed_form_scales(source: ToyDistribution, target: ToyDistribution, rdmd) -> np.ndarray | None:
    """Optimal scale of each axis of the target (design: closed forms), or None where none is known."""
    standard = source.toy == "gaussian" and source.mixture()[1][0].equal(torch.eye(2, dtype=torch.float64))
    centred = not any(source.mean) and not any(target.mean)
    if not (standard and centred and target.toy == "gaussian"):
        return None
    if rdmd.cost.kind != "squared_l2" or rdmd.cost.features is not None:
        return None
    if rdmd.weighting == "dmd":
        return None
    from rdmd_fast.metrics.closed_forms import optimal_scales

    deviations = target.std if isinstance(target.std, tuple) else (target.std or 1.0,) * 2
    return optimal_scales(
        deviations,
        rdmd.transport_weight,
        lambda sigma: omega(torch.as_tensor(sigma), rdmd.weighting).numpy(),
        lambda u: rdmd.sigma.quantile(torch.as_tensor(np.asarray(u, dtype=np.float64))).numpy(),
    )


def sliced_w2(outputs: torch.Tensor, target: torch.Tensor, projections: int = 128) -> float:
    """Sliced 2-Wasserstein distance in pixel space, data units by element (Bonneel et al. 2015).

    The mean over fixed random directions of the squared distance between sorted projections, square root taken; the
    larger set is thinned to the smaller one's size by quantiles.
    """
    flat_outputs, flat_target = outputs.flatten(1).double(), target.flatten(1).double()
    directions = Philox(0).normal(Stream.EVALUATION, torch.arange(projections), (flat_outputs.shape[1],)).double()
    directions /= directions.norm(dim=1, keepdim=True)
    count = min(len(flat_outputs), len(flat_target))
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    quantiles = [torch.quantile(points @ directions.t(), levels, dim=0) for points in (flat_outputs, flat_target)]
    return float((quantiles[0] - quantiles[1]).square().mean().sqrt())


def held_out_images(folder: str | Path, count: int, cache_dir: str | None = None) -> torch.Tensor:
    """The first ``count`` samples of a shard set as float32 [n, C, H, W] in [-1, 1] (arrays [n, D] as they are)."""
    from rdmd_fast.data.shards.shard_set import ShardSet
    from rdmd_fast.kernels.image_normalize import image_normalize

    shards = ShardSet(folder, cache_dir=cache_dir)
    samples = torch.from_numpy(np.stack([shards.read(index) for index in range(min(count, len(shards)))]))
    if shards.kind != "image":
        return samples
    return image_normalize(samples.permute(0, 3, 1, 2), torch.float32)
