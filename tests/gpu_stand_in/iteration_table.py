"""What one iteration of training asks of a GPU, by place: iteration_counts.csv.

    python -m tests.gpu_stand_in.iteration_table [CASE …]

measures cases (all, or those named, such as ``rdmd-0-bf16``) and writes their columns. A case is kind, ZeRO stage and
dtype; a row is what is counted (waits of the host, copies, launches) and the function that asked for it.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu_stand_in.log import KINDS, ROOT

FILE = Path(__file__).with_name("iteration_counts.csv")
CASES = [
    f"{kind}-{stage}-{dtype}"
    for kind in ("rdmd", "teacher")
    for stage in range(4)
    for dtype in ("fp32", "bf16", "fp16")
]
JOBS = 2
Counts = dict[tuple[str, str], int]  # by (what, place)


def arguments_of(case: str) -> list[str]:
    kind, stage, dtype = case.split("-")
    return ["-m", "tests.gpu_stand_in.iteration", "--kind", kind, "--stage", stage, "--dtype", dtype]


def counts_of(said: str) -> Counts:
    """Counts in what the iteration's process wrote."""
    result = json.loads(said.splitlines()[-1])
    return {(what, place): count for what in KINDS for place, count in result[what].items()}


def read_table() -> dict[str, Counts]:
    """Counts by case."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = [name for name in rows[0] if name not in ("what", "place")]
    return {case: {(row["what"], row["place"]): int(row[case]) for row in rows if row[case] != "0"} for case in cases}


def write_table(table: dict[str, Counts]) -> None:
    rows = sorted({row for counts in table.values() for row in counts}, key=lambda row: (KINDS.index(row[0]), row[1]))
    cases = [case for case in CASES if case in table]
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "place", *cases])
        for row in rows:
            writer.writerow([*row, *(table[case].get(row, 0) for case in cases)])


def measure(case: str) -> Counts:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments_of(case)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return counts_of(done.stdout)


def main() -> None:
    table, cases = read_table() if FILE.exists() else {}, sys.argv[1:] or CASES
    with ThreadPoolExecutor(JOBS) as pool:
        for case, counts in zip(cases, pool.map(measure, cases), strict=True):
            table[case] = counts
            write_table(table)
            totals = {what: sum(count for (its, _), count in counts.items() if its == what) for what in KINDS}
            print(case, totals, flush=True)


if __name__ == "__main__":
    main()
