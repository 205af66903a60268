"""``rdmd sweep``: short runs over λ and generator_sigma on a user's own configuration, and which to choose."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rdmd_fast.config import load_config
from rdmd_fast.errors import InputError
from rdmd_fast.figures.sweep_picture import draw
from rdmd_fast.figures.sweep_tables import row_of, write_tables
from rdmd_fast.paths import path_to_read, path_to_write
from rdmd_fast.studies.jobs import run_jobs
from rdmd_fast.studies.recommendation import advise
from rdmd_fast.studies.sweep_jobs import GridSetting, default_sigmas, default_weights, grid_of, reference_point

EPILOG = """examples:
  rdmd sweep --config configs/digits/rdmd_2to3.yaml --out sweeps/digits
  rdmd sweep --config my.yaml --out sweeps/my --transport-weight 0.02 0.1 0.5 --generator-sigma 1 --steps 2000
  rdmd sweep --config my.yaml --out sweeps/my --jobs 4 train.global_batch_size=64

OUT/sweep.png shows the same held-out samples by every setting, OUT/sweep.csv and sweep.json hold the numbers and the
recommendation, whose rule is in docs/sweep.md. Runs lie in OUT/points: the same command goes on where it was stopped,
and one of more values trains those that are new.
"""
SHARE_OF_STEPS, FEWEST_STEPS = 10, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--config", type=path_to_read, required=True, metavar="FILE.yaml", help="configuration of the rdmd stage")
    add("--out", type=path_to_write, required=True, metavar="DIR", help="where picture, tables and runs go")
    add("--transport-weight", nargs="+", metavar="L", help="λ to try (a quarter of the config's, its own, 4 times)")
    add(
        "--generator-sigma",
        nargs="+",
        metavar="S",
        help="generator_sigma to try (half of the config's, its own, twice)",
    )
    add("--steps", type=int, metavar="N", help="iterations of a run (a tenth of the config's, but 100 at least)")
    add("--jobs", type=int, metavar="N", help="runs at a time (one for each GPU, or for each core)")
    add("overrides", nargs="*", metavar="key=value", help="override of a config key for all runs")


def run(arguments: argparse.Namespace) -> int:
    """Train every setting that is not there, then write picture, tables and recommendation.

    Raises:
        InputError: bad options or configuration, or a run that failed.
    """
    grid = plan(arguments)
    out = Path(arguments.out)
    points = [setting.point for setting in grid]
    references, *results = run_jobs([reference_point(grid), *points], out / "points", arguments.jobs)
    rows = [row_of(setting, result) for setting, result in zip(grid, results, strict=True)]
    write_tables(out, rows, references, advise(rows, references))
    draw(grid, [point.folder(out / "points") for point in points], out / "sweep.png")
    return 0


def plan(arguments: argparse.Namespace) -> list[GridSetting]:
    """Plan the grid of the command line: explicit values, or factors of the configuration's own.

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
    return grid_of(arguments.config, [*overrides, f"train.steps={steps}"], own, weights, sigmas)


def numbers(option: str, texts: Sequence[str] | None) -> tuple[list[float], list[str]]:
    """Read the numbers of an option, each once, and the key=value overrides that stood behind them."""
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
