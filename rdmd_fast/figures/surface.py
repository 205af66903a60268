"""The loss of G = r R(α) over (r, α), without and with a transport cost (arXiv 2406.14762, Figure 2).

Source N(0, I) and target N(0, s² I) are those of configs/toy/gaussian_to_gaussian.yaml, with its σ distribution and
weighting. The closed form (metrics.theory) is drawn, Monte Carlo (metrics.monte_carlo) stands beside it with its
standard errors, and trainings of that config with the exact fake score, from several (r, α), run down the surface.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.config import Config, load_config
from rdmd_fast.diffusion import omega
from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.files import sha256_of
from rdmd_fast.metrics import closed_forms
from rdmd_fast.metrics.monte_carlo import sample_loss
from rdmd_fast.metrics.tables import format_table, mean_and_error, with_error, write_rows
from rdmd_fast.randomness import Philox
from rdmd_fast.studies.jobs import Point, run_points, train_run
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
EXACT = 1e-12  # rounding of terms that are equal


class SurfaceSize(NamedTuple):
    """How fine the figure is: ``grid`` radii and angles of the drawn surface, ``radii`` and ``angles`` of the Monte
    Carlo points, ``draws`` of (x, ε, σ) in each, ``steps`` of a training and iterations ``every`` which it is drawn.
    """

    grid: tuple[int, int] = (81, 145)
    radii: tuple[float, ...] = tuple(np.linspace(0.25, 2.25, 9).tolist())
    angles: tuple[float, ...] = tuple(range(-135, 181, 45))
    draws: int = 20_000
    starts: tuple[tuple[float, float], ...] = ((0.4, 150.0), (0.6, -80.0), (2.1, -140.0), (2.0, 75.0))
    steps: int = 600
    every: int = 10


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


# -- closed form and Monte Carlo ---------------------------------------------------------------------------------------


def closed_form(config: Config, weight: float, radius, angle) -> float:
    """The loss at G = radius R(angle in degrees), by quadrature over σ."""
    return closed_forms.loss(radius, angle, _target_std(config), weight, *_noise_levels(config))


def compare(config: Config, weights: Sequence[float], size: SurfaceSize) -> list[dict]:
    """A row for each (λ, r, α): the closed form, the Monte Carlo estimate and its standard error.

    Each (r, α) has draws of its own, so that its error is independent of the others'; every λ shares them.
    """
    philox, covariance = Philox(config.seed), _target_std(config) ** 2 * torch.eye(2, dtype=torch.float64)
    rows = []
    for radius in size.radii:
        for angle in size.angles:
            turn = np.deg2rad(angle)
            matrix = radius * torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            first = len(rows) // len(weights) * size.draws
            samples = sample_loss(
                matrix, covariance, lambda sigma: omega(sigma, config.rdmd.weighting), config.rdmd.sigma.quantile,
                philox, torch.arange(first, first + size.draws),
            )  # fmt: skip
            for weight in weights:
                exact, (estimate, error) = closed_form(config, weight, radius, angle), samples.estimate(weight)
                rows.append(
                    {
                        "transport_weight": weight,
                        "r": radius,
                        "alpha_degrees": angle,
                        "closed_form": exact,
                        "monte_carlo": estimate,
                        "standard_error": error,
                        "draws": size.draws,
                        "difference_in_standard_errors": _in_errors(estimate - exact, error),
                    }
                )
    return rows


def _in_errors(difference: float, error: float) -> float | None:
    """None where the estimate has no error: at r = s both densities are one function, and each term is 0."""
    if error > EXACT:
        return difference / error
    if abs(difference) > EXACT:
        raise ArithmeticError(f"the Monte Carlo estimate differs by {difference:g} though its terms do not vary")
    return None


def optimum(config: Config, weight: float, rows: list[dict], paths: list[dict]) -> dict:
    """The optimum of one λ, how well Monte Carlo agrees, and where the trainings ended."""
    radius = float(closed_forms.optimal_scales(_target_std(config), weight, *_noise_levels(config))[0])
    apart = [row["difference_in_standard_errors"] for row in rows if row["transport_weight"] == weight]
    apart = np.array([difference for difference in apart if difference is not None])
    last = {path["run"]: path for path in paths if path["transport_weight"] == weight}.values()
    # Starts of one seed share every draw: they are one sample of where trainings end.
    seeds = sorted({end["seed"] for end in last})
    mean, error = mean_and_error([np.mean([end["r"] for end in last if end["seed"] == seed]) for seed in seeds])
    return {
        "transport_weight": weight,
        "r": radius,
        "alpha_degrees": None if weight == 0 else 0.0,
        "loss": closed_form(config, weight, radius, 0.0),
        "monte_carlo_points": len(apart),
        "largest_difference": float(np.abs(apart).max()),
        "mean_square_difference": float(np.mean(apart**2)),
        "trainings": len(last),
        "trained_r": mean,
        "trained_r_error": error,
        "trained_largest_alpha": None if weight == 0 else max(abs(end["alpha_degrees"]) for end in last),
    }


def printed(row: dict) -> dict:
    """A row of the printed table; without a transport cost every rotation is optimal."""
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


def _target_std(config: Config) -> float:
    return float(config.data.target.std)


def _noise_levels(config: Config):
    """(ω, quantile of σ) of the run as metrics.theory takes them, on fp64 arrays."""
    return (
        lambda sigma: omega(torch.as_tensor(sigma), config.rdmd.weighting).numpy(),
        lambda u: config.rdmd.sigma.quantile(torch.as_tensor(u)).numpy(),
    )


# -- trainings ---------------------------------------------------------------------------------------------------------


def train_paths(out: Path, weights: Sequence[float], options: FigureOptions, size: SurfaceSize) -> list[dict]:
    """A row for each training and recorded iteration: (r, α) of the scale and rotation nearest to its matrix."""
    points = [
        Point(
            f"surface-lambda{weight:g}-from{index}-seed{seed}",
            train_path,
            {
                "config_sha256": sha256_of(shipped_config(CONFIG)),
                "start": list(start),
                "overrides": [
                    *TRAINING,
                    f"rdmd.transport_weight={weight}",
                    f"seed={seed}",
                    f"train.steps={size.steps}",
                    f"validation.every={size.every}",
                ],
            },
        )
        for weight in weights
        for index, start in enumerate(size.starts)
        for seed in range(options.seeds)
    ]
    results = run_points(points, out / "points", options.jobs)
    labels = [(weight, *start, seed) for weight in weights for start in size.starts for seed in range(options.seeds)]
    return [
        {
            "transport_weight": weight, "start_r": radius, "start_alpha_degrees": angle, "seed": seed,
            "run": run, "step": step, "r": r, "alpha_degrees": alpha,
        }
        for run, ((weight, radius, angle, seed), result) in enumerate(zip(labels, results, strict=True))
        for step, r, alpha in result["path"]
    ]  # fmt: skip


def train_path(folder: Path, settings: dict) -> dict:
    """Work of a point: one training, and [iteration, r, α in degrees] along it."""
    radius, angle = settings["start"]
    run_dir = folder / "run"
    start = [f"generator.scale={radius}", f"generator.angle={angle}"]
    train_run(shipped_config(CONFIG), [*settings["overrides"], *start], run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = [(line["step"], line["validation"]) for line in lines if "validation" in line]
    if not seen or "scale" not in seen[0][1]:
        raise InputError(f"{CONFIG}: source, target and cost must be those of the closed form")
    return {"path": [[0, radius, angle], *([step, now["scale"], now["rotation_degrees"]] for step, now in seen)]}


# -- picture -----------------------------------------------------------------------------------------------------------

PATH_COLOUR, OPTIMUM_COLOUR = "#ffffff", "#ff6b35"
SLICES = {0: "#1b4965", 90: "#5fa8a0", 180: "#c8553d"}  # degrees of the drawn profiles


def draw(path: Path, config: Config, optima, rows, paths, size: SurfaceSize) -> None:
    """A line for each λ: the surface, the same from above with the trainings, and profiles beside Monte Carlo."""
    from rdmd_fast.files import replace_file

    figure_class = require("matplotlib.figure", "eval").Figure
    require("matplotlib.backends.backend_agg", "eval")
    figure = figure_class(figsize=(15, 5.1 * len(optima)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.15)
    radii = np.linspace(min(size.radii), max(size.radii), size.grid[0])
    angles = np.linspace(-180, 180, size.grid[1])
    for line, best in enumerate(optima):
        weight = best["transport_weight"]
        # The angle enters by the cost alone: one row of the divergence serves all angles.
        divergence = np.array([closed_form(config, 0.0, radius, 0.0) for radius in radii])
        cost = 2 * (1 + radii**2 - 2 * radii * np.cos(np.deg2rad(angles))[:, None])
        losses = divergence + weight * cost
        mesh = radii * np.cos(np.deg2rad(angles))[:, None], radii * np.sin(np.deg2rad(angles))[:, None]
        panels = [
            figure.add_subplot(len(optima), 3, 3 * line + 1, projection="3d", computed_zorder=False),
            figure.add_subplot(len(optima), 3, 3 * line + 2),
            figure.add_subplot(len(optima), 3, 3 * line + 3),
        ]
        runs = [path for path in paths if path["transport_weight"] == weight]
        _draw_surface(panels[0], mesh, losses, best)
        _draw_from_above(figure, panels[1], mesh, losses, best, runs)
        _draw_profiles(panels[2], config, best, rows, radii)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_surface(axes, mesh, losses, best) -> None:
    axes.plot_surface(*mesh, losses, cmap="viridis", rcount=60, ccount=60, linewidth=0, antialiased=True, zorder=1)
    axes.plot(*_optimum_points(best), best["loss"], color=OPTIMUM_COLOUR, zorder=3, **_optimum_style(best))
    axes.view_init(elev=42, azim=-62)
    axes.set_title(_title(best), fontsize=12)
    axes.set_xlabel("r cos α")
    axes.set_ylabel("r sin α")
    axes.set_zlabel("loss")
    axes.tick_params(labelsize=8)


def _draw_from_above(figure, axes, mesh, losses, best, runs) -> None:
    """Contours whose steps grow with the height, so that the valley shows, and the trainings' paths."""
    low, high = losses.min(), losses.max()
    levels = low + (high - low) * np.linspace(0, 1, 22) ** 2
    filled = axes.contourf(*mesh, losses, levels=levels, cmap="viridis")
    axes.contour(*mesh, losses, levels=levels[1:], colors="black", linewidths=0.3, alpha=0.35)
    figure.colorbar(filled, ax=axes, shrink=0.8, format="%.2g").set_label("loss", fontsize=9)
    for run in sorted({row["run"] for row in runs}):
        radius = np.array([row["r"] for row in runs if row["run"] == run])
        angle = np.deg2rad([row["alpha_degrees"] for row in runs if row["run"] == run])
        across, up = radius * np.cos(angle), radius * np.sin(angle)
        axes.plot(across, up, color=PATH_COLOUR, linewidth=1.2, zorder=3)
        axes.plot(across[0], up[0], "o", color=PATH_COLOUR, markersize=5, markeredgecolor="#333333", zorder=4)
        axes.plot(across[-1], up[-1], "D", color="#333333", markersize=4, markeredgecolor=PATH_COLOUR, zorder=5)
    axes.plot(*_optimum_points(best), color=OPTIMUM_COLOUR, zorder=3.5, **_optimum_style(best))
    axes.set_aspect("equal")
    axes.set_title(f"{len({row['run'] for row in runs})} trainings (○ start, ◆ end) on the loss", fontsize=11)
    axes.set_xlabel("r cos α")
    axes.set_ylabel("r sin α")
    axes.tick_params(labelsize=8)


def _draw_profiles(axes, config, best, rows, radii) -> None:
    """The loss along r at a few angles: closed form as lines, Monte Carlo with two standard errors as points."""
    weight = best["transport_weight"]
    for angle, colour in SLICES.items():
        curve = [closed_form(config, weight, radius, angle) for radius in radii]
        axes.plot(radii, curve, color=colour, linewidth=1.4, label=f"α = {angle}°", zorder=2)
        cut = [row for row in rows if row["transport_weight"] == weight and row["alpha_degrees"] == angle]
        axes.errorbar(
            [row["r"] for row in cut],
            [row["monte_carlo"] for row in cut],
            [2 * row["standard_error"] for row in cut],
            fmt="o", color=colour, markersize=4, capsize=3, linewidth=1, zorder=3,
        )  # fmt: skip
    axes.axvline(best["r"], color=OPTIMUM_COLOUR, linewidth=1.2, linestyle="--", label=f"r* = {best['r']:.4f}")
    axes.set_title(
        "closed form (lines), Monte Carlo ± 2 standard errors (points)\n"
        f"{best['monte_carlo_points']} points over (r, α), differences in standard errors:\n"
        f"largest {best['largest_difference']:.1f}, mean square {best['mean_square_difference']:.2f}",
        fontsize=9,
    )
    axes.set_xlabel(
        f"r    (trainings end at r = {with_error(best['trained_r'], best['trained_r_error'])})", fontsize=10
    )
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color="#e6e9ed", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _optimum_points(best) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, 181) if best["alpha_degrees"] is None else np.zeros(1)
    return best["r"] * np.cos(angle), best["r"] * np.sin(angle)


def _optimum_style(best) -> dict:
    if best["alpha_degrees"] is None:
        return {"linewidth": 2.2, "linestyle": "--"}
    return {"marker": "*", "markersize": 15, "markeredgecolor": "white", "linestyle": ""}


def _title(best) -> str:
    where = f"the circle r = {best['r']:.4g}" if best["alpha_degrees"] is None else f"r = {best['r']:.4f}, α = 0"
    return f"λ = {best['transport_weight']:g}: optimal at {where}"
