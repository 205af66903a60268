"""``rdmd evaluate``: translated images against sources and targets; toy runs against closed forms and exact maps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.files import strict_json, write_atomically

EPILOG = """examples:
  rdmd evaluate --model runs/cats2dogs/export --source shards/cats/test --target shards/dogs/test \\
      --features inception-2015-12-05.pt --picture grid.png --out report.json
  rdmd evaluate --outputs out/cut out/unsb --source photos/cats --target photos/dogs --resolution 256 --features F.pt
  rdmd evaluate --model runs/digits_2to3/export --teacher runs/digits_teacher_3/export \\
      --source shards/digits/2/test --target shards/digits/3/test --judge shards/digits --label 3
  rdmd evaluate --run runs/toy/gaussian_to_gaussian

A TorchScript file is a program, and it is run: name only files whose origin you trust. docs/evaluation.md has the
definition of every column.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--run", metavar="DIR", help="a finished toy run: closed form, exact transport")
    add("--model", metavar="DIR", help="RUN/export or RUN/best of the rdmd stage")
    add("--outputs", nargs="+", metavar="FOLDER", help="translated images, named as their sources: a row each")
    add("--teacher", metavar="DIR", help="RUN/export of its teacher: adds the untrained generator")
    add(
        "--transport-weight",
        type=float,
        nargs="+",
        metavar="λ",
        help="of a generator of a range of λ: a row or table each",
    )
    add("--source", metavar="DIR", help="held-out source images, shards or a folder of files")
    add("--target", metavar="DIR", help="held-out target images, likewise")
    add("--features", metavar="FILE.pt", help="TorchScript feature network: adds FID and KID")
    add(
        "--features-input",
        choices=("auto", "uint8", "float"),
        default="auto",
        help="what it takes: uint8 0 to 255 or float [-1, 1] (auto: uint8 if its forward has return_features)",
    )
    add("--lpips", action="store_true", help="add LPIPS to the sources (package lpips)")
    add("--judge", metavar="DIR", help="labelled digit shards ROOT/<digit>/train|test: adds 3-NN and its features")
    add("--label", type=int, metavar="N", help="digit of the target domain")
    add("--count", type=int, metavar="N", help="images of each domain, drawn by --seed (all); points of a toy (2000)")
    add("--seed", type=int, metavar="S", help="of --count and of KID's subsets (0); of a toy's points (the run's)")
    add(
        "--resolution", type=int, metavar="N", help="side to which files are brought where no --model and no shards say"
    )
    add("--cache", metavar="DIR", help="where the target's features are kept ($XDG_CACHE_HOME/rdmd_fast/features)")
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--picture", metavar="FILE.png", help="sources, translations and targets, to write")
    add("--out", metavar="FILE.json", help="where the numbers go")


def run(arguments: argparse.Namespace) -> int:
    """Print a table and write the same numbers as JSON.

    Raises:
        InputError: missing options, exports or images.
    """
    if arguments.run:
        report = evaluate_toy_run(arguments)
    else:
        from rdmd_fast.commands.evaluate_images import evaluate_images

        report = evaluate_images(arguments)
    if arguments.out:
        write_atomically(Path(arguments.out), json.dumps(strict_json(report), indent=1) + "\n")
    return 0


TOY_OPTIONS = {"run", "transport_weight", "count", "seed", "picture", "out"}
TOY_COUNT = 2000


def evaluate_toy_run(arguments: argparse.Namespace) -> dict:
    """Measured against closed form and exact optimal transport, for the export of a toy run.

    Returns:
        The numbers of one λ; of several ones, those of each as ``rows``.
    """
    from rdmd_fast.config import load_config
    from rdmd_fast.data.toys import ToyDistribution
    from rdmd_fast.model_files.models import conditions, load_generator
    from rdmd_fast.monitoring.validation import ToyValidator

    _check_toy_options(arguments)
    run_dir = Path(arguments.run)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"--run {run_dir}: no run there (no config.yaml)")
    config = load_config(str(run_dir / "config.yaml"))
    if not (isinstance(config.data.source, ToyDistribution) and isinstance(config.data.target, ToyDistribution)):
        raise InputError(f"--run {run_dir}: not a toy run, evaluate images with --model, --source and --target")
    generator = load_generator(run_dir / "export")
    bounds = generator.config.weight_range
    weights = arguments.transport_weight or [bounds.middle if bounds else None]
    for weight in weights:
        conditions(generator.config, weight, 1)  # names a λ that it does not take ahead of any work
    options = config.validation.model_copy(update={"count": arguments.count or TOY_COUNT})
    seed = config.seed if arguments.seed is None else arguments.seed
    validator = ToyValidator(options, config.data.source, config.data.target, seed, config.rdmd)
    reports = [_toy_report(validator, generator, weight, chosen=bool(arguments.transport_weight)) for weight in weights]
    if arguments.picture:
        _toy_picture(validator, generator, weights, arguments.picture)
    return reports[0] if len(reports) == 1 else {"rows": reports}


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


@torch.no_grad()
def _toy_report(validator, generator, weight: float | None, chosen: bool) -> dict:
    """Numbers at one λ, printed as a table; None for a generator that takes none."""
    report = validator.measure(lambda x: generator(x, weight), weight)
    if weight is not None:
        print(f"λ = {weight:g}" + ("" if chosen else ", the middle of its range; choose by --transport-weight"))
        report = {"transport_weight": weight} | report
    print("\n".join(toy_table(report)))
    return report


@torch.no_grad()
def _toy_picture(validator, generator, weights: list[float | None], path: str) -> None:
    from rdmd_fast.monitoring.drawing import toy_picture
    from rdmd_fast.transport_weight import output_name

    outputs = {output_name(weight): generator(validator.source, weight) for weight in weights}
    toy_picture(validator.source, outputs, validator.target, path)


def toy_table(report: dict[str, float]) -> list[str]:
    """Lines of a report: every measured number with what it should be beside it."""
    samples = f"{report['samples']} points"
    lines = [
        f"squared W2 to the target   {report['squared_w2']:.4f}   noise floor at {samples} {report['noise_floor']:.4f}",
        f"transport cost             {report['transport_cost']:.4f}   exact transport onto the outputs "
        f"{report['ot_cost_to_output']:.4f}, onto the target {report['ot_cost']:.4f}",
        f"monotonicity violations    {report['monotonicity_violations']:.5f} of pairs   optimal maps have 0",
    ]
    if "scale" in report:
        error = report["scale"] / np.mean([report["axis_scale_0_expected"], report["axis_scale_1_expected"]]) - 1
        lines += [
            f"scale along the axes       {report['axis_scale_0']:.4f}, {report['axis_scale_1']:.4f}   closed form "
            f"{report['axis_scale_0_expected']:.4f}, {report['axis_scale_1_expected']:.4f}   ({100 * error:+.2f} %)",
            f"rotation                   {report['rotation_degrees']:.3f}°   closed form 0° (free at λ = 0)",
        ]
    return lines
