"""A table and a picture of benchmark results.

    python -m benchmarks.report FILE.json [--out PICTURE.png]

FILE.json is what ``pytest benchmarks/test_kernels.py --rows FILE.json`` wrote. The picture shows bandwidth against
size, one panel an operation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

IMPLEMENTATIONS = ("ours", "eager", "compile")


def load_rows(file: Path) -> list[dict]:
    """One dict a measurement: extra_info of the benchmark and its median in microseconds.

    Raises:
        ValueError: the file holds no results of these benchmarks.
    """
    try:
        benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        ours = [benchmark for benchmark in benchmarks if "operation" in benchmark["extra_info"]]
        rows = [{**benchmark["extra_info"], "us": benchmark["stats"]["median"] * 1e6} for benchmark in ours]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no pytest-benchmark result: {error!r}") from error
    if not rows:
        raise ValueError(f"{file} holds no results of benchmarks/test_kernels.py")
    return rows


def by_case(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """Measurements by (operation, case), then by implementation."""
    cases = defaultdict(dict)
    for row in rows:
        cases[row["operation"], row["case"]][row["implementation"]] = row
    return cases


def print_table(rows: list[dict]) -> None:
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, copy {rows[0]['copy_GBps']:.0f} GB/s; microseconds (median)")
    heading = " ".join(f"{name:>10}" for name in IMPLEMENTATIONS)
    print(f"{'operation':25} {'case':28} {'MB':>8} {heading} {'GB/s':>7} {'% copy':>7} {'x eager':>8} {'x compile':>9}")
    for (operation, case), measured in by_case(rows).items():
        ours = measured.get("ours")
        if ours is None:
            continue
        times = " ".join(f"{measured[n]['us']:>10.1f}" if n in measured else f"{'-':>10}" for n in IMPLEMENTATIONS)
        ratios = [f"{measured[n]['us'] / ours['us']:.2f}" if n in measured else "-" for n in ("eager", "compile")]
        print(
            f"{operation:25} {case:28} {ours['bytes'] / 1e6:>8.2f} {times} {ours['GBps']:>7.1f} "
            f"{100 * ours['GBps'] / ours['copy_GBps']:>7.1f} {ratios[0]:>8} {ratios[1]:>9}"
        )


def draw(rows: list[dict], file: Path) -> None:
    """Bandwidth against size, one panel an operation, with the copy bandwidth as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = list(dict.fromkeys(row["operation"] for row in rows))
    columns = min(3, len(operations))
    lines = -(-len(operations) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 3.3 * lines), squeeze=False, sharey=True)
    for axis in axes.flat[len(operations) :]:
        axis.set_visible(False)
    for axis, operation in zip(axes.flat, operations, strict=False):
        for implementation in IMPLEMENTATIONS:
            chosen = [r for r in rows if r["operation"] == operation and r["implementation"] == implementation]
            chosen.sort(key=lambda row: row["bytes"])
            if chosen:
                sizes = [row["bytes"] / 1e6 for row in chosen]
                axis.plot(sizes, [row["GBps"] for row in chosen], "o-", markersize=4, label=implementation)
        axis.axhline(rows[0]["copy_GBps"], color="grey", linestyle="--", linewidth=1, label="copy")
        axis.set(xscale="log", yscale="log", title=operation, xlabel="bytes it has to move, MB")
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel("GB/s")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--out", type=Path, help="picture to write (default: FILE.png beside FILE.json)")
    options = parser.parse_args(arguments)
    try:
        rows = load_rows(options.file)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    picture = options.out or options.file.with_suffix(".png")
    draw(rows, picture)
    print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
