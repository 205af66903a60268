"""Launches and bytes of a network's training pass, ours and plain, as written and under torch.compile.

    python -m tests.gpu_stand_in.network_counts [--network songunet64 …] [--form ours] [--compile] [--top 20] [--table]

Both forms are ``benchmarks/networks.py``'s. Counted on the stand-in, which leaves products and kernels uncomputed:
launches, and the bytes that those outside of convolutions and matrix products read and write, each tensor whole.
``--table`` writes what it counts to network_counts.csv, which tests compare.
"""

from __future__ import annotations

import argparse
import csv
import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.gpu_stand_in import install

NETWORKS = ("songunet64", "adm64", "digits")
PRODUCTS = ("aten::convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
FORMS = ("ours", "plain")
FILE = Path(__file__).with_name("network_counts.csv")
KEY, COUNTED = ("network", "dtype", "form", "run"), ("launches", "bytes")
COMPILED = {False: "written", True: "compiled"}


def count(step, top: int = 0) -> dict:
    """What one training pass asks; ``top`` adds the operations with most bytes outside of products."""
    from tests.gpu_stand_in.device import recording
    from tests.gpu_stand_in.log import BYTE, LAUNCH, WAIT

    with recording() as log:
        step()
    launches, sizes = Counter(), Counter()
    for (kind, operation, _), number in log.operations.items():
        if kind == LAUNCH:
            launches[operation] += number
        elif kind == BYTE and not operation.startswith(PRODUCTS):
            sizes[operation] += number
    found = {"launches": launches.total(), "bytes": sizes.total(), "waits": log.total(WAIT)}
    if top:
        found["top"] = {name: [size, launches[name]] for name, size in sizes.most_common(top)}
        found["most launched"] = dict(launches.most_common(top))
    return found


def measure(network: str, batch: int, dtype: str, forms: Collection[str], compile_: bool, top: int) -> Iterator[dict]:
    """A row for each form and way of running it; bytes are an image's."""
    import torch

    from benchmarks.networks import steps
    from tests.gpu_stand_in.device import without_values

    with without_values():
        for name, step in zip(FORMS, steps(network, batch, dtype), strict=True):
            if name not in forms:
                continue
            for compiled in (False, True) if compile_ else (False,):
                if compiled:
                    torch._dynamo.reset()
                    step.call = torch.compile(step.call)
                step()  # compiles what is compiled once
                found = count(step, top)
                found["bytes"] //= batch
                yield {"network": network, "dtype": dtype, "form": name, "run": COMPILED[compiled], **found}


def read_table() -> dict[tuple[str, ...], dict[str, int]]:
    """Launches and bytes by network, dtype, form and way of running it."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[name] for name in KEY): {name: int(row[name]) for name in COUNTED} for row in rows}


def write_table(rows: list[dict]) -> None:
    """Put the rows in the place of those of the same key."""
    table = read_table() if FILE.exists() else {}
    table |= {tuple(row[name] for name in KEY): {name: row[name] for name in COUNTED} for row in rows}
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, *COUNTED])
        writer.writerows([*key, *table[key].values()] for key in sorted(table))


def format_row(row: dict) -> str:
    line = (
        f"{row['network']:<11}{row['dtype']:<5}{row['form']:<6}{row['run']:<9}{row['launches']:6} launches"
        f"{row['bytes'] / 2**20:9.1f} MiB an image outside products"
    )
    details = [f"  {size / 2**20:9.1f} MiB {number:5} {name}" for name, (size, number) in row.get("top", {}).items()]
    return "\n".join(
        [line, *details, *(f"  {number:5} {name}" for name, number in row.get("most launched", {}).items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="network_counts")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["songunet64"], help="(songunet64)")
    parser.add_argument("--batch", type=int, default=2, help="images (2)")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["bf16"], help="(bf16)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="(both)")
    parser.add_argument("--compile", action="store_true", help="count both under torch.compile as well; takes minutes")
    parser.add_argument("--top", type=int, default=0, help="show so many operations (0)")
    parser.add_argument("--table", action="store_true", help="write network_counts.csv")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    install()
    rows = []
    for network in arguments.network:
        for dtype in arguments.dtype:
            for row in measure(network, arguments.batch, dtype, arguments.form, arguments.compile, arguments.top):
                rows.append(row)
                print(format_row(row), flush=True)
    if arguments.table:
        write_table(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
