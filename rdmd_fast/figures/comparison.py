"""Settings of several methods compared by two numbers, quality and faithfulness, each with its standard error.

The rule, for both numbers lower is better. a is *clearly lower* than b if it is lower by more than two standard errors
of the difference, sqrt(SE_a^2 + SE_b^2), the standard errors being over seeds. One setting *dominates* another if it is
clearly lower in one of the numbers and the other is not clearly lower in the remaining one. So two settings cannot
dominate each other, and where neither does they differ by nothing that the seeds can tell, or one is closer to the
target and the other to the source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rdmd_fast.metrics.tables import mean_and_error, with_error

STANDARD_ERRORS = 2.0
FAITHFULNESS = "l2"
LABELS = {
    "frechet": "Fréchet distance", "fid": "FID", "kid": "KID", "share_3nn": "share of outputs called the target",
    "l2": "L2 to the source", "psnr": "PSNR", "ssim": "SSIM",
}  # fmt: skip


class Measured(NamedTuple):
    """Mean over seeds and its standard error; None for one seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        return cls(*mean_and_error(values))

    def clearly_lower(self, other: Measured) -> bool:
        return other.mean - self.mean > STANDARD_ERRORS * error_of_difference(self, other)

    def __str__(self) -> str:
        return with_error(self.mean, self.error, 2)


def error_of_difference(a: Measured, b: Measured) -> float:
    """Standard error of a - b for independent seeds; what is known of one seed alone counts as exact."""
    return math.hypot(a.error or 0.0, b.error or 0.0)


class Setting(NamedTuple):
    """A method at one setting: metrics over seeds."""

    method: str
    name: str
    seeds: int
    values: dict[str, Measured]

    def __str__(self) -> str:
        return f"{self.method} {self.name}".strip()


# Of a row: not a metric.
_OTHERS = ("method", "setting", "seed", "folder", "device", "images", "real_images")


def settings_of(rows: Sequence[dict]) -> list[Setting]:
    """One setting for the rows of equal method and setting, in the order in which they come first.

    What is None in any of its rows (the PSNR of the identity) is left out.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    return [
        Setting(method, name, len(group), {
            key: Measured.of([row[key] for row in group])
            for key in group[0]
            if key not in _OTHERS and all(row.get(key) is not None for row in group)
        })
        for (method, name), group in groups.items()
    ]  # fmt: skip


def dominates(a: Setting, b: Setting, quality: str) -> bool:
    """By the rule of this module."""
    pairs = [(a.values[key], b.values[key]) for key in (quality, FAITHFULNESS)]
    worse = any(second.clearly_lower(first) for first, second in pairs)
    return not worse and any(first.clearly_lower(second) for first, second in pairs)


def compare(baseline: Sequence[Setting], reference: Sequence[Setting], quality: str) -> str:
    """A paragraph on where a baseline's settings are better than the reference's (RDMD's), where worse, where neither.

    Each setting is compared with all of the reference's; of those that it dominates, or that dominate it, the one of
    the largest gap in quality is told.
    """
    method, other = baseline[0].method, reference[0].method
    better, worse, neither = [], [], []
    for setting in baseline:
        beaten = [each for each in reference if dominates(setting, each, quality)]
        beating = [each for each in reference if dominates(each, setting, quality)]
        if beating:
            worst = min(beating, key=lambda each: each.values[quality].mean)
            worse.append((worst.values[quality].mean - setting.values[quality].mean, setting, worst))
        if beaten:
            best = max(beaten, key=lambda each: each.values[quality].mean)
            better.append((best.values[quality].mean - setting.values[quality].mean, setting, best))
        if not (beaten or beating):
            neither.append(setting)
    sentences = [f"{method}, {len(baseline)} settings against {len(reference)} of {other}."]
    sentences.append(_sentence("better", better, len(baseline), quality, max))
    sentences.append(_sentence("worse", worse, len(baseline), quality, min))
    if neither:
        names = "; ".join(f"{each.name} ({_values(each, quality)})" for each in neither)
        sentences.append(f"Neither better nor worse than any of {other}'s: {names}.")
    both = {id(each) for _, each, _ in better} & {id(each) for _, each, _ in worse}
    if both:
        sentences.append(
            f"{len(both)} of them {'is' if len(both) == 1 else 'are'} better than one λ and worse than another."
        )
    return " ".join(sentences)


def _sentence(verdict: str, cases: list[tuple[float, Setting, Setting]], count: int, quality: str, extreme) -> str:
    if not cases:
        return f"No setting is {verdict} than any of them."
    gap, setting, other = extreme(cases, key=lambda case: case[0])
    label = LABELS[quality]
    if abs(gap) < 0.005:
        amount = f"no difference in {label}"
    else:
        amount = f"{label} {'lower' if gap > 0 else 'higher'} by {abs(gap):.2f}"
    names = "" if len(cases) == count else f" ({'; '.join(each.name for _, each, _ in cases)})"
    return (
        f"{len(cases)} of {count} {'is' if len(cases) == 1 else 'are'} {verdict}{names}, most at {setting.name}: "
        f"{_values(setting, quality)} against {_values(other, quality)} of {other}, {amount}."
    )


def _values(setting: Setting, quality: str) -> str:
    return f"{LABELS[quality]} {setting.values[quality]} at L2 {setting.values[FAITHFULNESS]}"
