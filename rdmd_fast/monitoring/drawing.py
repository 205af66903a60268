"""Pictures: grids of images (Pillow only, for use while training) and maps of the 2-D toys (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.files import replace_file
from rdmd_fast.metrics.checks import fp64_rows
from rdmd_fast.pixels import to_uint8

MIN_TILE = 48  # pixels: an 8x8 digit can still be read
GUTTER = 4
MARGIN = 12
FONT_SIZE = 15
TEXT_COLOUR = (40, 40, 40)
# Pillow's own font has no Greek letters.
GREEK = str.maketrans({"λ": "lambda", "σ": "sigma", "α": "alpha", "ω": "omega"})
SOURCE_COLOUR, OUTPUT_COLOUR, TARGET_COLOUR = "#5b6b7d", "#d1495b", "#2a7f9e"


def _rgb_tiles(images) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as RGB uint8 [N, H, W, 3]; one channel becomes grey."""
    images = torch.as_tensor(images).cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"images have shape {list(images.shape)}: a grid takes [N, 1 or 3, H, W]")
    return to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def image_grid(rows: Sequence[tuple[str, torch.Tensor]], path: str | Path, upscale: int | None = None) -> None:
    """Write a PNG with one line of images for each (label, images [N, C, H, W] in [-1, 1]) of ``rows``.

    All images have one size; rows may differ in N. Tiles are enlarged by the whole number ``upscale`` without
    smoothing (by default so that the shorter side has at least 48 pixels). The file appears under its name
    only when complete. Raises InputError for no rows, differing sizes, and channels other than 1 or 3.
    """
    labels, tiles = [label.translate(GREEK) for label, _ in rows], [_rgb_tiles(images) for _, images in rows]
    sizes = {batch.shape[1:3] for batch in tiles}
    if len(sizes) != 1:
        raise InputError(f"rows of a grid have image sizes {sorted(sizes)}: give at least one row, all of one size")
    height, width = sizes.pop()
    upscale = upscale or -(-MIN_TILE // min(height, width))
    height, width = height * upscale, width * upscale

    font = ImageFont.load_default(FONT_SIZE)
    label_width = max(_label_width(label, font) for label in labels)
    left = MARGIN + (label_width + MARGIN if label_width else 0)
    columns = max(len(batch) for batch in tiles)
    canvas_size = (
        left + columns * (width + GUTTER) - GUTTER + MARGIN,
        2 * MARGIN + len(tiles) * (height + GUTTER) - GUTTER,
    )
    canvas = Image.new("RGB", canvas_size, "white")
    draw = ImageDraw.Draw(canvas)
    for line, (label, batch) in enumerate(zip(labels, tiles, strict=True)):
        top = MARGIN + line * (height + GUTTER)
        draw.text((left - MARGIN, top + height // 2), label, TEXT_COLOUR, font, anchor="rm", align="right")
        enlarged = batch.repeat(upscale, axis=1).repeat(upscale, axis=2)
        for column, tile in enumerate(enlarged):
            canvas.paste(Image.fromarray(tile), (left + column * (width + GUTTER), top))
    replace_file(path, lambda file: canvas.save(file, format="PNG"))


def _label_width(label: str, font) -> int:
    return max((int(np.ceil(font.getlength(line))) for line in label.splitlines()), default=0)


def common_limits(clouds: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Centre [2] and half-width of one square that holds all but the farthest points of every cloud."""
    low = np.min([np.quantile(cloud, 0.001, axis=0) for cloud in clouds], axis=0)
    high = np.max([np.quantile(cloud, 0.999, axis=0) for cloud in clouds], axis=0)
    return (low + high) / 2, 0.55 * float(np.max(high - low)) or 1.0


def toy_picture(source, output, target, path: str | Path, title: str = "", segments: int = 200) -> None:
    """Write a PNG of panels: source points, their outputs with transport segments, target points.

    ``source`` and ``output`` [n, 2] are paired; ``target`` is [m, 2]; all in data units and drawn on equal
    axes. A mapping of panel titles to outputs draws a panel of each. ``segments`` of the pairs are joined, the first
    ones (samples are independent). Raises InputError when matplotlib is missing or a cloud is not a finite [n, 2].
    """
    outputs = output if isinstance(output, dict) else {"output G(x)": output}
    outputs = {name: fp64_rows(points, "output") for name, points in outputs.items()}
    source, target = fp64_rows(source, "source"), fp64_rows(target, "target")
    for output in outputs.values():
        if source.shape != output.shape or {source.shape[1], target.shape[1]} != {2}:
            raise InputError(
                f"source, output and target have shapes {source.shape}, {output.shape} and {target.shape}: "
                "give paired [n, 2], [n, 2] and any [m, 2]"
            )
    figure_class = require("matplotlib.figure", "eval").Figure
    require("matplotlib.backends.backend_agg", "eval")
    figure = figure_class(figsize=(4 * (2 + len(outputs)), 4.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(1, 2 + len(outputs), sharex=True, sharey=True)
    scatter(panels[0], source, SOURCE_COLOUR, "source x")
    for panel, (name, output) in zip(panels[1:], outputs.items(), strict=False):
        draw_transport(panel, source[:segments], output[:segments])
        scatter(panel, output, OUTPUT_COLOUR, name)
    scatter(panels[-1], target, TARGET_COLOUR, "target")
    frame_panels(panels, *common_limits([source, *outputs.values(), target]))
    if title:
        figure.suptitle(title, fontsize=14)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=150))


def scatter(axes, points: np.ndarray, colour: str, title: str) -> None:
    """Points [n, 2] as dots; their number is added to the title."""
    # Fainter with more points, so that density still shows.
    opacity = float(np.clip(30 / np.sqrt(len(points)), 0.15, 0.8))
    axes.scatter(*points.T, s=7, color=colour, alpha=opacity, linewidths=0, zorder=2)
    axes.set_title(f"{title}  (n = {len(points):,})", fontsize=11)


def draw_transport(axes, source: np.ndarray, output: np.ndarray) -> None:
    """A segment from each source point [n, 2] to its output [n, 2], and the source points small."""
    lines = require("matplotlib.collections", "eval").LineCollection
    axes.add_collection(
        lines(np.stack([source, output], axis=1), colors="#9aa5b1", linewidths=0.6, alpha=0.7, zorder=1)
    )
    axes.scatter(*source.T, s=4, color=SOURCE_COLOUR, linewidths=0, zorder=1.5)


def frame_panels(panels, centre: np.ndarray, half_width: float) -> None:
    """Equal axes, one square for all ``panels``, and a quiet frame."""
    for axes in panels:
        axes.set_aspect("equal")
        axes.set_xlim(centre[0] - half_width, centre[0] + half_width)
        axes.set_ylim(centre[1] - half_width, centre[1] + half_width)
        axes.grid(color="#e6e9ed", linewidth=0.6, zorder=0)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, color="#b0b7c0")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b0b7c0")
