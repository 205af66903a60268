"""The rule by which ``rdmd sweep`` recommends a setting, on numbers alone.

Every trial has a *distance* to the target and a *cost* of transport (lower is better for both). For images the distance
is read on the way from the untouched sources (0 %) to other real samples of the target (100 %). A trial is *good* if it
covers at most 5 % of the way less than the best one; for toys, if its squared W2 is at most twice the noise floor.
Of the good trials that of the lowest cost is recommended: as close to the target as any, and most faithful.
None is where the best covers less than half of the way (no trial of a toy is good), and where all trials are good and
cost the same within 5 %.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

AS_GOOD, ENOUGH, SAME_COST = 0.05, 0.5, 0.05
FLOORS = 2.0
DISTANCES = ("frechet", "sliced_w2", "squared_w2")
"""Metrics of validation that fall to the noise floor as outputs come to follow the target."""


class Trial(NamedTuple):
    """One short run; a distance or cost that is no finite number is None."""

    transport_weight: float
    generator_sigma: float
    distance: float | None
    cost: float | None

    def __str__(self) -> str:
        return f"λ = {self.transport_weight:g}, generator_sigma = {self.generator_sigma:g}"


class Reference(NamedTuple):
    """What distances are read against.

    Attributes:
        untouched: distance of the sources themselves; None for toys.
        floor: of real samples from others (for toys: the noise floor of squared W2).
    """

    untouched: float | None
    floor: float


class Recommendation(NamedTuple):
    """``trial`` is None where none can be recommended; ``reason`` says why, or why this one."""

    trial: Trial | None
    reason: str


def advise(rows: Sequence[dict], references: dict) -> Recommendation:
    """Recommend one of the settings of a sweep's ``rows`` by the rule of this module."""
    best_by = references.get("best_by")
    if best_by is None:
        return Recommendation(
            None, "Nothing can be recommended without held-out data: set data.source_holdout and data.target_holdout."
        )
    cost = "transport_cost" if "transport_cost" in rows[0] else "l2"
    if best_by not in DISTANCES:
        return Recommendation(None, f"validation.best_by: {best_by} is no distance to the target, name another.")
    trials = [Trial(row["transport_weight"], row["generator_sigma"], row.get(best_by), row.get(cost)) for row in rows]
    return recommend(trials, Reference(references["untouched"], references["floor"]))


def recommend(trials: Sequence[Trial], reference: Reference) -> Recommendation:
    """Recommend a trial by the rule of this module."""
    whole = [trial for trial in trials if _is_number(trial.distance) and _is_number(trial.cost)]
    if not whole:
        return Recommendation(None, "No run has finite numbers: lower the optimizers' learning rates and run it again.")
    best = min(whole, key=lambda trial: trial.distance)
    if reference.untouched is None:
        good = [trial for trial in whole if trial.distance <= FLOORS * reference.floor]
        standard = f"squared W2 of at most twice the noise floor {reference.floor:.4f}"
        if not good:
            return Recommendation(
                None,
                f"No setting is good enough: the best ({best}) has squared W2 {best.distance:.4f}, more than twice the "
                f"noise floor {reference.floor:.4f}. Give more --steps or smaller λ.",
            )
    else:
        way = reference.untouched - reference.floor
        if way <= 0:
            return Recommendation(
                None,
                f"The metric cannot tell the domains apart: the untouched sources are {reference.untouched:.4g} away "
                f"from the target, other real samples {reference.floor:.4g}. Choose another by validation.best_by.",
            )
        covered = {trial: (reference.untouched - trial.distance) / way for trial in whole}
        if covered[best] < ENOUGH:
            return Recommendation(
                None,
                f"No setting is good enough: the best ({best}) covers {covered[best]:.0%} of the way from the sources "
                f"to the target, less than {ENOUGH:.0%}. Give more --steps or smaller λ.",
            )
        good = [trial for trial in whole if covered[trial] >= covered[best] - AS_GOOD]
        standard = (
            f"at most {AS_GOOD:.0%} of the way to the target less than the best, which covers {covered[best]:.0%}"
        )
    return _most_faithful(good, whole, len(trials), standard)


def _most_faithful(good: Sequence[Trial], whole: Sequence[Trial], count: int, standard: str) -> Recommendation:
    costs = [trial.cost for trial in good]
    alike = max(costs) - min(costs) <= SAME_COST * max(costs)
    if len(good) == count and count > 1 and alike:
        return Recommendation(
            None,
            f"All {count} settings are alike: each has {standard}, and their transport costs differ by at most "
            f"{SAME_COST:.0%}. Keep your own, or try values further apart or more --steps.",
        )
    # Of equal costs the larger λ, which holds on to the source the more.
    chosen = min(good, key=lambda trial: (trial.cost, -trial.transport_weight))
    reason = f"{chosen}: the lowest transport cost ({chosen.cost:.4g}) of the {len(good)} of {count} settings with "
    reason += f"{standard}."
    weights = sorted({trial.transport_weight for trial in whole})
    if len(weights) > 1 and chosen.transport_weight == weights[-1]:
        reason += " It is the largest λ that was tried: a larger one may do as well."
    elif len(weights) > 1 and chosen.transport_weight == weights[0]:
        reason += " It is the smallest λ that was tried: a smaller one may be closer to the target."
    return Recommendation(chosen, reason)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
