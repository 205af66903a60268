"""Sources that need no file: scikit-learn's digits and the 2-D toys."""

from functools import partial
from typing import get_args

import numpy as np
import torch
from pydantic import ValidationError

from rdmd_fast.data.packing.sources import Sample, SampleSet, digits
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.options import explain
from rdmd_fast.randomness import Philox, Stream

TOY_PREFIX = "toy:"
TOY_OPTIONS = ("scale", "std")


def digit_sets(args) -> list[SampleSet]:
    """``digits``: a set for each digit and split."""

    def sample(coloured: list[tuple[str, np.ndarray]], position: int) -> Sample:
        return *coloured[position], None

    sets = []
    for digit in range(10):
        for split in digits.SPLITS:
            coloured = list(digits.coloured_digits(digit, split, args.hues, args.resolution))
            content = {
                "source": "digits",
                "digit": digit,
                "split": split,
                "hues": args.hues,
                "shard_size": args.shard_size,
            }
            if args.resolution is not None:
                content["resolution"] = args.resolution
            sets.append(
                SampleSet(f"{digit}/{split}", content, len(coloured), partial(sample, coloured), generated=True)
            )
    return sets


def toy_sets(args) -> list[SampleSet]:
    """``toy:NAME``: one set of points."""
    names = get_args(ToyDistribution.model_fields["toy"].annotation)
    name = args.source.removeprefix(TOY_PREFIX)
    if name not in names:
        raise InputError(f"{args.source}: no such toy; choose from {', '.join(TOY_PREFIX + name for name in names)}")

    size = {key: value for key in TOY_OPTIONS if (value := getattr(args, key)) is not None}
    try:
        toy = ToyDistribution.model_validate({"toy": name, **size})
    except ValidationError as error:
        flag = "--" if error.errors()[0]["loc"] else ""
        raise InputError(f"{args.source}: {flag}{explain(error, ToyDistribution)}") from None
    points = toy.sample(Philox(args.seed), Stream.EVALUATION, torch.arange(args.count)).numpy()

    def sample(position: int) -> Sample:
        return f"{name}_{position:07d}", points[position], None

    content = {"source": args.source, "count": args.count, "seed": args.seed, "shard_size": args.shard_size, **size}
    return [SampleSet("", content, args.count, sample, generated=True)]
