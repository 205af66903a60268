"""``rdmd pack``: images, arrays, published data sets, digits or toys into WebDataset shards with an index."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from rdmd_fast.data.shards import MANIFEST, UNFINISHED_MANIFEST
from rdmd_fast.data.sources import SampleSet
from rdmd_fast.data.sources.celeba import PREFIX as CELEBA_PREFIX
from rdmd_fast.data.sources.celeba import celeba_sets
from rdmd_fast.data.sources.files import file_sets
from rdmd_fast.data.sources.generated import TOY_PREFIX, digit_sets, toy_sets
from rdmd_fast.data.sources.latents import encoded
from rdmd_fast.data.sources.mnist import PREFIX as MNIST_PREFIX
from rdmd_fast.data.sources.mnist import mnist_sets
from rdmd_fast.data.writer import ShardWriter
from rdmd_fast.errors import InputError

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
  rdmd pack toy:8gaussians --count 5000 --out shards/8gaussians
"""

DEFAULTS = {
    "resolution": None,
    "crop": None,
    "holdout": 0.0,
    "labels": False,
    "attribute": None,
    "digits": None,
    "encoder": None,
    "device": None,
    "hues": 8,
    "count": 10000,
    "seed": 0,
    "shard_size": 4096,
}


class Source(NamedTuple):
    """A kind of source: what it is called, how its sets are found, and which options it takes."""

    name: str
    sets: Callable[[argparse.Namespace], list[SampleSet]]
    options: tuple[str, ...]


FILES = Source(
    "image or array files", file_sets, ("resolution", "crop", "holdout", "labels", "encoder", "device", "seed")
)
DIGITS = Source("digits", digit_sets, ("hues",))
PREFIXED = {
    TOY_PREFIX: Source("toys", toy_sets, ("count", "seed")),
    CELEBA_PREFIX: Source(
        "CelebA", celeba_sets, ("attribute", "resolution", "crop", "holdout", "encoder", "device", "seed")
    ),
    MNIST_PREFIX: Source("MNIST", mnist_sets, ("digits", "resolution", "seed")),
}


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


def _pack(sets: list[SampleSet], args) -> None:
    """Write the sets that are not there yet; all appear together, at the end."""
    for each in sets:
        if each.count == 0:
            raise InputError(f"{args.out / each.folder}: {args.source} holds no samples for it; choose otherwise")
    # Every set in the way is looked at before anything is written.
    complete = [_is_complete(args.out / each.folder, each.content, args.force) for each in sets]
    with ExitStack() as stack:
        written = []
        for each, done in zip(sets, complete, strict=True):
            folder = args.out / each.folder
            if done:
                print(f"{folder}: already complete")
                continue
            writer = ShardWriter(folder, each.content, _command(args), args.shard_size, each.classes)
            stack.enter_context(writer)
            for sample in tqdm(each.samples(), desc=str(folder), total=each.count, unit="sample", disable=None):
                writer.write(*sample)
            written.append((folder, each, writer))
        for folder, each, writer in written:
            writer.commit()
            skipped = (each.count or writer.count) - writer.count
            note = f"; {skipped} of {each.count} files skipped as unreadable" if skipped else ""
            print(f"{folder}: {writer.count} samples{note}")


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rdmd pack`` on its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.epilog = EPILOG

    def add(option: str, help: str, **settings) -> None:
        parser.add_argument(_flag(option), default=DEFAULTS[option], help=help, **settings)

    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images or .npy files (searched through), FILE.zip, FILE.zip/FOLDER, FILE.npy of shape "
        "[N, C, H, W] or [N, D], celeba:FOLDER, mnist:FOLDER, digits or toy:NAME; a folder of that name is ./digits",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("resolution", "images: side in pixels, after a central square crop", type=int, metavar="N")
    add("crop", "images: side of the central square, pixels of the file (default: the largest)", type=int, metavar="N")
    add(
        "holdout",
        "files, CelebA: share that goes to DIR/test, the rest to DIR/train (default: no split)",
        type=float,
        metavar="SHARE",
    )
    add("labels", "files: the first-level subfolder is the class, in sorted order", action="store_true")
    add("attribute", "CelebA: the attribute that divides the images, as in list_attr_celeba.txt", metavar="NAME")
    add("digits", "MNIST: the digits to pack (default: all)", type=int, nargs="+", metavar="D")
    add("encoder", "images: folder of a diffusers AutoencoderKL; packs its latents instead", metavar="DIR")
    add("device", "where the encoder runs: auto, cpu, cuda or cuda:N (default: auto)")
    add("hues", "digits: coloured copies of each image (default: %(default)s)", type=int, metavar="N")
    add("count", "toys: points to draw (default: %(default)s)", type=int, metavar="N")
    add("seed", "of the hold-out choice, of MNIST's hues and of a toy's points (default: %(default)s)", type=int)
    add("shard_size", "samples in each shard (default: %(default)s)", type=int, metavar="N")
    parser.add_argument("--force", action="store_true", help="replace whatever set DIR holds")


def run(args: argparse.Namespace) -> int:
    """Pack what ``args`` asks for; returns the exit status 0.

    Raises:
        InputError: bad options or source, unreadable files, or another set in the way.
    """
    source = _source(args.source)
    _check_options(source, args)
    sets = source.sets(args)
    if args.encoder is not None:
        sets = encoded(sets, args.encoder, args.device or "auto")
    _pack(sets, args)
    return 0


def _source(name: str) -> Source:
    if name == "digits":
        return DIGITS
    return next((source for prefix, source in PREFIXED.items() if name.startswith(prefix)), FILES)


def _check_options(source: Source, args) -> None:
    for option, default in DEFAULTS.items():
        if option not in (*source.options, "shard_size") and getattr(args, option) != default:
            taken = ", ".join(map(_flag, source.options))
            raise InputError(f"{_flag(option)}: does nothing for {source.name}, which take {taken} and --shard-size")
    for option in ("resolution", "crop", "hues", "count", "shard_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"{_flag(option)} {value} must be at least 1")
    if not 0 <= args.holdout < 1:
        raise InputError(f"--holdout {args.holdout} must be a share in [0, 1)")
    if args.device is not None and args.encoder is None:
        raise InputError("--device: is where the encoder runs, give --encoder too")
