"""The table of a sweep and its recommendation: printed, as sweep.csv and as sweep.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from rdmd_fast.files import strict_json, write_atomically
from rdmd_fast.metrics.tables import format_table, write_rows
from rdmd_fast.studies.recommendation import Recommendation
from rdmd_fast.studies.sweep_jobs import GridSetting

SETTING = ("transport_weight", "generator_sigma", "steps")


def row_of(setting: GridSetting, result: dict) -> dict:
    """Make a line of the table."""
    values = setting.transport_weight, setting.generator_sigma, setting.config.train.steps
    seconds = {name: result[name] for name in ("training_seconds", "seconds")}
    return dict(zip(SETTING, values, strict=True)) | (result["validation"] or {}) | seconds


def printed(rows: Sequence[dict]) -> list[dict]:
    """Choose what is printed: without the numbers that all settings share, as the size of the held-out set."""
    telling = [key for key in rows[0] if key in SETTING or len({row[key] for row in rows}) > 1 or len(rows) == 1]
    return [{key: "-" if row[key] is None else row[key] for key in telling} for row in rows]


def write_tables(out: Path, rows: list[dict], references: dict, recommendation: Recommendation) -> None:
    """Print the table and the recommendation; sweep.csv and sweep.json hold the same."""
    print(format_table(printed(rows)))
    if references.get("untouched") is not None:
        print(
            f"{references['best_by']} of the untouched sources {references['untouched']:.4g}, of real samples from "
            f"other real ones {references['floor']:.4g}"
        )
    chosen = recommendation.trial
    print(f"recommended: {recommendation.reason}" if chosen else recommendation.reason)
    if chosen:
        print(f"  rdmd.transport_weight={chosen.transport_weight:g} rdmd.generator_sigma={chosen.generator_sigma:g}")
    write_rows(out / "sweep.csv", rows)
    weight, sigma = (chosen.transport_weight, chosen.generator_sigma) if chosen else (None, None)
    advice = {"transport_weight": weight, "generator_sigma": sigma, "reason": recommendation.reason}
    report = {"rows": rows, "references": references, "recommendation": advice}
    write_atomically(out / "sweep.json", json.dumps(strict_json(report), indent=1) + "\n")
