"""``rdmd report``: one page of HTML about one or several runs, to look at and to mail."""

import argparse
import os
from pathlib import Path

from rdmd_fast.data.sample_names import refuse_inside
from rdmd_fast.errors import InputError
from rdmd_fast.files import write_atomically
from rdmd_fast.monitoring.report import page
from rdmd_fast.monitoring.run_record import read_run
from rdmd_fast.paths import path_to_read, path_to_write

EPILOG = """examples:
  rdmd report runs/digits_2to3 --out report.html
  rdmd report runs/lambda_0.1 runs/lambda_0.6 --out compared.html

The page is one file that loads nothing from elsewhere. A run that trains or was killed is shown as far as it came.
"""
_DATA = ("source", "target", "source_holdout", "target_holdout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("runs", nargs="+", type=path_to_read, metavar="RUN", help="folder of a run (run_dir)")
    parser.add_argument("--out", type=path_to_write, required=True, metavar="FILE.html", help="the page to write")


def run(arguments: argparse.Namespace) -> int:
    """Read the runs and write their page.

    Raises:
        InputError: a folder is no run or given twice, or ``--out`` is a folder or lies among data.
    """
    folders = [Path(each) for each in arguments.runs]
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise InputError(f"{folder}: given twice, name each run once")
    if os.path.isdir(arguments.out):
        raise InputError(
            f"--out {arguments.out}: is a folder, name a file in it, as {Path(arguments.out) / 'report.html'}"
        )
    records = [read_run(folder) for folder in folders]
    for record in records:
        data = record.config.get("data")
        sets = [(role, data.get(role)) for role in _DATA] if isinstance(data, dict) else []
        pieces = [(role, piece) for role, each in sets for piece in (each if isinstance(each, list) else [each])]
        named = [(f"data.{role}", path) for role, each in pieces if isinstance(each, str) for path in each.split("::")]
        refuse_inside(arguments.out, "--out", [*named, ("the checkpoints", record.folder / "checkpoints")])
    write_atomically(arguments.out, page(records))
    print(f"{arguments.out}: {os.path.getsize(arguments.out) / 1e6:.2f} MB")
    return 0
