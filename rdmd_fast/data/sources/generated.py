"""Sources that need no file: scikit-learn's digits and the 2-D toys."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import get_args

import torch

from rdmd_fast.data import digits
from rdmd_fast.data.sources import Sample, SampleSet
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

TOY_PREFIX = "toy:"


def digit_sets(args) -> list[SampleSet]:
    """``digits``: a set for each digit and split."""

    def samples(digit: int, split: str) -> Iterator[Sample]:
        for key, image in digits.coloured_digits(digit, split, args.hues):
            yield key, image, None

    sets = []
    for digit in range(10):
        for split in digits.SPLITS:
            content = {
                "source": "digits",
                "digit": digit,
                "split": split,
                "hues": args.hues,
                "shard_size": args.shard_size,
            }
            sets.append(SampleSet(f"{digit}/{split}", content, None, partial(samples, digit, split)))
    return sets


def toy_sets(args) -> list[SampleSet]:
    """``toy:NAME``: one set of points."""
    names = get_args(ToyDistribution.model_fields["toy"].annotation)
    name = args.source.removeprefix(TOY_PREFIX)
    if name not in names:
        raise InputError(f"{args.source}: no such toy; choose from {', '.join(TOY_PREFIX + name for name in names)}")

    def samples() -> Iterator[Sample]:
        toy = ToyDistribution(toy=name)
        points = toy.sample(Philox(args.seed), Stream.EVALUATION, torch.arange(args.count)).numpy()
        for index, point in enumerate(points):
            yield f"{name}_{index:07d}", point, None

    content = {"source": args.source, "count": args.count, "seed": args.seed, "shard_size": args.shard_size}
    return [SampleSet("", content, args.count, samples)]
