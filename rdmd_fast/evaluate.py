"""``rdmd evaluate``: a digit generator beside its baselines, or a toy run beside closed form and exact transport."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from .errors import InputError
from .points import strict_json
from .runtime import write_atomically

EPILOG = """examples:
  rdmd evaluate --model runs/digits_2to3/export --teacher runs/digits_teacher_3/export \\
      --source shards/digits/2/test --target shards/digits/3/test --judge shards/digits --label 3 --out report.json
  rdmd evaluate --run runs/toy/gaussian_to_gaussian
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--run", metavar="DIR", help="a finished toy run: closed form, exact transport, picture")
    parser.add_argument("--model", metavar="DIR", help="RUN/export of the rdmd stage")
    parser.add_argument("--teacher", metavar="DIR", help="RUN/export of its teacher: adds the untrained generator")
    parser.add_argument("--source", metavar="DIR", help="held-out source shards")
    parser.add_argument("--target", metavar="DIR", help="held-out target shards")
    parser.add_argument("--judge", metavar="DIR", help="labelled digit shards ROOT/<digit>/train|test")
    parser.add_argument("--label", type=int, metavar="N", help="digit of the target domain")
    parser.add_argument("--picture", metavar="FILE.png", help="grid of sources and translations to write")
    parser.add_argument("--out", metavar="FILE.json", help="where the numbers go")


def run(arguments: argparse.Namespace) -> int:
    """Print a table and write the same numbers as JSON.

    Raises:
        InputError: missing options, exports or shards.
    """
    if arguments.run:
        report = evaluate_toy_run(Path(arguments.run))
    else:
        needed = ("model", "source", "target", "judge", "label")
        missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
        if missing:
            raise InputError(f"missing {', '.join(missing)}: see rdmd evaluate --help")
        report = evaluate_digits(arguments)
    if arguments.out:
        write_atomically(Path(arguments.out), json.dumps(strict_json(report), indent=1) + "\n")
    return 0


def evaluate_toy_run(run_dir: Path, count: int = 2000) -> dict:
    """Measured against closed form and exact optimal transport, for the export of a toy run."""
    from .config import load_config
    from .data.toys import ToyDistribution
    from .networks.exported import load_generator
    from .validation import ToyValidator

    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"--run {run_dir}: no run there (no config.yaml)")
    config = load_config(str(run_dir / "config.yaml"))
    if not (isinstance(config.data.source, ToyDistribution) and isinstance(config.data.target, ToyDistribution)):
        raise InputError(f"--run {run_dir}: not a toy run, evaluate images with --model, --source and --target")
    generator = load_generator(run_dir / "export")
    options = config.validation.model_copy(update={"count": count})
    validator = ToyValidator(options, config.data.source, config.data.target, config.seed, config.rdmd)
    with torch.no_grad():
        report = validator.measure(generator)
    for line in toy_table(report):
        print(line)
    return report


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


def evaluate_digits(arguments: argparse.Namespace) -> dict:
    """The generator, the identity map and the untrained generator on the same held-out sources."""
    from .drawing import image_grid
    from .metrics.judges import DigitJudge, format_table
    from .metrics.report import ImageReport
    from .networks.exported import Generator, load_denoiser, load_generator
    from .validation import held_out_images

    source, target = (held_out_images(folder, 10**9) for folder in (arguments.source, arguments.target))
    generator = load_generator(arguments.model)
    judge = DigitJudge(arguments.judge)
    outputs = {"RDMD": _translate(generator, source), "identity": source}
    if arguments.teacher:
        teacher = load_denoiser(arguments.teacher)
        untrained = generator.config.model_copy(update={"reading": "teacher"})
        outputs["untrained (teacher at σ)"] = _translate(Generator(teacher.model, untrained), source)
    report = ImageReport(target, judge, arguments.label)
    rows = [report.row(name, source, images) for name, images in outputs.items()]
    recall = judge.recall(arguments.label)
    print(format_table(rows))
    print(f"3-NN's recall on the real held-out images of {arguments.label}: {recall:.4f}")
    if arguments.picture:
        count = min(16, len(source))
        chosen = torch.linspace(0, len(source) - 1, count).long()
        image_grid([("source x", source[chosen]), ("G(x)", outputs["RDMD"][chosen])], arguments.picture)
    return {"rows": rows, "recall_real_heldout": recall, "knn_accuracy": judge.knn_accuracy}


@torch.no_grad()
def _translate(generator: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """As a user receives them: clipped to [-1, 1] and rounded to 8 bits."""
    from .drawing import to_uint8

    outputs = torch.cat([generator(part) for part in images.split(256)])
    return to_uint8(outputs).float() / 127.5 - 1
