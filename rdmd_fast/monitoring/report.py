"""One page of HTML about runs: configuration, curves, pictures, validation, seconds by phase, events.

The page is a single file that loads nothing: its script and style are report.js and report.css, its pictures data:
URIs. Whatever comes from a run is escaped, and the page's own policy lets no script run but that one, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, features

from rdmd_fast.data.pictures import UNREADABLE, load_picture
from rdmd_fast.extras import own_version
from rdmd_fast.monitoring.run_record import Record, Series
from rdmd_fast.paths import is_command, without_keys

BUCKETS = 400  # of a curve, each with its lowest and its highest point: as many as a plot has pixels, nearly
MOST_PICTURES, MOST_WIDTH = 40, 1200
MOST_PICTURE_BYTES = 4 << 20  # of all pictures of a page, in base64
MOST_EVENTS = 200  # of a run
REST = "all else"  # of an iteration's seconds, beside its phases

_LOWER = ("l2", "sliced_w2", "frechet", "squared_w2", "monotonicity_violations")
_HIGHER = ("psnr", "colour_cosine", "share_3nn")
_TRUTHS = {
    "squared_w2": ("noise_floor", "the same number between two samples of the target"),
    "transport_cost": ("ot_cost_to_output", "exact optimal transport onto the same outputs"),
    "axis_scale_0": ("axis_scale_0_expected", "closed form"),
    "axis_scale_1": ("axis_scale_1_expected", "closed form"),
}
"""Of validation metrics the one that says what they should be, and what that is."""
_ZERO = {"monotonicity_violations": "optimal maps have 0", "rotation_degrees": "closed form"}
_AT_WEIGHT = re.compile(r"_at_[\d.e+-]+$")  # of a generator for a range of λ
_HARDLY_SEEN = ("samples", "eta_seconds")


def page(records: Sequence[Record]) -> str:
    """The report of runs, side by side where there are several."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    names = _names(records)
    plots, constant = _plots(records)
    times = [_times(record) for record in records]
    differing, common = _configuration(records)
    return environment.get_template("report.html.j2").render(
        names=names,
        runs=[
            {
                "name": name,
                "record": record,
                "time": time,
                "pictures": _pictures(record, MOST_PICTURE_BYTES // len(records)),
            }
            for name, record, time in zip(names, records, times, strict=True)
        ],
        script=script,
        script_digest=digest,
        style=(folder / "report.css").read_text(encoding="utf-8"),
        differing=differing,
        common=common,
        validation=_validation_table(records),
        truths=_truths(records),
        plots=plots,
        data={"runs": names, "plots": plots},
        constant=constant,
        longest=max((max(time["whole"], sum(time["phases"].values())) for time in times if time), default=0),
        phases=sorted(dict.fromkeys(phase for time in times if time for phase in time["phases"]), key=REST.__eq__),
        rest=REST,
        overview=_overview(records, times),
        most_events=MOST_EVENTS,
        version=own_version(),
    )


def number(value: float | None) -> str:
    """``value`` with 4 significant digits, a dash for None."""
    return "–" if value is None else f"{float(f'{value:.4g}'):.15g}"


def _names(records: Sequence[Record]) -> list[str]:
    """Names of folders, or their paths where two are called alike."""
    short = [record.folder.resolve().name for record in records]
    return short if len(set(short)) == len(short) else [str(record.folder) for record in records]


def _section(record: Record, name: str) -> dict:
    section = record.config.get(name)
    return section if isinstance(section, dict) else {}


def _overview(records: Sequence[Record], times: Sequence[dict | None]) -> list[tuple[str, list[str]]]:
    """(what, of each run)."""

    def course(record: Record) -> str:
        of = _section(record, "train").get("steps")
        ended = record.exported is not None and record.exported >= record.last_step
        return f"{record.last_step} of {of} iterations, {'ended' if ended else 'not ended'}"

    return [
        ("stage", [str(record.config.get("stage", "–")) for record in records]),
        ("came to", [course(record) for record in records]),
        ("λ", [_shown(_section(record, "rdmd").get("transport_weight", "–")) for record in records]),
        ("samples of an iteration", [number(record.samples or None) for record in records]),
        ("seconds of an iteration", [number(time and time["whole"]) for time in times]),
        ("images per second", [number(time and time["images"]) for time in times]),
        ("lines of metrics", [str(record.lines) for record in records]),
        ("events", [str(len(record.events)) for record in records]),
    ]


# -- configuration -----------------------------------------------------------------------------------------------------


def _configuration(records: Sequence[Record]) -> tuple[list, list]:
    """(key, what each run has, a dash for nothing) of the keys that differ, and of the others."""
    flat = [dict(_flat(record.config)) for record in records]
    differing, common = [], []
    for key in dict.fromkeys(key for values in flat for key in values):
        is_common = len({repr(values.get(key, ...)) for values in flat}) == 1
        shown = [_shown(values[key]) if key in values else "–" for values in flat]
        (common if is_common else differing).append((key, shown))
    return differing, common


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    """A value as it may be mailed: commands and addresses of data can hold keys."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if is_command(value):
        return "a command, which may hold keys"
    return "::".join(part if (address := without_keys(part)) is None else address for part in value.split("::"))


# -- curves ------------------------------------------------------------------------------------------------------------


def decimate(series: Series, buckets: int = BUCKETS) -> Series:
    """The lowest and the highest point of each of ``buckets`` parts of a curve, its first and its last, in order."""
    values = np.asarray(series.values)
    if len(values) <= 2 * buckets:
        return series
    keep = {0, len(values) - 1}
    for first, last in pairwise(np.linspace(0, len(values), buckets + 1).astype(int).tolist()):
        keep |= {first + int(values[first:last].argmin()), first + int(values[first:last].argmax())}
    return Series(*([part[index] for index in sorted(keep)] for part in series))


def _plots(records: Sequence[Record]) -> tuple[dict[str, list], list[tuple[str, list]]]:
    """Plots by section, and (name, value of each run) of what never changes and is none."""
    sections: dict[str, list] = {"training": [], "validation": [], "rates": []}
    constant = []
    for kind in ("training", "validation"):
        groups = [getattr(record, kind) for record in records]
        for name in dict.fromkeys(name for group in groups for name in group):
            if name in _HARDLY_SEEN or (kind == "validation" and _is_truth(name)):
                continue
            curves = [(run, group[name]) for run, group in enumerate(groups) if name in group]
            if all(min(curve.values) == max(curve.values) for _, curve in curves):
                if kind == "training":  # the table of validations has the others
                    found = dict(curves)
                    constant.append(
                        (name, [found[run].values[0] if run in found else None for run in range(len(groups))])
                    )
                continue
            plot = {"name": name, "curves": [_curve(run, curve) for run, curve in curves]}
            truth = _truth_name(name) if kind == "validation" else None
            plot["curves"] += [_curve(run, groups[run][truth], True) for run, _ in curves if truth in groups[run]]
            is_rate = "/" in name or name in ("images_per_second", "mfu", "data_wait_share", "failed_checkpoints")
            sections["rates" if kind == "training" and is_rate else kind].append(plot)
    sections["training"].sort(key=lambda plot: "loss" not in plot["name"])
    return sections, constant


def _curve(run: int, series: Series, is_truth: bool = False) -> dict:
    steps, values = decimate(series)
    return {"run": run, "truth": is_truth, "x": steps, "y": [float(f"{value:.5g}") for value in values]}


# -- validation --------------------------------------------------------------------------------------------------------


def _truth_name(name: str) -> str | None:
    """The metric that says what ``name`` should be, at the same λ."""
    suffix = _AT_WEIGHT.search(name)
    truth = _TRUTHS.get(_AT_WEIGHT.sub("", name))
    return truth and truth[0] + (suffix[0] if suffix else "")


def _is_truth(name: str) -> bool:
    return _AT_WEIGHT.sub("", name) in {truth for truth, _ in _TRUTHS.values()}


def _validation_table(records: Sequence[Record]) -> list[tuple[str, str, list]]:
    """(metric, "lower", "higher" or "" for better, a cell of each run) where a cell is None or a dict."""
    rows = []
    for name in _measured(records):
        plain = _AT_WEIGHT.sub("", name)
        is_chosen = any(_section(record, "validation").get("best_by") == name for record in records)
        better = "higher" if plain in _HIGHER else "lower" if plain in _LOWER or is_chosen else ""
        rows.append((name, better, [_cell(record, name, better) for record in records]))
    return rows


def _measured(records: Sequence[Record]) -> list[str]:
    return [name for name in dict.fromkeys(name for each in records for name in each.validation) if not _is_truth(name)]


def _cell(record: Record, name: str, better: str) -> dict | None:
    if name not in record.validation:
        return None
    steps, values = record.validation[name]
    best = (max if better == "higher" else min)(range(len(values)), key=values.__getitem__) if better else None
    return {
        "last": values[-1],
        "last_step": steps[-1],
        "best": None if best is None else values[best],
        "best_step": None if best is None else steps[best],
        "truth": _truth(record, name),
    }


def _truth(record: Record, name: str) -> float | None:
    plain = _AT_WEIGHT.sub("", name)
    if plain in _ZERO:  # at λ = 0 every rotation is optimal
        return None if plain == "rotation_degrees" and not _section(record, "rdmd").get("transport_weight") else 0.0
    truth = record.validation.get(_truth_name(name))
    return truth.values[-1] if truth else None


def _truths(records: Sequence[Record]) -> list[str]:
    """What says what a number should be, of all metrics for which that is known."""
    texts = {name: text for name, (_, text) in _TRUTHS.items()} | _ZERO
    known = {name for name in _measured(records) if any(_truth(record, name) is not None for record in records)}
    return [f"{name}: {texts[_AT_WEIGHT.sub('', name)]}" for name in _measured(records) if name in known]


# -- times -------------------------------------------------------------------------------------------------------------


def _times(record: Record) -> dict | None:
    """Mean seconds of an iteration by phase and in all; None without any that were timed."""
    whole, steps = record.seconds.get("interval", 0.0), record.timed
    if not whole or steps <= 0:
        return None
    phases = {name: seconds / steps for name, seconds in record.seconds.items() if name != "interval"}
    rest = whole / steps - sum(phases.values())
    if rest > 0:
        phases[REST] = rest
    return {"phases": phases, "whole": whole / steps, "images": record.samples * steps / whole}


# -- pictures ----------------------------------------------------------------------------------------------------------


def _evenly(items: list, count: int) -> list:
    """``count`` of ``items``, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int).tolist()]


def _pictures(record: Record, most_bytes: int) -> dict:
    """Pictures of a run as data: URIs of at most ``most_bytes`` in all (two at least), and what was left out."""
    shown, damaged = [], []
    for step, path in _evenly(record.pictures, MOST_PICTURES):
        try:
            kind, content, size = _encode(load_picture(path))
        except UNREADABLE:
            damaged.append(path.name)
            continue
        address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        shown.append({"step": step, "name": path.name, "address": address, "width": size[0], "height": size[1]})
    count = len(shown)
    while count > 2 and sum(len(picture["address"]) for picture in _evenly(shown, count)) > most_bytes:
        count -= 1
    left_out = len(record.pictures) - len(damaged) - min(count, len(shown))
    return {"shown": _evenly(shown, count), "damaged": damaged, "left_out": left_out}


def _encode(picture: Image.Image) -> tuple[str, bytes, tuple[int, int]]:
    """(format, bytes, size) of the smallest of PNG, JPEG and WebP; at most ``MOST_WIDTH`` wide."""
    picture.thumbnail((MOST_WIDTH, 4 * MOST_WIDTH))
    best: tuple[str, bytes] | None = None
    for kind in ("png", "jpeg", *["webp"] * features.check("webp")):
        buffer = io.BytesIO()
        picture.save(buffer, kind, quality=85)
        if best is None or buffer.tell() < len(best[1]):
            best = kind, buffer.getvalue()
    return *best, picture.size
