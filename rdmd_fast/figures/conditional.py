"""One generator G(x, λ) for the whole trade-off beside generators trained at one λ each."""

from collections.abc import Sequence
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.figures.comparison import FAITHFULNESS, STANDARD_ERRORS, Setting, error_of_difference, settings_of
from rdmd_fast.figures.tradeoff import frame
from rdmd_fast.files import replace_file
from rdmd_fast.metrics.tables import format_table, mean_and_error, with_error, write_rows
from rdmd_fast.studies.options import FigureOptions
from rdmd_fast.studies.study_runs import RDMD, StudyRuns

COMPARED = ("share_3nn", "frechet", "fid", "kid", "l2")
COLOURS = {"separate": "#5b6b7d", "one": "#d1495b"}


def make(out: Path, options: FigureOptions) -> dict:
    """Compute what is not there, write lambda.png, lambda.csv (by λ and metric) and lambda_points.csv (every point).

    Returns:
        ``rows`` of every point, ``table`` of differences, ``cost`` in seconds and ``text``.
    """
    require("matplotlib.figure", "eval")  # missing now is better than missing after an hour
    runs = StudyRuns(out, options)
    conditioned = runs.study.conditioned
    if conditioned is None:
        raise InputError(f"study {runs.path}: conditioned: missing, name the generator for all λ to compare")
    separate = runs.generators(conditioned.transport_weights)
    one = runs.conditioned_generators()
    rows = runs.measure([*separate, *one])
    table = differences(settings_of(rows))
    cost = training_cost(rows)
    text = in_words(table, cost, len(runs.seeds))
    write_rows(out / "lambda.csv", table)
    write_rows(out / "lambda_points.csv", rows)
    draw(settings_of(rows), runs.study.quality, bool(runs.study.judge), cost, out / "lambda.png")
    print(format_table([printed(line) for line in table]))
    print(f"\n{text}")
    return {"rows": rows, "table": table, "cost": cost, "text": text}


def differences(settings: Sequence[Setting]) -> list[dict]:
    """A row a λ and metric: both means with standard errors, and the difference in standard errors of the difference.

    ``within`` is whether that is at most two; without standard errors (one seed) both are None.
    """
    separate = {setting.name: setting for setting in settings if setting.method == RDMD}
    table = []
    for setting in settings:
        if setting.method == RDMD:
            continue
        alone = separate[setting.name]
        for key in COMPARED:
            if key not in setting.values:
                continue
            a, b = setting.values[key], alone.values[key]
            error = error_of_difference(a, b)
            known = a.error is not None and b.error is not None
            # Seeds that agree to the last digit (a share of 1) differ by nothing, or by what no error covers.
            ratio = (0.0 if a.mean == b.mean else None) if error == 0 else (a.mean - b.mean) / error
            table.append({
                "setting": setting.name, "metric": key, "seeds": setting.seeds,
                "one": a.mean, "one_error": a.error, "separate": b.mean, "separate_error": b.error,
                "difference": a.mean - b.mean, "difference_in_errors": ratio if known else None,
                "within": None if not known else ratio is not None and abs(ratio) <= STANDARD_ERRORS,
            })  # fmt: skip
    return table


def printed(line: dict) -> dict:
    """A line of the printed table."""
    ratio = line["difference_in_errors"]
    return {
        "setting": line["setting"],
        "metric": line["metric"],
        "one generator": with_error(line["one"], line["one_error"], 3),
        "trained at this λ": with_error(line["separate"], line["separate_error"], 3),
        "difference": f"{line['difference']:+.3f}",
        "in standard errors": "-" if ratio is None else f"{ratio:+.1f}",
        "within two": {None: "-", True: "yes", False: "no"}[line["within"]],
    }


def training_cost(rows: Sequence[dict]) -> dict:
    """Seconds (means over seeds) and iterations of training: of the one run, and of the separate runs together."""
    seeds = sorted({row["seed"] for row in rows})

    def total(separate: bool, seed: int) -> tuple[float, int]:
        group = [row for row in rows if (row["method"] == RDMD) == separate and row["seed"] == seed]
        group = group if separate else group[:1]  # read at every λ, trained once
        return sum(row["training_seconds"] for row in group), sum(row["training_steps"] for row in group)

    cost = {"runs": sum(row["method"] == RDMD and row["seed"] == seeds[0] for row in rows)}
    for name, separate in (("one", False), ("separate", True)):
        seconds, steps = zip(*(total(separate, seed) for seed in seeds), strict=True)
        cost[f"{name}_seconds"], cost[f"{name}_seconds_error"] = mean_and_error(seconds)
        cost[f"{name}_steps"] = steps[0]
    return cost | {"ratio": cost["one_seconds"] / cost["separate_seconds"]}


def in_words(table: Sequence[dict], cost: dict, seeds: int) -> str:
    price = (
        f"Training took {with_error(cost['one_seconds'], cost['one_seconds_error'], 0)} s for the one generator and "
        f"{with_error(cost['separate_seconds'], cost['separate_seconds_error'], 0)} s for the {cost['runs']} separate "
        f"ones together: {cost['ratio']:.2f} of it, and {cost['one_steps']} of {cost['separate_steps']} iterations."
    )
    if seeds < 2:
        return f"One seed: no standard errors. {price}"
    outside = [line for line in table if not line["within"]]
    verdict = f"{len(table) - len(outside)} of {len(table)} numbers lie within two standard errors of the difference"
    if outside:
        listing = "; ".join(f"{line['metric']} at {line['setting']} ({line['difference']:+.3f})" for line in outside)
        verdict += f", not so {listing}"
    return f"Over {seeds} seeds {verdict}. {price}"


def draw(settings: Sequence[Setting], quality: str, judged: bool, cost: dict, path: Path) -> None:
    """Two panels over L2: both curves with standard errors, points labelled by λ."""
    keys = (quality, "share_3nn" if judged else "kid")
    figure = require("matplotlib.figure", "eval").Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    curves = {
        "separate": f"one run for each λ: {cost['separate_seconds']:.0f} s of training",
        "one": f"one run for all λ: {cost['one_seconds']:.0f} s of training",
    }
    for name, label in curves.items():
        group = [each for each in settings if (each.method == RDMD) == (name == "separate")]
        group = sorted(group, key=lambda each: each.values[FAITHFULNESS].mean)
        for panel, key in zip(panels, keys, strict=True):
            x, y = ([each.values[metric] for each in group] for metric in (FAITHFULNESS, key))
            panel.errorbar(
                [each.mean for each in x], [each.mean for each in y], [each.error or 0 for each in y],
                [each.error or 0 for each in x], color=COLOURS[name], label=label, capsize=3, linewidth=1.6,
                marker="os"[name == "one"], markersize=6,
            )  # fmt: skip
            for setting, across, up in zip(group, x, y, strict=True):
                offset = (5, 6) if name == "one" else (5, -13)
                panel.annotate(
                    setting.name, (across.mean, up.mean), offset, textcoords="offset points", fontsize=9,
                    color=COLOURS[name],
                )  # fmt: skip
    for panel, key in zip(panels, keys, strict=True):
        frame(panel, key)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=150))
