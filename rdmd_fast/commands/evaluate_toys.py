"""A toy run measured against its closed form and exact optimal transport: numbers, table and picture."""

import argparse
from pathlib import Path

import numpy as np
import torch

from rdmd_fast.config import load_config
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.models import Generator, condition_inputs, load_generator
from rdmd_fast.monitoring.drawing import toy_picture
from rdmd_fast.monitoring.validation import ToyValidator
from rdmd_fast.transport_weight import output_name

TOY_COUNT = 2000


def evaluate_toy_run(arguments: argparse.Namespace) -> dict:
    """Measure against closed form and exact optimal transport, for the export of a toy run.

    Returns:
        The numbers of one λ; of several ones, those of each as ``rows``.
    """
    run_dir = Path(arguments.run)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"--run {run_dir}: no run there (no config.yaml)")
    # What only training needs may be gone, or refused since.
    config = load_config(str(run_dir / "config.yaml"), [f"run_dir={run_dir}", "deepspeed={}"])
    if not (isinstance(config.data.source, ToyDistribution) and isinstance(config.data.target, ToyDistribution)):
        raise InputError(f"--run {run_dir}: not a toy run, evaluate images with --model, --source and --target")
    generator = load_generator(run_dir / "export")
    bounds = generator.config.weight_range
    weights = arguments.transport_weight or [bounds.middle if bounds else None]
    for weight in weights:
        condition_inputs(generator.config, weight, 1)  # names a λ that it does not take ahead of any work
    options = config.validation.model_copy(update={"count": arguments.count or TOY_COUNT})
    seed = config.seed if arguments.seed is None else arguments.seed
    validator = ToyValidator(options, config.data.source, config.data.target, seed, config.rdmd)
    reports = [_toy_report(validator, generator, weight, chosen=bool(arguments.transport_weight)) for weight in weights]
    if arguments.picture:
        with torch.no_grad():
            outputs = {output_name(weight): generator(validator.source, weight) for weight in weights}
        toy_picture(validator.source, outputs, validator.target, arguments.picture)
    return reports[0] if len(reports) == 1 else {"rows": reports}


@torch.no_grad()
def _toy_report(validator: ToyValidator, generator: Generator, weight: float | None, chosen: bool) -> dict:
    """Give numbers at one λ, printed as a table; None for a generator that takes none."""
    report = validator.measure(lambda x: generator(x, weight), weight)
    if weight is not None:
        print(f"λ = {weight:g}" + ("" if chosen else ", the middle of its range; choose by --transport-weight"))
        report = {"transport_weight": weight} | report
    print("\n".join(toy_table(report)))
    return report


def toy_table(report: dict[str, float]) -> list[str]:
    """Format a report: every measured number with what it should be beside it."""
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
