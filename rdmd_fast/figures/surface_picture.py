"""The picture of the loss over (r, α): the surface, the same from above with the trainings, profiles of it."""

from pathlib import Path

import numpy as np

from rdmd_fast.config import Config
from rdmd_fast.extras import require
from rdmd_fast.figures.surface_loss import SurfaceSize, closed_form
from rdmd_fast.files import replace_file
from rdmd_fast.metrics.tables import with_error

PATH_COLOUR, OPTIMUM_COLOUR = "#ffffff", "#ff6b35"
SLICES = {0: "#1b4965", 90: "#5fa8a0", 180: "#c8553d"}  # degrees of the drawn profiles


def draw(path: Path, config: Config, optima, rows, paths, size: SurfaceSize) -> None:
    """Draw a line for each λ: the surface, the same from above with the trainings, and profiles beside Monte Carlo."""
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
        runs = [path for path in paths if path["transport_weight"] == weight]
        shape = len(optima), 3
        surface = figure.add_subplot(*shape, 3 * line + 1, projection="3d", computed_zorder=False)
        _draw_surface(surface, mesh, losses, best)
        _draw_from_above(figure, figure.add_subplot(*shape, 3 * line + 2), mesh, losses, best, runs)
        _draw_profiles(figure.add_subplot(*shape, 3 * line + 3), config, best, rows, radii)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_surface(axes, mesh, losses, best) -> None:
    axes.plot_surface(*mesh, losses, cmap="viridis", rcount=60, ccount=60, linewidth=0, antialiased=True, zorder=1)
    axes.plot(*_optimum_points(best), best["loss"], color=OPTIMUM_COLOUR, zorder=3, **_optimum_style(best))
    axes.view_init(elev=42, azim=-62)
    axes.set_title(_title(best), fontsize=12)
    axes.set(xlabel="r cos α", ylabel="r sin α", zlabel="loss")
    axes.tick_params(labelsize=8)


def _draw_from_above(figure, axes, mesh, losses, best, runs) -> None:
    """Draw contours whose steps grow with the height, so that the valley shows, and the trainings' paths."""
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
    axes.set(xlabel="r cos α", ylabel="r sin α")
    axes.tick_params(labelsize=8)


def _draw_profiles(axes, config, best, rows, radii) -> None:
    """Draw the loss along r at a few angles: closed form as lines, Monte Carlo with two standard errors as points."""
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
