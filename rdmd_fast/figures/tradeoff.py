"""Quality against faithfulness of RDMD by λ and of the baselines by their settings (arXiv 2406.14762, Figure 4)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rdmd_fast.extras import require
from rdmd_fast.figures.comparison import FAITHFULNESS, LABELS, Setting, compare, dominates, settings_of
from rdmd_fast.files import replace_file, write_atomically
from rdmd_fast.metrics.tables import format_table, write_rows
from rdmd_fast.monitoring.drawing import image_grid
from rdmd_fast.studies.options import FigureOptions, StudyOptions
from rdmd_fast.studies.study_runs import BASELINES, IDENTITY, RDMD, StudyRuns

PICTURED = 10  # columns of the grid of translations
TABLE = ("share_3nn", "frechet", "fid", "kid", "l2", "mse_per_pixel", "psnr", "ssim")
COSTS = ("evaluations", "energy_evaluations", "seconds_per_image")
COLOURS = ("#d1495b", "#2a7f9e", "#e09f3e", "#5f8d4e", "#7d5ba6", "#5b6b7d", "#8c564b")
MARKERS = "osD^vPX"
SYMBOLS = {"sigma0": "σ₀", "factor": "N", "lambda_i": "λᵢ", "lambda_s": "λₛ", "eta": "η"}


def make(out: Path, options: FigureOptions) -> dict:
    """Compute what is not there, write tradeoff.png, .csv (every point), _table.csv (over seeds), _samples.png, .txt.

    Returns:
        ``rows`` of every point, ``table`` over seeds and ``text``, the comparison in words.
    """
    require("matplotlib.figure", "eval")  # missing now is better than missing after hours
    runs = StudyRuns(out, options)
    study = runs.study
    runs.train(study.rdmd.transport_weights)
    rows = runs.measure([*runs.generators(study.rdmd.transport_weights), *runs.untouched(), *runs.baselines()])
    settings = settings_of(rows)
    table, text = summary_rows(settings), in_words(settings, study.quality, len(runs.seeds))
    write_rows(out / "tradeoff.csv", rows)
    write_rows(out / "tradeoff_table.csv", table)
    write_atomically(out / "tradeoff.txt", f"{text}\n")
    draw(settings, study, out / "tradeoff.png")
    draw_samples(rows, settings, study, runs.folder, out / "tradeoff_samples.png")
    print(format_table([printed(setting) for setting in settings]))
    print(f"\n{text}")
    return {"rows": rows, "table": table, "text": text}


def summary_rows(settings: Sequence[Setting]) -> list[dict]:
    """A row a setting: mean and standard error over seeds of every number."""
    return [
        {"method": setting.method, "setting": setting.name, "seeds": setting.seeds}
        | {
            column: number
            for key, value in setting.values.items()
            for column, number in ((key, value.mean), (f"{key}_error", value.error))
        }
        for setting in settings
    ]


def printed(setting: Setting) -> dict:
    """The setting's line of the printed table."""
    values = {key: setting.values[key] for key in (*TABLE, *COSTS) if key in setting.values}
    cells = {key: str(value) if key in ("frechet", "fid", "l2") else value.mean for key, value in values.items()}
    if "seconds_per_image" in cells:
        cells["ms_per_image"] = 1000 * cells.pop("seconds_per_image")
    return {"method": setting.method, "setting": setting.name, **cells}


# -- in words ----------------------------------------------------------------------------------------------------------


def in_words(settings: Sequence[Setting], quality: str, seeds: int) -> str:
    """Where each baseline is better than RDMD and where not, by the rule of ``comparison``; a paragraph for each."""
    ours = [setting for setting in settings if setting.method == RDMD]
    methods = [name for name in BASELINES.values() if any(setting.method == name for setting in settings)]
    measured = [each for each in settings if each.method in (RDMD, *methods)]
    front = [each for each in measured if not any(dominates(other, each, quality) for other in measured)]
    certainty = (
        f"Numbers are mean ± standard error over {seeds} seeds. A setting is better than another where it is lower "
        "in one of the two by more than two standard errors of the difference, and not higher by more in the other."
        if seeds > 1
        else "One seed: there are no standard errors, and every difference counts."
    )
    paragraphs = [
        f"{LABELS[quality]} (lower is closer to the target) and {LABELS[FAITHFULNESS]} (lower is more faithful). "
        f"{certainty} No other setting dominates these: {', '.join(map(str, front))}."
    ]
    for method in methods:
        theirs = [setting for setting in settings if setting.method == method]
        paragraphs.append(f"{compare(theirs, ours, quality)} {_costs(theirs, ours)}")
    return "\n\n".join(paragraphs)


def _costs(theirs: Sequence[Setting], ours: Sequence[Setting]) -> str:
    evaluations = [each.values["evaluations"].mean for each in theirs]
    ratio = np.median([each.values["seconds_per_image"].mean for each in theirs]) / np.median(
        [each.values["seconds_per_image"].mean for each in ours]
    )
    return (
        f"It takes {_range(evaluations)} network evaluations an image where {RDMD} takes 1, and {ratio:.0f} times as "
        "long."
    )


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(settings: Sequence[Setting], study: StudyOptions, path: Path) -> None:
    """Two panels over L2, curves with standard errors; costs in the legend. The identity (L2 0) is in the table."""
    keys = (study.quality, "share_3nn" if study.judge else "kid")
    figure = require("matplotlib.figure", "eval").Figure(figsize=(13, 6.8), layout="constrained")
    panels = figure.subplots(1, 2)
    methods = [method for method in dict.fromkeys(setting.method for setting in settings) if method != IDENTITY]
    for index, method in enumerate(methods):
        group = [each for each in settings if each.method == method]
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "front": method == RDMD,
        }
        for panel, key in zip(panels, keys, strict=True):
            for number, curve in enumerate(curves(group)):
                label = None if number else legend(group)
                _draw_curve(panel, curve, key, short_names(group), label=label, dashed=number > 0, **style)
    for panel, key in zip(panels, keys, strict=True):
        frame(panel, key)
    plain_log_scale(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=150))


def curves(group: Sequence[Setting]) -> list[list[Setting]]:
    """Settings by the options that they name, each curve in the order of its L2."""
    found: dict[tuple, list[Setting]] = {}
    for setting in sorted(group, key=lambda each: each.values[FAITHFULNESS].mean):
        options = tuple(part.split()[0] for part in setting.name.split(", ") if part)
        found.setdefault(options, []).append(setting)
    return sorted(found.values(), key=len, reverse=True)


def _draw_curve(panel, curve, key: str, names: dict, label, dashed: bool, front: bool, color, marker) -> None:
    halo = require("matplotlib.patheffects", "eval").withStroke(linewidth=1.5, foreground="white")
    x, y = ([each.values[name] for each in curve] for name in (FAITHFULNESS, key))
    panel.errorbar(
        [each.mean for each in x], [each.mean for each in y], [each.error or 0 for each in y],
        [each.error or 0 for each in x], color=color, marker=marker, label=label,
        linestyle="--" if dashed else "-", linewidth=2.2 if front else 1.2, markersize=7 if front else 5,
        elinewidth=1, capsize=2, zorder=3 if front else 2,
    )  # fmt: skip
    # Shares lie close together at 1: there no setting is named.
    for setting, across, up in zip(curve, x, y, strict=True) if key != "share_3nn" else ():
        panel.annotate(
            names[setting.name], (across.mean, up.mean), (6, 5), textcoords="offset points", fontsize=8, color=color,
            path_effects=[halo], zorder=4,
        )  # fmt: skip


def frame(panel, key: str) -> None:
    """Labels and grid of a panel of ``key`` over L2."""
    panel.set_xlabel(f"{LABELS[FAITHFULNESS]} (lower is more faithful)")
    panel.set_ylabel(f"{LABELS[key]} ({'higher' if key == 'share_3nn' else 'lower'} is better)")
    panel.grid(color="#e6e9ed", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(0.07)


def plain_log_scale(panel) -> None:
    """A logarithmic axis whose ticks are written as people write numbers."""
    ticker = require("matplotlib.ticker", "eval")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def varied(group: Sequence[Setting]) -> list[str]:
    """Options in which a method's settings differ, in the order of their names."""
    parts = [dict(part.split(" ", 1) for part in setting.name.split(", ") if part) for setting in group]
    names = dict.fromkeys(name for each in parts for name in each)
    return [name for name in names if len({each.get(name) for each in parts}) > 1]


def short_names(group: Sequence[Setting]) -> dict[str, str]:
    """What the figure calls a method's settings: the values of the options in which they differ, as 2/0.1."""
    options = varied(group)
    names = {}
    for setting in group:
        values = dict(part.split(" ", 1) for part in setting.name.split(", ") if part)
        names[setting.name] = "/".join(values.get(name, "–").removesuffix(".0") for name in options)
        if group[0].method == RDMD or not options:
            names[setting.name] = setting.name
    return names


def legend(group: Sequence[Setting]) -> str:
    """Method, the options by which its points are named, network evaluations and milliseconds an image."""
    options = "/".join(SYMBOLS.get(name, name) for name in varied(group))
    evaluations = _range([each.values["evaluations"].mean for each in group])
    energy = [each.values["energy_evaluations"].mean for each in group if "energy_evaluations" in each.values]
    also = f" + {_range(energy)} of energy" if any(energy) else ""
    milliseconds = [1000 * each.values["seconds_per_image"].mean for each in group]
    low, high = (f"{float(f'{value:.2g}'):g}" for value in (min(milliseconds), max(milliseconds)))
    time = low if low == high else f"{low} to {high}"
    plural = "evaluation" if evaluations == "1" else "evaluations"
    return f"{group[0].method}{f' by {options}' * bool(options)}: {evaluations} {plural}{also},\n{time} ms an image"


def draw_samples(rows: list[dict], settings: list[Setting], study: StudyOptions, points: Path, path: Path) -> None:
    """The same sources by every method at its setting of the best quality, first seed; RDMD at all of its λ."""
    from rdmd_fast.studies.measurement_jobs import SAMPLES, held_out

    sources = held_out(study.source.test, study.held_out)
    chosen = torch.linspace(0, len(sources) - 1, min(SAMPLES, len(sources))).long()
    lines = [("source x", sources[chosen][:PICTURED])]
    for method in dict.fromkeys(setting.method for setting in settings):
        group = [setting for setting in settings if setting.method == method]
        if method == IDENTITY:
            continue
        best = min(group, key=lambda each: each.values[study.quality].mean)
        for setting in group if method == RDMD else [best]:
            row = next(row for row in rows if (row["method"], row["setting"]) == (setting.method, setting.name))
            samples = torch.from_numpy(np.load(points / row["folder"] / "samples.npy", allow_pickle=False))
            lines.append((str(setting), samples[:PICTURED].float() / 127.5 - 1))
    image_grid(lines, path)
