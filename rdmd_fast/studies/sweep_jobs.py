"""The runs of a sweep: a short training for each setting of the grid, and what their distances are read against."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.config import Config, load_config
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.files import replace_file
from rdmd_fast.model_files.models import load_generator
from rdmd_fast.monitoring.validation import ImageValidator, PointsValidator, ToyValidator, held_out_images
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.studies.jobs import Job
from rdmd_fast.studies.training_jobs import EXPORT, file_reference, train, training_job

WEIGHT_FACTORS, SIGMA_FACTORS = (0.25, 1.0, 4.0), (0.5, 1.0, 2.0)  # of the configuration's own values
WEIGHTS_BESIDE_ZERO = (0.0, 0.05, 0.2)  # of a configuration whose λ is 0
PICTURED, TOY_POINTS = 12, 1000


class GridSetting(NamedTuple):
    """A setting of the grid, its configuration and its point."""

    transport_weight: float
    generator_sigma: float
    config: Config
    point: Job


def default_weights(config: Config) -> list[float]:
    own = config.rdmd.transport_weight
    if not isinstance(own, int | float):
        raise InputError(
            "rdmd.transport_weight: the generator is for a range of λ, of which none needs be chosen; give "
            "--transport-weight to try single ones"
        )
    return [own * factor for factor in WEIGHT_FACTORS] if own else list(WEIGHTS_BESIDE_ZERO)


def default_sigmas(config: Config) -> list[float]:
    """Vary σ where a generator reads it: only a copy of the teacher's network reads generator_sigma."""
    own = config.rdmd.generator_sigma
    return [own * factor for factor in SIGMA_FACTORS] if config.generator.kind == "teacher" else [own]


def grid_of(
    path: str, overrides: Sequence[str], own: Config, weights: Sequence[float], sigmas: Sequence[float]
) -> list[GridSetting]:
    """List settings of the configuration at ``path`` with its overrides, which is ``own`` at values of its own."""
    teacher = None if own.teacher == "analytic" else file_reference(own.teacher)
    quiet = ["validation.every=0", "telemetry.sample_every=0"]  # at the end alone
    grid = []
    for weight in weights:
        for sigma in sigmas:
            changes = [f"rdmd.transport_weight={weight!r}", f"rdmd.generator_sigma={sigma!r}"]
            config = load_config(path, [*overrides, *changes, *quiet])
            point = training_job(f"lambda-{weight:g}-sigma-{sigma:g}", config, teacher)
            grid.append(GridSetting(weight, sigma, config, Job(point.name, "short run", short_run, point.settings)))
    return grid


def reference_point(grid: Sequence[GridSetting]) -> Job:
    """Measure the references by what they depend on alone: one set of them for every grid."""
    settings = grid[0].point.settings
    config = {key: value for key, value in settings["config"].items() if key != "train"}
    config["rdmd"] = config["rdmd"] | {"transport_weight": 1.0, "generator_sigma": 1.0}
    return Job("reference", "references", measure_references, settings | {"config": config})


def short_run(folder: Path, settings: dict) -> dict:
    """Train one setting; translated samples for the picture go to samples.npy. Returns as ``training_jobs.train``."""
    result = train(folder, settings)
    sources = pictured_sources(Config.model_validate(with_teacher(settings["config"])))
    with torch.no_grad():
        outputs = load_generator(folder / EXPORT)(sources).numpy()
    replace_file(folder / "samples.npy", lambda file: np.save(file, outputs), durable=True)
    return result


def measure_references(folder: Path, settings: dict) -> dict:
    """Measure untouched sources, and real samples against others; {} without held-out data of both domains."""
    config = Config.model_validate(with_teacher(settings["config"]))
    data, options = config.data, config.validation
    if isinstance(data.source, ToyDistribution) and isinstance(data.target, ToyDistribution):
        report = ToyValidator(options, data.source, data.target, config.seed, config.rdmd).measure(lambda x: x)
        return {"best_by": options.best_by or "squared_w2", "untouched": None, "floor": report["noise_floor"]}
    if not (data.source_holdout and data.target_holdout):
        return {}
    sources, targets = (
        held_out_images(folder, options.count, data.cache_dir) for folder in (data.source_holdout, data.target_holdout)
    )
    if tuple(sources.shape[1:]) == (2,):
        validator = PointsValidator(options, sources, targets)
        floor = validator.measure(lambda x: x)["noise_floor"]
        return {"best_by": validator.best_by, "untouched": None, "floor": floor}
    if sources.ndim != 4:
        return {}
    latents = ShardSet(data.source_holdout).kind == "array"
    untouched = ImageValidator(options, sources, targets, latents)
    best_by = untouched.best_by
    # Contiguous halves: copies of an image (other hues, crops) stand side by side.
    real, others = targets.split(-(-len(targets) // 2))
    floor = ImageValidator(options, real, others, latents).measure(lambda x: x)[best_by]
    return {"best_by": best_by, "untouched": untouched.measure(lambda x: x)[best_by], "floor": floor}


def with_teacher(plain: dict) -> dict:
    """Make a point's configuration whole: what depends on neither is read of it alone."""
    return plain | {"run_dir": "-"} | ({} if "teacher" in plain else {"teacher": "-"})


def pictured_sources(config: Config) -> torch.Tensor:
    """Choose the samples that every setting translates: points of a toy, or held-out samples spread over their set."""
    data = config.data
    if isinstance(data.source, ToyDistribution):
        return data.source.sample(Philox(config.seed), Stream.EVALUATION, torch.arange(TOY_POINTS))
    # Training sources stand in for held-out ones, as in the pictures of a run.
    samples = held_out_images(data.source_holdout or data.source, config.validation.count, data.cache_dir)
    return samples[torch.linspace(0, len(samples) - 1, min(PICTURED, len(samples))).long()]
