"""One RDMD iteration, a generator and a fake-score update, ours against plain PyTorch, in one run.

    python -m benchmarks.step --case digits|toy|songunet64|adm64 [--dtype fp32 bf16] [--stage 0] [--compile MODE]
                              [--sides ours plain …] [--set key=value …]
                              [--fastgen CHECKOUT]          # ours beside the step of that checkout of NVlabs/FastGen
                              [--json FILE]                 # a list, an entry a dtype, and a picture beside it
    python -m benchmarks.step --draw PICTURE FILE [FILE …]  # one picture of several

Ours is what ``train.py`` does in an iteration (data, engines, EMA, telemetry); the plain formulation is that of
``benchmarks.plain_step``, on the same weights, batch and number of updates. Their losses are compared first; of
FastGen, whose loss is another, the networks' outputs (``benchmarks.fastgen_side`` says what its side does). Then
iterations of all sides are timed in turn and the best of each counts, since machines are shared. MFU is of the plain
formulation's FLOPs without its second rollout, against a matrix product measured in the same run, so that all sides are
credited with the same work. Bytes outside matrix products and convolutions are counted with the fused kernels as on a
GPU (``benchmarks.traffic``). Memory is that of a process of its own for each side: its height above what it held once
everything was imported. On a GPU it is the allocator's, beside what ``--dry-run`` predicts; there each compiled side is
built when those before it have been timed, and FILE is written after each. With --fastgen there are no phases and no
picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.fastgen_side import commit_of, load_fastgen
from benchmarks.networks import CUDA, DTYPES, matmul_peak
from benchmarks.step_cases import BATCHES
from benchmarks.step_measurements import (
    allocated_peak,
    best_times,
    counts,
    iteration_flops,
    peak_memory,
    phases,
    print_peak,
    processor,
)
from benchmarks.step_sides import build_side
from benchmarks.step_tables import OTHER_SIDES, OUR_SIDES, draw, print_table, record
from benchmarks.timing import LARGE, copy_bandwidth
from rdmd_fast.errors import InputError
from rdmd_fast.planning.dry_run import predicted_bytes
from rdmd_fast.planning.planned_networks import planned_networks

SIDES = ("ours", "plain", "plain_fp32", "fastgen", "ours_compiled", "plain_compiled")
BURSTS = {"toy": 20, "digits": 5, "songunet32": 1, "songunet64": 1, "adm64": 1}


def measure(dtype: str, arguments: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Measure the sides: the entry of the results, each time that it holds more of them."""
    wanted = set(arguments.sides) - ({"plain_fp32"} if dtype == "fp32" else set())  # that is plain
    names = [name for name in SIDES if name in wanted]
    # Ahead of all else: other processes need the memory that the sides take here.
    peaks = (
        {}
        if CUDA
        else {side: peak_memory(side, dtype if side != "plain_fp32" else "fp32", arguments) for side in names}
    )
    torch._dynamo.reset()  # operations that were counted below are not compiled again
    sides, losses, rows, entry = {}, {}, {}, {}
    for group in groups(names):
        for name in group:
            before = torch.cuda.memory_allocated() if CUDA else 0
            if compared := build_side(name, sides, dtype, arguments, folder):
                losses["ours_compiled" if name.endswith("_compiled") else "ours"] = compared
            if CUDA:
                peaks[name] = allocated_peak(sides[name], before)
        built, burst = {name: sides[name] for name in group}, BURSTS[arguments.case] if LARGE or not CUDA else 1
        times = best_times({name: side.iteration for name, side in built.items()}, arguments.rounds, burst)
        if group[0] in OUR_SIDES and "phases" not in entry and not arguments.fastgen:
            entry["phases"] = phases(built[group[0]])  # before anything is counted: a dispatch mode ends compilation
        counted = counts(built)
        rows |= {name: {**times[name], "peak_bytes": peaks[name], **counted.get(name, {})} for name in group}
        entry |= record(facts(dtype, arguments, sides, losses), rows, *floors(arguments.case, sides))
        yield entry
    for name in OUR_SIDES:
        if name in sides:
            sides[name].experiment.close()


def groups(names: list[str]) -> list[list[str]]:
    """Tell which sides take turns: all where machines are shared; on a GPU the written ones, then each compiled one."""
    written = [name for name in names if not name.endswith("_compiled")]
    return [written, *([name] for name in names if name not in written)] if CUDA else [names]


def facts(dtype: str, arguments: argparse.Namespace, sides: dict, losses: dict) -> dict:
    """What an entry says besides its numbers of sides."""
    config, world = next((side.config, side.world) for name, side in sides.items() if name in OUR_SIDES)
    predicted = {"predicted_bytes": predicted_bytes(config, planned_networks(config), world)} if CUDA else {}
    return {
        "case": arguments.case, "device": torch.cuda.get_device_name() if CUDA else processor(), "dtype": dtype,
        "batch": config.train.global_batch_size, "stage": arguments.stage, "compile": arguments.compile,
        "set": arguments.set, "fake_updates": config.rdmd.fake_updates, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "losses": losses, **predicted,
        **({"fastgen_commit": commit_of(arguments.fastgen)} if "fastgen" in sides else {}),
    }  # fmt: skip


def floors(case: str, sides: dict) -> tuple[float, dict[str, float], float]:
    """Give FLOPs of an iteration, and what the machine reaches: FLOP/s of products by dtype, bytes/s of copies."""
    flops = iteration_flops(case, next(side.config for name, side in sides.items() if name in OUR_SIDES))
    return flops, {name: matmul_peak(name) for name in DTYPES}, copy_bandwidth()


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
    add("--sides", nargs="+", choices=(*OUR_SIDES, *OTHER_SIDES), help="(all; compiled ones with --compile)")
    add("--fastgen", metavar="CHECKOUT", help="folder of NVlabs/FastGen: sides are ours and its own")
    add(
        "--set",
        nargs="*",
        default=[],
        metavar="key=value",
        help="options of the run that is ours, and of the plain one",
    )
    add("--json", metavar="FILE", help="write the results there, and a picture beside it")
    add("--draw", nargs="+", metavar=("PICTURE", "FILE"), help="only draw the results of FILEs that --json wrote")
    add("--memory-of", choices=("ours", "plain", "fastgen"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fastgen:
        if arguments.case == "toy":
            parser.error("--fastgen: it has no networks for points, choose a --case of images")
        try:
            load_fastgen(arguments.fastgen)
            arguments.fastgen = str(Path(arguments.fastgen).resolve())  # processes that measure memory run elsewhere
        except InputError as error:
            parser.error(str(error))
    if arguments.memory_of:
        print_peak(arguments)
        return 0
    if arguments.draw:
        picture, *files = map(Path, arguments.draw)
        draw([entry for file in files for entry in json.loads(file.read_text())], picture)
        return 0
    if arguments.sides is None and arguments.fastgen:
        arguments.sides = ["ours", "fastgen"]
    elif arguments.sides is None:
        arguments.sides = [
            side for side in SIDES if side != "fastgen" and (arguments.compile or not side.endswith("_compiled"))
        ]
    elif "ours" not in {side.removesuffix("_compiled") for side in arguments.sides}:
        parser.error("--sides: without ours or ours_compiled there is no configuration to run")
    elif "fastgen" in arguments.sides and not arguments.fastgen:
        parser.error("--sides fastgen: name a checkout of NVlabs/FastGen with --fastgen")
    entries = []
    for dtype in arguments.dtype:
        with tempfile.TemporaryDirectory(prefix="rdmd-step-") as folder:
            for entry in measure(dtype, arguments, Path(folder)):
                keep([*entries, entry], arguments.json)
        entries.append(entry)
        print_table([entry])
    if arguments.json and all("phases" in entry for entry in entries):
        draw(entries, Path(arguments.json).with_suffix(".png"))
    return 0


def keep(entries: list[dict], file: str | None) -> None:
    if file:
        Path(file).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
