"""One RDMD iteration, a generator and a fake-score update, ours against plain PyTorch, in one run.

    python -m benchmarks.step --case digits|toy|songunet64|adm64 [--dtype fp32 bf16] [--stage 0] [--compile MODE]
                              [--json FILE]                 # a list, an entry a dtype, and a picture beside it
    python -m benchmarks.step --draw PICTURE FILE [FILE …]  # one picture of several

Ours is what ``train.py`` does in an iteration (data, engines, EMA, telemetry); the plain formulation is that of
``benchmarks.plain_step``, on the same weights, batch and number of updates. Their losses are compared first. Then
iterations of all sides are timed in turn and the best of each counts, since machines are shared. MFU is of the plain
formulation's FLOPs without its second rollout, against a matrix product measured in the same run, so that all sides are
credited with the same work. Bytes outside matrix products and convolutions are counted with the fused kernels as on a
GPU (``benchmarks.traffic``). Memory is that of a process of its own for each side: its height above what it held once
everything was imported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.networks import CUDA, DTYPES, matmul_peak
from benchmarks.step_cases import BATCHES
from benchmarks.step_measurements import best_times, counts, iteration_flops, peak_memory, phases, print_peak, processor
from benchmarks.step_sides import Plain, build_sides
from benchmarks.step_tables import OUR_SIDES, PLAIN_SIDES, draw, print_table, record
from benchmarks.timing import copy_bandwidth

BURSTS = {"toy": 20, "digits": 5, "songunet64": 1, "adm64": 1}


def measure(dtype: str, arguments: argparse.Namespace, folder: Path, plain_fp32: Plain | None) -> tuple[dict, Plain]:
    """Measure all sides: one entry of the results, and the plain formulation in fp32."""
    case = arguments.case
    names = [*OUR_SIDES, *PLAIN_SIDES] if arguments.compile else ["ours", "plain", "plain_fp32"]
    if dtype == "fp32":
        names.remove("plain_fp32")  # it is plain
    # Ahead of all else: other processes need the memory that the sides take here.
    peaks = {side: peak_memory(side, "fp32" if side == "plain_fp32" else dtype, arguments) for side in names}
    torch._dynamo.reset()  # operations that were counted below are not compiled again
    sides, losses = build_sides(dtype, arguments, folder, plain_fp32)
    ours, plain, plain_fp32 = sides["ours"], sides["plain"], sides["plain_fp32"]
    if plain_fp32 is plain:
        del sides["plain_fp32"]
    times = best_times({side: run.iteration for side, run in sides.items()}, arguments.rounds, BURSTS[case])
    parts = phases(ours)  # before anything is counted: a dispatch mode ends compilation
    flops, counted = iteration_flops(plain_fp32), counts(sides)
    facts = {
        "case": case, "device": torch.cuda.get_device_name() if CUDA else processor(), "dtype": dtype,
        "batch": ours.config.train.global_batch_size, "stage": arguments.stage, "compile": arguments.compile,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "losses": losses,
    }  # fmt: skip
    matmul_rates = {name: matmul_peak(name) for name in DTYPES}
    rows = {side: {"seconds": times[side], "peak_bytes": peaks[side], **counted.get(side, {})} for side in times}
    entry = record(facts, rows, flops, matmul_rates, copy_bandwidth()) | {"phases": parts}
    for side in OUR_SIDES:
        if side in sides:
            sides[side].experiment.close()
    return entry, plain_fp32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", choices=BATCHES, default="digits", help="which networks (digits)")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="(fp32 bf16)")
    add("--batch", type=int, help="samples of an iteration (by the case)")
    add("--stage", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage of ours (0)")
    add("--rounds", type=int, default=20 if CUDA else 7, help="timed rounds (7; on a GPU 20)")
    add(
        "--compile", choices=("default", "reduce-overhead", "max-autotune"),
        help="both sides under torch.compile in this mode, too; on a GPU the latter two modes use CUDA graphs",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write the results there, and a picture beside it")
    add("--draw", nargs="+", metavar=("PICTURE", "FILE"), help="only draw the results of FILEs that --json wrote")
    add("--memory-of", choices=("ours", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak(arguments)
        return 0
    if arguments.draw:
        picture, *files = map(Path, arguments.draw)
        draw([entry for file in files for entry in json.loads(file.read_text())], picture)
        return 0
    entries, plain_fp32 = [], None
    for dtype in arguments.dtype:
        with tempfile.TemporaryDirectory(prefix="rdmd-step-") as folder:
            entry, plain_fp32 = measure(dtype, arguments, Path(folder), plain_fp32)
        entries.append(entry)
        print_table([entry])
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(entries, indent=1) + "\n")
            draw(entries, Path(arguments.json).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
