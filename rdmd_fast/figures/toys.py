"""Maps of a Gaussian to 8 Gaussians and to a swiss roll by λ, beside exact transport (arXiv 2406.14762, Figure 3).

Each map is a training of a shipped config at the ``uniform`` weighting, on which Theorem 3.1 bears: as λ falls the map
tends to the optimal transport map. Costs and distances are of equal numbers of fresh points, another set for each seed,
and exact transport is computed between the same sets. Exact transport between samples costs a little more than between
the distributions, the cost of a trained map has no such bias.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.baselines.transport import exact_map, minibatch_map
from rdmd_fast.config import Config, load_config
from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.files import sha256_of
from rdmd_fast.metrics.exact_transport import monotonicity_violations, squared_w2
from rdmd_fast.metrics.tables import format_table, mean_and_error, with_error, write_rows
from rdmd_fast.studies.jobs import Job, run_jobs, train_run
from rdmd_fast.studies.options import FigureOptions, shipped_config

NEAR_COST = 0.05  # of exact transport's
NEAR_FLOORS = 2.0  # squared W2 in noise floors
RULE = (
    f"of the λ whose mean squared W2 lies within {NEAR_FLOORS:g} noise floors the one whose transport cost is "
    "nearest to exact transport's; where no λ does, that of the lowest squared W2"
)


class Problem(NamedTuple):
    """A row of the figure: its config below configs/, the λ that are trained, and what else differs from the config."""

    name: str
    config: str
    transport_weights: tuple[float, ...]
    overrides: tuple[str, ...] = ()


class ToysSize(NamedTuple):
    """``problems``; ``points`` of each set that is compared; batch sizes of minibatch transport."""

    problems: tuple[Problem, ...] = (
        Problem("8 Gaussians", "toy/gaussian_to_8gaussians.yaml", (0.02, 0.03, 0.05, 0.1, 0.5)),
        Problem("swiss roll", "toy/gaussian_to_swiss_roll.yaml", (0.05, 0.1, 0.2, 0.3, 1.0)),
    )
    points: int = 2000
    batches: tuple[int, ...] = (8, 64, 512)


SIZE = ToysSize()


def make(out: Path, options: FigureOptions, size: ToysSize = SIZE) -> dict:
    """Write toys.png, toys.csv (a row for each map, the table that is printed) and toys_runs.csv (one for each seed).

    Returns:
        ``rows`` and ``runs``, those of the two files, and ``best``: by problem the row of the best λ (``RULE``) with
        ``near_optimal``, whether its cost and distance lie within the bounds.
    """
    require("matplotlib", "eval")
    require("ot", "toy")
    points = [point for problem in size.problems for point in study(problem, options.seeds, size)]
    results = dict(zip([point.name for point in points], run_jobs(points, out / "points", options.jobs), strict=True))
    folders = {point.name: point.folder(out / "points") for point in points}
    rows, runs, best = [], [], {}
    for problem in size.problems:
        of_problem = [
            row
            for seed in range(options.seeds)
            for row in [
                *(
                    run_row(problem, map_name(weight), weight, seed, results[run_name(problem, weight, seed)])
                    for weight in problem.transport_weights
                ),
                *transport_runs(problem, seed, size),
            ]
        ]
        summaries = [summary([run for run in of_problem if run["map"] == name]) for name in names_of(of_problem)]
        best[problem.name] = best_map(summaries)
        rows += summaries
        runs += of_problem
    print(format_table([printed(row) for row in rows]))
    for line in conclusions(best):
        print(line)
    write_rows(out / "toys.csv", rows)
    write_rows(out / "toys_runs.csv", runs)
    draw(out / "toys.png", size, rows, best, folders)
    return {"rows": rows, "runs": runs, "best": best}


# -- trainings ---------------------------------------------------------------------------------------------------------


def run_name(problem: Problem, weight: float, seed: int) -> str:
    return f"toys-{Path(problem.config).stem}-lambda{weight:g}-seed{seed}"


def map_name(weight: float) -> str:
    return f"RDMD λ={weight:g}"


def run_overrides(problem: Problem, weight: float, seed: int, size: ToysSize) -> list[str]:
    return [
        "rdmd.weighting=uniform",
        f"rdmd.transport_weight={weight}",
        f"seed={seed}",
        f"validation.count={size.points}",
        "validation.every=0",  # at the end, which is what the point stores
        "telemetry.sample_every=0",
        "checkpoint.every=0",
        *problem.overrides,
    ]


def study(problem: Problem, seeds: int, size: ToysSize) -> list[Job]:
    digest = sha256_of(shipped_config(problem.config))
    return [
        Job(
            run_name(problem, weight, seed),
            "train map",
            train_map,
            {
                "config": problem.config,
                "config_sha256": digest,
                "overrides": run_overrides(problem, weight, seed, size),
            },
        )
        for weight in problem.transport_weights
        for seed in range(seeds)
    ]


def train_map(folder: Path, settings: dict) -> dict:
    """Work of a point: one training, and the report of its validation at the end (``exact_transport.toy_report``)."""
    run_dir = folder / "run"
    train_run(shipped_config(settings["config"]), settings["overrides"], run_dir)
    last = json.loads((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if "validation" not in last:
        raise InputError(f"{settings['config']}: ended without a validation, source and target must be toys")
    return last["validation"]


def validator_of(problem: Problem, seed: int, size: ToysSize):
    """The sets of points that the run of this seed is measured on, which no λ changes."""
    from rdmd_fast.monitoring.validation import ToyValidator

    config: Config = load_config(
        shipped_config(problem.config), run_overrides(problem, problem.transport_weights[0], seed, size)
    )
    return ToyValidator(config.validation, config.data.source, config.data.target, seed, config.rdmd)


# -- rows --------------------------------------------------------------------------------------------------------------


def run_row(problem: Problem, name: str, weight: float | None, seed: int, report: dict) -> dict:
    """One map as a row of toys_runs.csv; λ and seconds are None of what is not trained."""
    return {
        "problem": problem.name,
        "map": name,
        "transport_weight": weight,
        "seed": seed,
        "points": report["samples"],
        "squared_w2": report["squared_w2"],
        "noise_floor": report["noise_floor"],
        "transport_cost": report["transport_cost"],
        "ot_cost": report["ot_cost"],
        "ot_cost_to_output": report["ot_cost_to_output"],
        "cost_ratio": report["transport_cost"] / report["ot_cost"],
        "monotonicity_violations": report["monotonicity_violations"],
        "seconds": report["seconds"],
    }


def transport_runs(problem: Problem, seed: int, size: ToysSize) -> list[dict]:
    """Exact and minibatch transport onto one sample of the target, measured against the other.

    Their outputs are a sample of the target itself: the squared W2 is the noise floor, and the cost tells them apart.
    """
    validator = validator_of(problem, seed, size)
    source, target = validator.source.double().numpy(), validator.target.double().numpy()
    floor, exact = squared_w2(target, validator.second_target), squared_w2(source, target)
    maps = [("exact OT", exact_map(source, target))]
    maps += [(f"minibatch OT {batch}", minibatch_map(source, target, batch, seed)) for batch in size.batches]
    report = {
        "samples": len(source), "squared_w2": floor, "noise_floor": floor,
        "ot_cost": exact, "ot_cost_to_output": exact, "seconds": None,
    }  # fmt: skip
    rows = []
    for name, outputs in maps:
        cost = float(np.sum((source - outputs) ** 2, axis=1).mean())
        crossed = monotonicity_violations(source, outputs)
        measured = {"transport_cost": cost, "monotonicity_violations": crossed}
        rows.append(run_row(problem, name, None, seed, report | measured))
    return rows


def names_of(runs: list[dict]) -> list[str]:
    return list(dict.fromkeys(run["map"] for run in runs))


def summary(runs: list[dict]) -> dict:
    """Mean over the seeds of one map, and the standard errors of what is judged by."""
    row = {key: runs[0][key] for key in ("problem", "map", "transport_weight")} | {"seeds": len(runs)}
    row["points"] = runs[0]["points"]
    for key in (
        "squared_w2", "noise_floor", "transport_cost", "ot_cost", "ot_cost_to_output", "cost_ratio",
        "monotonicity_violations",
    ):  # fmt: skip
        row[key], error = mean_and_error([run[key] for run in runs])
        if key in ("squared_w2", "transport_cost", "cost_ratio"):
            row[f"{key}_error"] = error
    row["floors"] = row["squared_w2"] / row["noise_floor"]
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    row["seconds"] = mean_and_error(seconds)[0] if seconds else None
    return row


def best_map(rows: list[dict]) -> dict:
    """The row of the best λ by ``RULE``, with ``near_optimal``."""
    trained = [row for row in rows if row["transport_weight"] is not None]
    faithful = [row for row in trained if row["floors"] <= NEAR_FLOORS]
    if faithful:
        chosen = min(faithful, key=lambda row: abs(row["cost_ratio"] - 1))
    else:
        chosen = min(trained, key=lambda row: row["squared_w2"])
    near = chosen["floors"] <= NEAR_FLOORS and abs(chosen["cost_ratio"] - 1) <= NEAR_COST
    return chosen | {"near_optimal": near}


def printed(row: dict) -> dict:
    """A row of the printed table."""
    return {
        "problem": row["problem"],
        "map": row["map"],
        "seeds": row["seeds"],
        "squared W2": with_error(row["squared_w2"], row["squared_w2_error"]),
        "noise floor": f"{row['noise_floor']:.4f}",
        "cost": with_error(row["transport_cost"], row["transport_cost_error"]),
        "exact OT to target": f"{row['ot_cost']:.4f}",
        "to output": f"{row['ot_cost_to_output']:.4f}",
        "cost / exact": with_error(row["cost_ratio"], row["cost_ratio_error"], 3),
        "violations": f"{row['monotonicity_violations']:.5f}",
        "seconds": "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
    }


def conclusions(best: dict[str, dict]) -> list[str]:
    """A line for each problem, and the rule behind them."""
    lines = [
        f"{name}: best λ = {row['transport_weight']:g}: cost {100 * (row['cost_ratio'] - 1):+.1f} % of exact "
        f"transport's, squared W2 {row['floors']:.2f} noise floors; within {100 * NEAR_COST:g} % and {NEAR_FLOORS:g}: "
        f"{'yes' if row['near_optimal'] else 'no'}"
        for name, row in best.items()
    ]
    return [*lines, f"best λ: {RULE}"]


# -- picture -----------------------------------------------------------------------------------------------------------

DRAWN, SEGMENTS = 1000, 250


def draw(path: Path, size: ToysSize, rows: list[dict], best: dict[str, dict], folders: dict[str, Path]) -> None:
    """A line for each problem: source, a map for each λ (seed 0), exact transport, target."""
    from rdmd_fast.files import replace_file
    from rdmd_fast.model_files.models import load_generator
    from rdmd_fast.monitoring.drawing import (
        OUTPUT_COLOUR,
        SOURCE_COLOUR,
        TARGET_COLOUR,
        common_limits,
        draw_transport,
        frame_panels,
        scatter,
    )

    figure_class = require("matplotlib.figure", "eval").Figure
    require("matplotlib.backends.backend_agg", "eval")
    columns = max(len(problem.transport_weights) for problem in size.problems) + 3
    figure = figure_class(figsize=(2.75 * columns, 3.2 * len(size.problems)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.12)
    grid = figure.subplots(len(size.problems), columns, squeeze=False)
    for problem, panels in zip(size.problems, grid, strict=True):
        validator = validator_of(problem, 0, size)
        source, target = validator.source.double().numpy(), validator.target.double().numpy()
        maps = []
        for weight in problem.transport_weights:
            generator = load_generator(folders[run_name(problem, weight, 0)] / "run/export")
            with torch.no_grad():
                maps.append((map_name(weight), generator(validator.source).double().numpy()))
        maps.append(("exact OT", exact_map(source, target)))
        scatter(panels[0], source[:DRAWN], SOURCE_COLOUR, "source")
        panels[0].set_ylabel(f"Gaussian → {problem.name}", fontsize=12)
        for axes, (name, output) in zip(panels[1:], maps, strict=False):
            draw_transport(axes, source[:SEGMENTS], output[:SEGMENTS])
            scatter(axes, output[:DRAWN], OUTPUT_COLOUR, name)
            row = next(row for row in rows if row["problem"] == problem.name and row["map"] == name)
            chosen = name == best[problem.name]["map"]
            axes.set_title(
                f"{name.replace('λ=', 'λ = ')}{' (best)' if chosen else ''}\n"
                f"cost {row['cost_ratio']:.2f} of exact, W₂² {row['floors']:.1f} floors",
                fontsize=10,
                fontweight="bold" if chosen else "normal",
            )
        last = len(maps) + 1
        scatter(panels[last], target[:DRAWN], TARGET_COLOUR, "target")
        for axes in panels[last + 1 :]:
            axes.set_visible(False)
        frame_panels(panels[: last + 1], *common_limits([source, target]))
        for axes in panels[: last + 1]:
            axes.tick_params(labelsize=7)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))
