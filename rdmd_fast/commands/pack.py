"""``rdmd pack``: images, arrays, published data sets, digits or toys into WebDataset shards with an index."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.data.packing.check import OtherSet, check_sets
from rdmd_fast.data.packing.pack_sets import pack_sets
from rdmd_fast.data.packing.sources import SampleSet
from rdmd_fast.data.packing.sources.celeba import PREFIX as CELEBA_PREFIX
from rdmd_fast.data.packing.sources.celeba import celeba_sets
from rdmd_fast.data.packing.sources.files import file_sets
from rdmd_fast.data.packing.sources.generated import TOY_PREFIX, digit_sets, toy_sets
from rdmd_fast.data.packing.sources.latents import encoded
from rdmd_fast.data.packing.sources.mnist import PREFIX as MNIST_PREFIX
from rdmd_fast.data.packing.sources.mnist import mnist_sets
from rdmd_fast.data.sample_names import refuse_inside
from rdmd_fast.data.threads import default_workers
from rdmd_fast.errors import InputError
from rdmd_fast.paths import path_to_read, path_to_write

EPILOG = """\
examples:
  rdmd pack photos/cats --out shards/cats --resolution 64
  rdmd pack photos/cats --out shards/cats --resolution 64 --holdout 0.1   (DIR/train and DIR/test)
  rdmd pack afhq_v2.zip/train/cat --out shards/afhqv2/cat/train --resolution 64
  rdmd pack photos --out shards/photos --resolution 64 --labels           (class = first-level subfolder)
  rdmd pack photos/cats --out shards/cats --resolution 256 --encoder sd-vae-ft-mse
  rdmd pack latents.npy --out shards/latents                              (or a folder of .npy files)
  rdmd pack celeba:celeba --out shards/celeba64 --attribute Male --resolution 64 --crop 140
                                            (DIR/Male/train, val, test and DIR/not_Male/train, val, test)
  rdmd pack mnist:mnist --out shards/mnist --resolution 32 --digits 2 3   (DIR/2/train ... DIR/3/test, coloured)
  rdmd pack digits --out shards/digits                   (DIR/0/train ... DIR/9/test, each digit in 8 hues)
  rdmd pack digits --out shards/digits16 --resolution 16 (enlarged by a bicubic filter)
  rdmd pack toy:8gaussians --scale 2 --std 0.2 --count 5000 --out shards/8gaussians
  rdmd pack shards/cats256 --out shards/cats64 --resolution 64            (resizes a shard set, ours or another's)
  rdmd pack photos/wild --out shards/wild --resolution 64 --other shards/cats   (reports images that both hold)
  rdmd pack --check shards/cats shards/wild             (hashes, index and every image; exit status 2 on a fault)

A killed packing goes on after its last finished shard when the same command is run again, and shards of a complete
set that are gone or damaged (by their sha256) are made again. DIR/report.json lists unreadable, near-empty and
duplicate samples and images unlike the rest in colour; none but the unreadable is left out.
"""

EXIT_INTERRUPTED = 128 + 2  # as shells report SIGINT

DEFAULTS = {
    "resolution": None,
    "crop": None,
    "holdout": 0.0,
    "labels": False,
    "extension": None,
    "attribute": None,
    "digits": None,
    "encoder": None,
    "device": None,
    "hues": 8,
    "count": 10000,
    "scale": None,
    "std": None,
    "seed": 0,
    "shard_size": 4096,
    "other": None,
}


class Source(NamedTuple):
    """A kind of source: what it is called, how its sets are found, and which options it takes."""

    name: str
    sets: Callable[[argparse.Namespace], list[SampleSet]]
    options: tuple[str, ...]


FILES = Source(
    "image or array files",
    file_sets,
    ("resolution", "crop", "holdout", "labels", "extension", "encoder", "device", "seed"),
)
DIGITS = Source("digits", digit_sets, ("hues", "resolution", "encoder", "device"))
PREFIXED = {
    TOY_PREFIX: Source("toys", toy_sets, ("count", "scale", "std", "seed")),
    CELEBA_PREFIX: Source(
        "CelebA", celeba_sets, ("attribute", "resolution", "crop", "holdout", "encoder", "device", "seed")
    ),
    MNIST_PREFIX: Source("MNIST", mnist_sets, ("digits", "resolution", "seed")),
}


def _command(args) -> str:
    """The command line that repeats this packing."""
    words = ["rdmd", "pack", args.source, "--out", str(args.out)]
    for option, default in DEFAULTS.items():
        value = getattr(args, option)
        if value == default:
            continue
        words.append(_flag(option))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _writable(text: str) -> Path:
    return Path(path_to_write(text))


def _readable(text: str) -> Path:
    return Path(path_to_read(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rdmd pack`` on its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.epilog = EPILOG

    def add(option: str, help: str, **settings) -> None:
        parser.add_argument(_flag(option), default=DEFAULTS[option], help=help, **settings)

    parser.add_argument(
        "source",
        nargs="?",
        type=path_to_read,
        metavar="SOURCE",
        help="folder of images or .npy files (searched through), FILE.zip, FILE.zip/FOLDER, FILE.npy of shape "
        "[N, C, H, W] or [N, D], a folder of shards, celeba:FOLDER, "
        "mnist:FOLDER, digits or toy:NAME; a folder of that name is ./digits",
    )
    parser.add_argument("--out", type=_writable, metavar="DIR", help="where the shards go")
    add(
        "resolution",
        "images: side in pixels, after a central square crop; digits: enlarged to it from 8",
        type=int,
        metavar="N",
    )
    add("crop", "images: side of the central square, pixels of the file (default: the largest)", type=int, metavar="N")
    add(
        "holdout",
        "files, CelebA: share that goes to DIR/test, the rest to DIR/train (default: no split)",
        type=float,
        metavar="SHARE",
    )
    add("labels", "files: the first-level subfolder is the class, in sorted order", action="store_true")
    add("extension", "files: those that end in .EXT alone, such as jpg where each has a mask.png", metavar="EXT")
    add("attribute", "CelebA: the attribute that divides the images, as in list_attr_celeba.txt", metavar="NAME")
    add("digits", "MNIST: the digits to pack (default: all)", type=int, nargs="+", metavar="D")
    add("encoder", "images: folder of a diffusers AutoencoderKL or pipeline; packs its latents instead", metavar="DIR")
    add("device", "where the encoder runs: auto, cpu, cuda or cuda:N (default: auto)")
    add("hues", "digits: coloured copies of each image (default: %(default)s)", type=int, metavar="N")
    add("count", "toys: points to draw (default: %(default)s)", type=int, metavar="N")
    add("scale", "toys: size of the figure, data units (default: the toy's own)", type=float, metavar="LENGTH")
    add(
        "std", "toys: standard deviation of a component, data units (default: the toy's own)", type=float, metavar="STD"
    )
    add("seed", "of the hold-out choice, of MNIST's hues and of a toy's points (default: %(default)s)", type=int)
    add("shard_size", "samples in each shard (default: %(default)s)", type=int, metavar="N")
    add(
        "other",
        "report the samples that are also in this shard set, the other domain",
        type=_readable,
        metavar="DIR",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode and resize (default: one a core, 16 at most)"
    )
    parser.add_argument("--force", action="store_true", help="replace whatever set DIR holds")
    parser.add_argument(
        "--check", type=_readable, nargs="+", metavar="DIR", help="verify sets of shards; packs nothing"
    )
    parser.add_argument("--fast", action="store_true", help="with --check: hashes and headers, decodes nothing")


def run(args: argparse.Namespace) -> int:
    """Pack, or check, what ``args`` asks for; returns the exit status: 0, or 130 where Ctrl-C ended it.

    Raises:
        InputError: bad options or source, unreadable files, another set in the way, or a fault found by --check.
    """
    if args.workers is None:
        args.workers = default_workers()
    if args.workers < 1:
        raise InputError(f"--workers {args.workers} must be at least 1")
    if args.check:
        return _check(args)
    if args.source is None or args.out is None:
        raise InputError("name a SOURCE and --out DIR, or --check DIR; `rdmd pack --help` shows examples")
    if args.fast:
        raise InputError("--fast: is for --check, which packs nothing")
    source = _source(args.source)
    _check_options(source, args)
    _check_place(args)
    sets = source.sets(args)
    if args.encoder is not None:
        sets = encoded(sets, args.encoder, args.device or "auto")
    try:
        pack_sets(sets, _command(args), args)
    except KeyboardInterrupt:
        print(f"{args.out}: interrupted; the same command goes on after the last finished shard", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _check(args) -> int:
    packing = [_flag(option) for option in DEFAULTS if option != "other" and getattr(args, option) != DEFAULTS[option]]
    packing += ["--force"] * args.force + ["--out"] * (args.out is not None) + ["SOURCE"] * (args.source is not None)
    if packing:
        raise InputError(f"{packing[0]}: does nothing with --check, which takes --fast, --other and --workers")
    check_sets(args.check, args.fast, args.workers, OtherSet(args.other, args.workers) if args.other else None)
    return 0


def _check_place(args) -> None:
    """Refuse an --out that would mix shards with what they are made from."""
    source = args.source
    for prefix in PREFIXED:
        source = source.removeprefix(prefix)
    refuse_inside(args.out, "--out", [("SOURCE", source)])


def _source(name: str) -> Source:
    if name == "digits":
        return DIGITS
    return next((source for prefix, source in PREFIXED.items() if name.startswith(prefix)), FILES)


def _check_options(source: Source, args) -> None:
    for option, default in DEFAULTS.items():
        if option not in (*source.options, "shard_size", "other") and getattr(args, option) != default:
            taken = ", ".join(map(_flag, source.options))
            raise InputError(
                f"{_flag(option)}: does nothing for {source.name}, which take {taken}, --shard-size and --other"
            )
    for option in ("resolution", "crop", "hues", "count", "shard_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"{_flag(option)} {value} must be at least 1")
    if not 0 <= args.holdout < 1:
        raise InputError(f"--holdout {args.holdout} must be a share in [0, 1)")
    if args.extension is not None:
        args.extension = args.extension.removeprefix(".")
    if args.device is not None and args.encoder is None:
        raise InputError("--device: is where the encoder runs, give --encoder too")
