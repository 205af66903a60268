"""``rdmd pack``: images, the coloured digits or points of a toy into WebDataset shards with an index."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tqdm import tqdm

from rdmd_fast.data import digits
from rdmd_fast.data.images import image_keys, list_images, load_images
from rdmd_fast.data.shards import MANIFEST, UNFINISHED_MANIFEST
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.data.writer import ShardWriter
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

TOY_PREFIX = "toy:"
MAX_UNREADABLE = 0.01  # share of a folder's images

EPILOG = """\
examples:
  rdmd pack photos/cats --out shards/cats --resolution 64
  rdmd pack photos/cats --out shards/cats --resolution 64 --holdout 0.1   (DIR/train and DIR/test)
  rdmd pack digits --out shards/digits                   (DIR/0/train ... DIR/9/test, each digit in 8 hues)
  rdmd pack toy:8gaussians --count 5000 --out shards/8gaussians
"""


def _is_complete(folder: Path, content: dict, force: bool) -> bool:
    """Whether the folder already holds exactly this set.

    Raises:
        InputError: it holds another set, or tars of unknown origin, and ``force`` is off.
    """
    if force:
        return False
    if not (folder / MANIFEST).is_file():
        if any(folder.glob("*.tar")) and not (folder / UNFINISHED_MANIFEST).exists():
            raise InputError(f"{folder}: holds .tar files without {MANIFEST}; choose another --out or pass --force")
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        present, command = manifest["content"], manifest["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST}: unreadable ({error!r}); pass --force to replace the set") from error
    if present != json.loads(json.dumps(content)):
        raise InputError(
            f"{folder}: already holds another set, made by `{command}`; choose another --out or pass --force"
        )
    return True


def _pack_one(folder: Path, content: dict, samples: Iterable[tuple[str, np.ndarray]], args) -> None:
    """Write one set, unless it is there already."""
    if _is_complete(folder, content, args.force):
        print(f"{folder}: already complete")
        return
    with ShardWriter(folder, content, _command(args), args.shard_size) as writer:
        for key, sample in samples:
            writer.write(key, sample)
        writer.commit()
    print(f"{folder}: {writer.count} samples")


def _pack_digits(args) -> None:
    for digit in range(10):
        for split in digits.SPLITS:
            content = {
                "source": "digits",
                "digit": digit,
                "split": split,
                "hues": args.hues,
                "shard_size": args.shard_size,
            }
            _pack_one(args.out / str(digit) / split, content, digits.coloured_digits(digit, split, args.hues), args)


def _pack_toy(args) -> None:
    names = get_args(ToyDistribution.model_fields["toy"].annotation)
    name = args.source.removeprefix(TOY_PREFIX)
    if name not in names:
        raise InputError(f"{args.source}: no such toy; choose from {', '.join(TOY_PREFIX + name for name in names)}")
    toy = ToyDistribution(toy=name)

    def samples() -> Iterator[tuple[str, np.ndarray]]:
        points = toy.sample(Philox(args.seed), Stream.EVALUATION, torch.arange(args.count)).numpy()
        for index, point in enumerate(points):
            yield f"{name}_{index:07d}", point

    content = {"source": args.source, "count": args.count, "seed": args.seed, "shard_size": args.shard_size}
    _pack_one(args.out, content, samples(), args)


def _pack_images(args) -> None:
    if args.resolution is None:
        raise InputError("packing images needs --resolution, their side in pixels")
    folder = Path(args.source)
    paths = list_images(folder)
    keys = image_keys(paths)
    content = {
        "source": str(folder.resolve()),
        "listing_sha256": _listing_digest(folder, paths),
        "resolution": args.resolution,
        "holdout": args.holdout,
        "seed": args.seed,
        "shard_size": args.shard_size,
    }
    of_split = _split(len(paths), args)
    contents = {split: {**content, "split": split} for split in sorted(set(of_split))}
    # A list, so that every set in the way is looked at before anything is written.
    complete = [_is_complete(args.out / split, contents[split], args.force) for split in contents]
    if all(complete):
        print(f"{args.out}: already complete")
        return
    unreadable = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(args.out / split, contents[split], _command(args), args.shard_size))
            for split in contents
        }
        images = tqdm(load_images(folder, paths, args.resolution), total=len(paths), unit="image", disable=None)
        for path, key, split, image in zip(paths, keys, of_split, images, strict=True):
            if isinstance(image, Exception):
                unreadable += 1
                print(f"skipped, unreadable: {folder / path} ({image})", file=sys.stderr)
                if unreadable > MAX_UNREADABLE * len(paths):
                    raise InputError(
                        f"{folder}: {unreadable} of {len(paths)} images are unreadable (the last is {path}), "
                        f"over {MAX_UNREADABLE:.0%}; mend or remove the files listed above"
                    )
                continue
            writers[split].write(key, image)
        for split, writer in writers.items():
            writer.commit()
            print(f"{args.out / split}: {writer.count} samples")
    if unreadable:
        print(f"{folder}: {unreadable} of {len(paths)} images skipped as unreadable")


def _split(count: int, args) -> list[str]:
    """The split of each image, "" without a hold-out: a random choice of ``holdout`` of them by the seed."""
    if args.holdout == 0:
        return [""] * count
    held_out = round(args.holdout * count)
    if not 0 < held_out < count:
        raise InputError(f"--holdout {args.holdout} of {count} images leaves one side empty; choose another share")
    of_split = np.full(count, "train", dtype=object)
    of_split[Philox(args.seed).permutation(Stream.SPLIT, 0, count)[:held_out].numpy()] = "test"
    return of_split.tolist()


def _listing_digest(folder: Path, paths: list[str]) -> str:
    """Changes when a file is added, removed, renamed or changes size; no file is read."""
    listing = "".join(f"{path}\0{(folder / path).stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def _command(args) -> str:
    """The command line that repeats this packing."""
    words = ["rdmd", "pack", args.source, "--out", str(args.out)]
    for option in ("resolution", "holdout", "hues", "count", "seed", "shard_size"):
        value = getattr(args, option)
        if value != _DEFAULTS[option]:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(words)


_DEFAULTS = {"resolution": None, "holdout": 0.0, "hues": 8, "count": 10000, "seed": 0, "shard_size": 4096}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rdmd pack`` on its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of images (searched through), `digits` or `toy:NAME`; a folder of that name is ./digits",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    add(
        "--resolution",
        type=int,
        default=_DEFAULTS["resolution"],
        metavar="N",
        help="images: side in pixels, after a central square crop",
    )
    add(
        "--holdout",
        type=float,
        default=_DEFAULTS["holdout"],
        metavar="SHARE",
        help="images: share that goes to DIR/test, the rest to DIR/train (default: no split)",
    )
    add(
        "--hues",
        type=int,
        default=_DEFAULTS["hues"],
        metavar="N",
        help="digits: coloured copies of each image (default: %(default)s)",
    )
    add(
        "--count",
        type=int,
        default=_DEFAULTS["count"],
        metavar="N",
        help="toys: points to draw (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=_DEFAULTS["seed"],
        help="of the hold-out choice and of the points (default: %(default)s)",
    )
    add(
        "--shard-size",
        type=int,
        default=_DEFAULTS["shard_size"],
        metavar="N",
        help="samples in each shard (default: %(default)s)",
    )
    add("--force", action="store_true", help="replace whatever set DIR holds")


def run(args: argparse.Namespace) -> int:
    """Pack what ``args`` asks for; returns the exit status 0.

    Raises:
        InputError: bad options or source, unreadable images, or another set in the way.
    """
    for option in ("resolution", "hues", "count", "shard_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if not 0 <= args.holdout < 1:
        raise InputError(f"--holdout {args.holdout} must be a share in [0, 1)")
    if args.source == "digits":
        _pack_digits(args)
    elif args.source.startswith(TOY_PREFIX):
        _pack_toy(args)
    else:
        _pack_images(args)
    return 0
