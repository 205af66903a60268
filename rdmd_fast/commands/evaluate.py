"""``rdmd evaluate``: translated images against sources and targets; toy runs against closed forms and exact maps."""

import argparse
import json
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.files import strict_json, write_atomically
from rdmd_fast.paths import data_path, path_to_read, path_to_write

EPILOG = """examples:
  rdmd evaluate --model runs/cats2dogs/export --source shards/cats/test --target shards/dogs/test \\
      --features inception-2015-12-05.pt --picture grid.png --out report.json
  rdmd evaluate --outputs out/cut out/unsb --source photos/cats --target photos/dogs --resolution 256 --features F.pt
  rdmd evaluate --model runs/digits_2to3/export --teacher runs/digits_teacher_3/export \\
      --source shards/digits/2/test --target shards/digits/3/test --judge shards/digits --label 3
  rdmd evaluate --model runs/google2twitter/export --source shards/google/test --target shards/twitter/test \\
      --truth shards/twitter/test
  rdmd evaluate --run runs/toy/gaussian_to_gaussian

A TorchScript file is a program, and it is run: name only files whose origin you trust. docs/evaluation.md has the
definition of every column.
"""
TOY_OPTIONS = {"run", "transport_weight", "count", "seed", "picture", "out"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--run", type=path_to_read, metavar="DIR", help="a finished toy run: closed form, exact transport")
    add("--model", type=path_to_read, metavar="DIR", help="RUN/export or RUN/best of the rdmd stage")
    add(
        "--outputs",
        type=data_path,
        nargs="+",
        metavar="FOLDER",
        help="translated images, named as their sources: a row each",
    )
    add("--teacher", type=path_to_read, metavar="DIR", help="RUN/export of its teacher: adds the untrained generator")
    weight = {"type": float, "nargs": "+", "metavar": "λ"}
    add("--transport-weight", **weight, help="of a generator of a range of λ: a row or table each")
    add("--source", type=data_path, metavar="DIR", help="held-out source images, shards or a folder of files")
    add("--target", type=data_path, metavar="DIR", help="held-out target images, likewise")
    add(
        "--truth",
        type=data_path,
        metavar="DIR",
        help="true translations, named as their sources, where they are known: adds distances to them",
    )
    add("--features", type=path_to_read, metavar="FILE.pt", help="TorchScript feature network: adds FID and KID")
    add(
        "--features-input",
        choices=("auto", "uint8", "float"),
        default="auto",
        help="what it takes: uint8 0 to 255 or float [-1, 1] (auto: uint8 if its forward has return_features)",
    )
    add("--lpips", action="store_true", help="add LPIPS to the sources (package lpips)")
    add(
        "--judge",
        type=path_to_read,
        metavar="DIR",
        help="labelled digit shards ROOT/<digit>/train|test: adds 3-NN and its features",
    )
    add("--label", type=int, metavar="N", help="digit of the target domain")
    add("--count", type=int, metavar="N", help="images of each domain, drawn by --seed (all); points of a toy (2000)")
    add("--seed", type=int, metavar="S", help="of --count and of KID's subsets (0); of a toy's points (the run's)")
    add(
        "--resolution", type=int, metavar="N", help="side to which files are brought where no --model and no shards say"
    )
    add(
        "--cache",
        type=path_to_write,
        metavar="DIR",
        help="where the target's features are kept ($XDG_CACHE_HOME/rdmd_fast/features)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--picture", type=path_to_write, metavar="FILE.png", help="sources, translations and targets, to write")
    add("--out", type=path_to_write, metavar="FILE.json", help="where the numbers go")


def run(arguments: argparse.Namespace) -> int:
    """Print a table and write the same numbers as JSON.

    Raises:
        InputError: missing options, exports or images.
    """
    if arguments.run:
        _check_toy_options(arguments)
        from rdmd_fast.commands.evaluate_toys import evaluate_toy_run

        report = evaluate_toy_run(arguments)
    else:
        _check_image_options(arguments)
        from rdmd_fast.commands.evaluate_images import evaluate_images

        report = evaluate_images(arguments)
    if arguments.out:
        write_atomically(Path(arguments.out), json.dumps(strict_json(report), indent=1) + "\n")
    return 0


def _check_toy_options(arguments: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        if name not in TOY_OPTIONS and getattr(arguments, name) != default:
            raise InputError(
                f"--{name.replace('_', '-')}: is not for --run, which measures a toy: leave one of them out"
            )
    if arguments.count is not None and arguments.count < 2:
        raise InputError(f"--count {arguments.count}: must be at least 2")


def _check_image_options(arguments: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("source", "target") if getattr(arguments, name) is None]
    if arguments.model is None and not arguments.outputs:
        missing.insert(0, "--model or --outputs")
    if missing:
        raise InputError(f"missing {', '.join(missing)}: see rdmd evaluate --help")
    for option, needed in (("label", "judge"), ("teacher", "model"), ("transport_weight", "model")):
        if getattr(arguments, option) is not None and getattr(arguments, needed) is None:
            raise InputError(f"--{option.replace('_', '-')}: says nothing without --{needed}, add it or leave it out")
    for option, least in (("count", 2), ("batch_size", 1), ("resolution", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise InputError(f"--{option.replace('_', '-')} {value}: must be at least {least}")
