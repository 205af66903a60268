"""``rdmd sweep``: short runs over λ and generator_sigma on a user's own configuration, and which to choose."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.config import Config, load_config
from rdmd_fast.errors import InputError
from rdmd_fast.files import strict_json, write_atomically
from rdmd_fast.studies.jobs import Point, run_points
from rdmd_fast.studies.recommendation import Recommendation, Reference, Trial, recommend
from rdmd_fast.studies.training_jobs import EXPORT, file_reference, train, training_point

EPILOG = """examples:
  rdmd sweep --config configs/digits/rdmd_2to3.yaml --out sweeps/digits
  rdmd sweep --config my.yaml --out sweeps/my --transport-weight 0.02 0.1 0.5 --generator-sigma 1 --steps 2000
  rdmd sweep --config my.yaml --out sweeps/my --jobs 4 train.global_batch_size=64

OUT/sweep.png shows the same held-out samples by every setting, OUT/sweep.csv and sweep.json hold the numbers and the
recommendation, whose rule is in docs/sweep.md. Runs lie in OUT/points: the same command goes on where it was stopped,
and one of more values trains those that are new.
"""

WEIGHT_FACTORS, SIGMA_FACTORS = (0.25, 1.0, 4.0), (0.5, 1.0, 2.0)  # of the configuration's own values
WEIGHTS_BESIDE_ZERO = (0.0, 0.05, 0.2)  # of a configuration whose λ is 0
SHARE_OF_STEPS, FEWEST_STEPS = 10, 100
PICTURED, TOY_POINTS = 12, 1000
DISTANCES = ("frechet", "sliced_w2", "squared_w2")
"""Metrics of validation that fall to the noise floor as outputs come to follow the target."""
SETTING = ("transport_weight", "generator_sigma", "steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="configuration of the rdmd stage")
    parser.add_argument("--out", required=True, metavar="DIR", help="where picture, tables and runs go")
    parser.add_argument(
        "--transport-weight", nargs="+", metavar="L", help="λ to try (a quarter of the config's, its own, 4 times)"
    )
    parser.add_argument(
        "--generator-sigma",
        nargs="+",
        metavar="S",
        help="generator_sigma to try (half of the config's, its own, twice)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="iterations of a run (a tenth of the config's, but 100 at least)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (one for each GPU, or for each core)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override of a config key for all runs")


def run(arguments: argparse.Namespace) -> int:
    """Train every setting that is not there, then write picture, tables and recommendation.

    Raises:
        InputError: bad options or configuration, or a run that failed.
    """
    grid = plan(arguments)
    out = Path(arguments.out)
    points = [setting.point for setting in grid]
    reference_point = Point("reference", measure_references, points[0].settings | {"config": _comparable(points[0])})
    results = run_points([reference_point, *points], out / "points", arguments.jobs)
    references, results = results[0], results[1:]
    rows = [row_of(setting, result) for setting, result in zip(grid, results, strict=True)]
    recommendation = advise(rows, references)
    write(out, rows, references, recommendation)
    draw(grid, [point.folder(out / "points") for point in points], out / "sweep.png")
    return 0


# -- the grid ----------------------------------------------------------------------------------------------------------


class GridSetting(NamedTuple):
    """A setting of the grid, its configuration and its point."""

    transport_weight: float
    generator_sigma: float
    config: Config
    point: Point


def plan(arguments: argparse.Namespace) -> list[GridSetting]:
    """The grid of the command line: explicit values, or factors of the configuration's own.

    Raises:
        InputError: not a configuration of the rdmd stage, or values that are no numbers.
    """
    weights, loose = numbers("--transport-weight", arguments.transport_weight)
    sigmas, loose_too = numbers("--generator-sigma", arguments.generator_sigma)
    overrides = [*arguments.overrides, *loose, *loose_too]
    first = [f"rdmd.transport_weight={weights[0]!r}"] if weights else []
    own = load_config(arguments.config, [*overrides, *first])
    if own.stage != "rdmd":
        raise InputError(f"--config {arguments.config}: is of stage {own.stage}, a sweep is over the rdmd stage")
    if arguments.steps is not None and arguments.steps < 1:
        raise InputError(f"--steps {arguments.steps}: must be at least 1")
    weights = weights or default_weights(own)
    sigmas = sigmas or default_sigmas(own)
    steps = arguments.steps or min(own.train.steps, max(FEWEST_STEPS, own.train.steps // SHARE_OF_STEPS))
    teacher = None if own.teacher == "analytic" else file_reference(own.teacher)
    grid = []
    for weight in weights:
        for sigma in sigmas:
            changes = [f"rdmd.transport_weight={weight!r}", f"rdmd.generator_sigma={sigma!r}", f"train.steps={steps}"]
            quiet = ["validation.every=0", "telemetry.sample_every=0"]  # at the end alone
            config = load_config(arguments.config, [*overrides, *changes, *quiet])
            name = f"lambda-{weight:g}-sigma-{sigma:g}"
            point = training_point(name, config, teacher)
            grid.append(GridSetting(weight, sigma, config, Point(name, short_run, point.settings)))
    return grid


def numbers(option: str, texts: Sequence[str] | None) -> tuple[list[float], list[str]]:
    """Numbers of an option, each once, and the key=value overrides that stood behind them."""
    values, overrides = [], []
    for text in texts or ():
        if "=" in text:
            overrides.append(text)
            continue
        try:
            values.append(float(text))
        except ValueError:
            raise InputError(f"{option} {text}: not a number") from None
    return list(dict.fromkeys(values)), overrides


def default_weights(config: Config) -> list[float]:
    own = config.rdmd.transport_weight
    if not isinstance(own, int | float):
        raise InputError(
            "rdmd.transport_weight: the generator is for a range of λ, of which none needs be chosen; give "
            "--transport-weight to try single ones"
        )
    return [own * factor for factor in WEIGHT_FACTORS] if own else list(WEIGHTS_BESIDE_ZERO)


def default_sigmas(config: Config) -> list[float]:
    """Only a copy of the teacher's network reads generator_sigma."""
    own = config.rdmd.generator_sigma
    return [own * factor for factor in SIGMA_FACTORS] if config.generator.kind == "teacher" else [own]


def _comparable(point: Point) -> dict:
    """The configuration without what the references do not depend on: one set of them for every grid."""
    config = {key: value for key, value in point.settings["config"].items() if key != "train"}
    return config | {"rdmd": config["rdmd"] | {"transport_weight": 1.0, "generator_sigma": 1.0}}


# -- work of the points ------------------------------------------------------------------------------------------------


def short_run(folder: Path, settings: dict) -> dict:
    """Train one setting; translated samples for the picture go to samples.npy. Returns as ``trainings.train``."""
    from rdmd_fast.model_files.models import load_generator

    result = train(folder, settings)
    sources = pictured_sources(Config.model_validate(with_teacher(settings["config"])))
    with torch.no_grad():
        outputs = load_generator(folder / EXPORT)(sources).numpy()
    with open(folder / "samples.npy", "wb") as file:
        np.save(file, outputs)
    return result


def measure_references(folder: Path, settings: dict) -> dict:
    """Distances of the untouched sources and of real samples from others; {} without held-out data of both domains."""
    from rdmd_fast.data.toys import ToyDistribution
    from rdmd_fast.monitoring.validation import ImageValidator, PointsValidator, ToyValidator, held_out_images

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
        report = validator.measure(lambda x: x)
        return {"best_by": validator.best_by, "untouched": None, "floor": report["noise_floor"]}
    if sources.ndim != 4:
        return {}
    latents = is_latent(data.source_holdout)
    untouched = ImageValidator(options, sources, targets, latents)
    # Contiguous halves: copies of an image (other hues, crops) stand side by side.
    real, others = targets.split(-(-len(targets) // 2))
    floor = ImageValidator(options, real, others, latents).measure(lambda x: x)[untouched.best_by]
    return {
        "best_by": untouched.best_by,
        "untouched": untouched.measure(lambda x: x)[untouched.best_by],
        "floor": floor,
    }


def with_teacher(plain: dict) -> dict:
    """A point's configuration made whole: what depends on neither is read of it alone."""
    return plain | {"run_dir": "-"} | ({} if "teacher" in plain else {"teacher": "-"})


def is_latent(folder: str) -> bool:
    from rdmd_fast.data.shards.shard_set import ShardSet

    return ShardSet(folder).kind == "array"


def pictured_sources(config: Config) -> torch.Tensor:
    """The samples that every setting translates: points of a toy, or held-out samples spread over their set."""
    from rdmd_fast.data.toys import ToyDistribution
    from rdmd_fast.monitoring.validation import held_out_images
    from rdmd_fast.randomness import Philox, Stream

    data = config.data
    if isinstance(data.source, ToyDistribution):
        return data.source.sample(Philox(config.seed), Stream.EVALUATION, torch.arange(TOY_POINTS))
    # Training sources stand in for held-out ones, as in the pictures of a run.
    samples = held_out_images(data.source_holdout or data.source, config.validation.count, data.cache_dir)
    return samples[torch.linspace(0, len(samples) - 1, min(PICTURED, len(samples))).long()]


# -- results -----------------------------------------------------------------------------------------------------------


def row_of(setting: GridSetting, result: dict) -> dict:
    """A line of the table."""
    return {
        "transport_weight": setting.transport_weight,
        "generator_sigma": setting.generator_sigma,
        "steps": setting.config.train.steps,
        **(result["validation"] or {}),
        "training_seconds": result["training_seconds"],
        "seconds": result["seconds"],
    }


def advise(rows: Sequence[dict], references: dict) -> Recommendation:
    """What to choose, by ``recommendation.recommend``."""
    best_by = references.get("best_by")
    if best_by is None:
        return Recommendation(
            None, "Nothing can be recommended without held-out data: set data.source_holdout and data.target_holdout."
        )
    cost = "transport_cost" if "transport_cost" in rows[0] else "l2"
    if best_by not in DISTANCES:
        return Recommendation(None, f"validation.best_by: {best_by} is no distance to the target, name another.")
    trials = [Trial(row["transport_weight"], row["generator_sigma"], row.get(best_by), row.get(cost)) for row in rows]
    return recommend(trials, Reference(references["untouched"], references["floor"]))


def printed(rows: Sequence[dict]) -> list[dict]:
    """The table as it is printed: without the numbers that all settings share, as the size of the held-out set."""
    telling = [key for key in rows[0] if key in SETTING or len({row[key] for row in rows}) > 1 or len(rows) == 1]
    return [{key: "-" if row[key] is None else row[key] for key in telling} for row in rows]


def write(out: Path, rows: list[dict], references: dict, recommendation: Recommendation) -> None:
    """Print the table and the recommendation; sweep.csv and sweep.json hold the same."""
    from rdmd_fast.metrics.tables import format_table, write_rows

    print(format_table(printed(rows)))
    if references.get("untouched") is not None:
        print(
            f"{references['best_by']} of the untouched sources {references['untouched']:.4g}, of real samples from "
            f"other real ones {references['floor']:.4g}"
        )
    chosen = recommendation.trial
    print(f"recommended: {recommendation.reason}" if chosen else recommendation.reason)
    if chosen:
        print(f"  rdmd.transport_weight={chosen.transport_weight:g} rdmd.generator_sigma={chosen.generator_sigma:g}")
    write_rows(out / "sweep.csv", rows)
    report = {
        "rows": rows,
        "references": references,
        "recommendation": {
            "transport_weight": chosen.transport_weight if chosen else None,
            "generator_sigma": chosen.generator_sigma if chosen else None,
            "reason": recommendation.reason,
        },
    }
    write_atomically(out / "sweep.json", json.dumps(strict_json(report), indent=1) + "\n")


def draw(grid: Sequence[GridSetting], folders: Sequence[Path], path: Path) -> None:
    """Rows of images, a setting each, or a panel of points each; nothing for samples that have no picture."""
    from rdmd_fast.data.toys import ToyDistribution
    from rdmd_fast.monitoring.drawing import toy_picture
    from rdmd_fast.monitoring.run_pictures import picture_writer
    from rdmd_fast.monitoring.validation import held_out_images
    from rdmd_fast.processes.world import World
    from rdmd_fast.randomness import Philox, Stream

    config = grid[0].config
    sources = pictured_sources(config)
    outputs = [torch.from_numpy(np.load(folder / "samples.npy", allow_pickle=False)) for folder in folders]
    names = [f"λ {setting.transport_weight:g}  σ {setting.generator_sigma:g}" for setting in grid]
    if sources.ndim == 2:
        target = None
        if isinstance(config.data.target, ToyDistribution):
            target = config.data.target.sample(Philox(config.seed), Stream.EVALUATION, torch.arange(TOY_POINTS))
        elif config.data.target_holdout:
            target = held_out_images(config.data.target_holdout, TOY_POINTS, config.data.cache_dir)
        if target is None or sources.shape[1] != 2:
            print("no picture: points are drawn in two dimensions, beside a toy target or data.target_holdout")
        else:
            maps = {name: cloud.numpy() for name, cloud in zip(names, outputs, strict=True)}
            toy_picture(sources.numpy(), maps, target.numpy(), path)
        return
    write_grid = picture_writer(config.telemetry.decoder, tuple(sources.shape[1:]), World(0, 1, torch.device("cpu")))
    if write_grid is None:
        print(f"no picture: samples of {sources.shape[1]} channels are drawn where telemetry.decoder names a decoder")
        return
    write_grid([("source x", sources), *zip(names, outputs, strict=True)], path)
