"""The loss of G = r R(α) over (r, α), without and with a transport cost (arXiv 2406.14762, Figure 2).

Source N(0, I) and target N(0, s² I) are those of configs/toy/gaussian_to_gaussian.yaml, with its σ distribution and
weighting. The closed form (metrics.closed_forms) is drawn, Monte Carlo (metrics.monte_carlo) stands beside it with its
standard errors, and trainings of that config with the exact fake score, from several (r, α), run down the surface.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rdmd_fast.config import load_config
from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.figures.surface_loss import SurfaceSize, compare, optimum
from rdmd_fast.figures.surface_picture import draw
from rdmd_fast.files import sha256_of
from rdmd_fast.metrics.tables import format_table, with_error, write_rows
from rdmd_fast.studies.jobs import Job, run_jobs, train_run
from rdmd_fast.studies.options import FigureOptions, shipped_config

CONFIG = "toy/gaussian_to_gaussian.yaml"
# With the exact fake score only the draws of a batch are noise: a high rate, and no average that would lag behind.
TRAINING = (
    "rdmd.fake_score=closed_form",
    "rdmd.generator_optimizer.lr=2e-2",
    "rdmd.generator_optimizer.betas=[0.9,0.99]",
    "rdmd.ema.half_life=1",
    "validation.count=16",  # the map is linear: its matrix is fitted exactly to a few points
    "telemetry.sample_every=0",
    "checkpoint.every=0",
)
SIZE = SurfaceSize()


def make(out: Path, options: FigureOptions, size: SurfaceSize = SIZE) -> dict:
    """Write surface.png, surface.csv (a row for each Monte Carlo point) and surface_paths.csv (the trainings).

    Returns:
        ``optima``, the rows of the table that is printed, ``rows`` and ``paths``, those of the two files.
    """
    require("matplotlib", "eval")
    config = load_config(shipped_config(CONFIG))
    weights = (0.0, config.rdmd.transport_weight)
    rows = compare(config, weights, size)
    paths = train_paths(out, weights, options, size)
    optima = [optimum(config, weight, rows, paths) for weight in weights]
    print(format_table([printed(row) for row in optima]))
    write_rows(out / "surface.csv", rows)
    write_rows(out / "surface_paths.csv", paths)
    draw(out / "surface.png", config, optima, rows, paths, size)
    return {"optima": optima, "rows": rows, "paths": paths}


def printed(row: dict) -> dict:
    """Format a row of the printed table; without a transport cost every rotation is optimal."""
    free = row["alpha_degrees"] is None
    return {
        "λ": f"{row['transport_weight']:g}",
        "optimal r": f"{row['r']:.5f}",
        "optimal α": "any" if free else f"{row['alpha_degrees']:g}°",
        "loss": f"{row['loss']:.5f}",
        "Monte Carlo points": row["monte_carlo_points"],
        "largest difference": f"{row['largest_difference']:.2f} standard errors",
        "mean square": f"{row['mean_square_difference']:.3f} (1 expected)",
        "trainings": row["trainings"],
        "trained r": with_error(row["trained_r"], row["trained_r_error"], 5),
        "largest |α|": "any" if free else f"{row['trained_largest_alpha']:.2f}°",
    }


def train_paths(out: Path, weights: Sequence[float], options: FigureOptions, size: SurfaceSize) -> list[dict]:
    """Train, and give a row for each run and iteration: (r, α) of the scale and rotation nearest to its matrix."""
    trainings = [
        (weight, number, start, seed)
        for weight in weights
        for number, start in enumerate(size.starts)
        for seed in range(options.seeds)
    ]
    points = [
        Job(
            f"surface-lambda{weight:g}-from{number}-seed{seed}",
            "train path",
            train_path,
            {
                "config_sha256": sha256_of(shipped_config(CONFIG)),
                "start": list(start),
                "overrides": [
                    *TRAINING, f"rdmd.transport_weight={weight}", f"seed={seed}", f"train.steps={size.steps}",
                    f"validation.every={size.every}",
                ],
            },
        )
        for weight, number, start, seed in trainings
    ]  # fmt: skip
    results = run_jobs(points, out / "points", options.jobs)
    return [
        {
            "transport_weight": weight, "start_r": start[0], "start_alpha_degrees": start[1], "seed": seed,
            "run": run, "step": step, "r": r, "alpha_degrees": alpha,
        }
        for run, ((weight, _, start, seed), result) in enumerate(zip(trainings, results, strict=True))
        for step, r, alpha in result["path"]
    ]  # fmt: skip


def train_path(folder: Path, settings: dict) -> dict:
    """Do the work of a point: one training, and [iteration, r, α in degrees] along it."""
    radius, angle = settings["start"]
    run_dir = folder / "run"
    start = [f"generator.scale={radius}", f"generator.angle={angle}"]
    train_run(shipped_config(CONFIG), [*settings["overrides"], *start], run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [(line["step"], line["validation"]) for line in lines if "validation" in line]
    if not seen or "scale" not in seen[0][1]:
        raise InputError(f"{CONFIG}: source, target and cost must be those of the closed form")
    return {"path": [[0, radius, angle], *([step, now["scale"], now["rotation_degrees"]] for step, now in seen)]}
