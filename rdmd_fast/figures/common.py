"""What the figures share: their options, the shipped configurations that they train, tables and CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..runtime import write_atomically

CONFIGS = Path(__file__).parents[2] / "configs"


class FigureOptions(NamedTuple):
    """Attributes: ``seeds`` trainings of each setting (seeds 0 ... N - 1), ``jobs`` points at a time (None: one for
    each GPU, or for each core without one), ``study`` a YAML file that replaces a figure's own study (None: its own).
    """

    seeds: int
    jobs: int | None
    study: str | None


def shipped_config(name: str) -> str:
    """Path of configs/NAME. Raises InputError where the package is used without its repository."""
    path = CONFIGS / name
    if not path.is_file():
        raise InputError(f"{path}: no such file; the figures train the repository's configs, run them from a clone")
    return str(path)


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write a CSV: a line of column names in the order in which rows first name them, None as an empty cell.

    Floats are written in full, so that reading them gives the same number. The file is there whole or not at all.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error over independent values; one value has no error."""
    values = np.asarray(values, dtype=np.float64)
    error = None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), error


def with_error(mean: float, error: float | None, digits: int = 4) -> str:
    """``mean ± error`` as the tables print it; without an error the mean alone."""
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} ± {error:.{digits}f}"
