"""``rdmd figures``: the paper's figures and their tables, made from runs; what is done is not done again."""

import argparse
import importlib
import importlib.util
import time
from pathlib import Path

from rdmd_fast.commands import pack
from rdmd_fast.errors import InputError
from rdmd_fast.paths import path_to_read, path_to_write
from rdmd_fast.studies.options import FigureOptions

FIGURES = {"surface": "surface", "toys": "toys", "tradeoff": "tradeoff", "lambda": "conditional"}
"""Name of each figure and its module, which has ``make(out, options) -> dict``."""
WITH_STUDY = ("tradeoff", "lambda")

EPILOG = """figures:
  surface    the loss over (r, α) without and with a transport cost, closed form beside Monte Carlo (Figure 2)
  toys       maps of a Gaussian to 8 Gaussians and a swiss roll by λ, beside exact transport (Figure 3)
  tradeoff   quality against faithfulness of RDMD and the baselines (Figure 4)
  lambda     one generator for every λ beside generators trained at one λ each

examples:
  rdmd figures --out figures
  rdmd figures --out figures --only surface toys --seeds 1
  rdmd figures --out figures --only tradeoff --study my_domains.yaml

OUT/NAME.png and OUT/NAME.csv are written for each, and its table is printed. Trainings lie in OUT/points: the same
command goes on where it was stopped, and trains nothing that is there. The trainings are this repository's configs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--out", type=path_to_write, required=True, metavar="DIR", help="where pictures, tables and points go"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", choices=FIGURES, help="these figures alone (default: all four)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="trainings of each setting, seeds 0 to N - 1 (default: 3)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trainings at a time (default: one for each GPU, or for each core)"
    )
    parser.add_argument(
        "--study",
        type=path_to_read,
        metavar="FILE.yaml",
        help="tradeoff, lambda: your own models and data in place of the digits",
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the chosen figures, in the order of the list above.

    Raises:
        InputError: bad options, a missing package, or a training that failed.
    """
    chosen = [name for name in FIGURES if not arguments.only or name in arguments.only]
    if arguments.seeds < 1:
        raise InputError(f"--seeds {arguments.seeds}: must be at least 1")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: must be at least 1")
    if arguments.study is not None and not set(chosen) & set(WITH_STUDY):
        raise InputError(f"--study: does nothing for {' and '.join(chosen)}, it is for {' and '.join(WITH_STUDY)}")
    modules = {name: _module(name) for name in chosen}  # all before the first, which may take long
    out = Path(arguments.out)
    options = FigureOptions(arguments.seeds, arguments.jobs, arguments.study, run_pack)
    for name, module in modules.items():
        start = time.perf_counter()
        module.make(out, options)
        print(f"{name}: {out / name}.png and .csv, {time.perf_counter() - start:.0f} s\n", flush=True)
    return 0


def run_pack(words: list[str]) -> None:
    """``rdmd pack`` with the arguments ``words``, as a study file has them."""
    parser = argparse.ArgumentParser(prog="study: pack")
    pack.add_arguments(parser)
    pack.run(parser.parse_args(words))


def _module(name: str):
    module = f"rdmd_fast.figures.{FIGURES[name]}"
    if importlib.util.find_spec(module) is None:
        raise InputError(f"--only {name}: this version cannot make that figure, choose others")
    return importlib.import_module(module)
