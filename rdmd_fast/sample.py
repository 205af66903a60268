"""``rdmd sample``: draw from a teacher with EDM's deterministic Heun sampler."""

from __future__ import annotations

import argparse

import torch

from .errors import InputError

EPILOG = """example:
  rdmd sample --model runs/digits_teacher_3/export --out threes.png --count 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, metavar="DIR", help="RUN/export of the teacher stage")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="picture grid to write")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="samples (16)")
    parser.add_argument("--steps", type=int, default=18, metavar="N", help="Heun steps; 2 N - 1 evaluations (18)")
    parser.add_argument("--seed", type=int, default=0, help="key of the noise (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def run(arguments: argparse.Namespace) -> int:
    """Write a grid of samples.

    Raises:
        InputError: no teacher there, bad counts, or points instead of images.
    """
    from .diffusion import heun_sample, karras_levels
    from .figures import image_grid
    from .networks.exported import load_denoiser
    from .randomness import Philox, Stream
    from .translate import pick_device

    if arguments.count < 1 or arguments.steps < 2:
        raise InputError("--count must be at least 1 and --steps at least 2")
    device = pick_device(arguments.device)
    denoiser = load_denoiser(arguments.model).to(device)
    shape = tuple(denoiser.config.sample_shape)
    if len(shape) != 3:
        raise InputError(f"--model {arguments.model}: is for points of shape {shape}, a grid takes images")
    noise = Philox(arguments.seed).normal(Stream.SAMPLER, torch.arange(arguments.count), shape).to(device)
    samples = heun_sample(denoiser, noise, karras_levels(arguments.steps))
    per_row = 8
    image_grid([("", row) for row in samples.cpu().split(per_row)], arguments.out)
    print(arguments.out)
    return 0
