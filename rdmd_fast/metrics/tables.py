"""What the figures share: their options, the shipped configurations that they train, tables and CSV files."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdmd_fast.files import write_atomically


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


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_table(rows: list[dict]) -> str:
    """Aligned plain text, a line of column names and one a row: text left, numbers right, gaps as ``-``.

    Columns come in the order in which the rows first name them; floats have four significant digits.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(column, "-")) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    is_text = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    aligned = (
        [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
