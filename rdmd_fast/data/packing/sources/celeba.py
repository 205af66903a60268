"""CelebA (Liu et al., arXiv 1411.7766): aligned faces, divided by one attribute and by the official split."""

import difflib
import hashlib
from pathlib import Path

import numpy as np

from rdmd_fast.data.packing.sources import SampleSet
from rdmd_fast.data.packing.sources.files import Files, image_sets, open_files
from rdmd_fast.data.sample_names import image_keys
from rdmd_fast.errors import InputError

PREFIX = "celeba:"
IMAGES = ("img_align_celeba", "img_align_celeba.zip")
ATTRIBUTES = "list_attr_celeba.txt"
PARTITION = "list_eval_partition.txt"
SPLITS = {"0": "train", "1": "val", "2": "test"}


def celeba_sets(args) -> list[SampleSet]:
    """Sets ATTRIBUTE/SPLIT and not_ATTRIBUTE/SPLIT.

    Splits are the official train, val and test where the partition file is there, else train and test by --holdout.

    Raises:
        InputError: a file is missing or damaged, files do not belong together, or no such attribute.
    """
    folder = Path(args.source.removeprefix(PREFIX))
    if args.attribute is None:
        raise InputError("packing CelebA needs --attribute, for example Male")
    images = next((found for name in IMAGES if (found := _find(folder, name))), None)
    if images is None:
        raise InputError(f"{folder}: holds neither {IMAGES[0]}/ nor {IMAGES[1]}; put the aligned images there")
    attributes, partition = _find(folder, ATTRIBUTES), _find(folder, PARTITION)
    if attributes is None:
        raise InputError(f"{folder}: holds no {ATTRIBUTES}; put it beside the images")
    names, positive = read_attribute(attributes, args.attribute)
    if partition is None and not args.holdout:
        raise InputError(f"{folder}: holds no {PARTITION}; put it there for the official split, or give --holdout")
    if partition is not None and args.holdout:
        raise InputError(f"--holdout: {partition} tells the official split; leave the option out, or the file")

    files = open_files(images)
    path_of = dict(zip(names, _paths_of(files, names), strict=True))
    content = {"attribute": args.attribute, "attributes_sha256": _digest(attributes)}
    splits = {"": np.ones(len(names), dtype=bool)}
    if partition is not None:
        content["partition_sha256"] = _digest(partition)
        split_of = np.array(read_partition(partition, names))
        splits = {split: split_of == split for split in SPLITS.values()}
    sets = []
    for side, of_side in ((args.attribute, positive), (f"not_{args.attribute}", ~positive)):
        for split, of_split in splits.items():
            chosen = sorted(np.array(names)[of_side & of_split].tolist())
            where = "/".join(filter(None, (side, split)))
            paths = [path_of[name] for name in chosen]
            sets += image_sets(files, paths, args, {**content, "side": where}, where, image_keys(chosen))
    return sets


def read_attribute(path: Path, attribute: str) -> tuple[list[str], np.ndarray]:
    """(image names, whether each has the attribute, bool [N]) from list_attr_celeba.txt.

    Its lines: the number of images; the attributes' names; an image's name and 1 or -1 for each attribute.

    Raises:
        InputError: damaged file, or no such attribute (the nearest ones are named).
    """
    lines = _lines(path)
    attributes = lines[1].split() if len(lines) > 1 else []
    if not attributes or not lines[0].strip().isdecimal():
        raise InputError(f"{path}: starts with no image count and attribute names; download it again")
    if attribute not in attributes:
        lower = {name.lower(): name for name in attributes}
        near = difflib.get_close_matches(attribute.lower(), lower, n=3, cutoff=0.5)
        named = " or ".join(lower[name] for name in near) or ", ".join(attributes)
        raise InputError(f"--attribute {attribute}: no such attribute in {path}; did you mean {named}?")
    rows = [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[0]):
        raise InputError(
            f"{path}: lists {len(rows)} images where its first line says {int(lines[0])}; download it again"
        )
    column = 1 + attributes.index(attribute)
    for number, row in enumerate(rows, start=3):
        if len(row) != 1 + len(attributes) or row[column] not in ("1", "-1"):
            raise InputError(
                f"{path}: line {number} is not a name and {len(attributes)} times 1 or -1; download it again"
            )
    return [row[0] for row in rows], np.array([row[column] == "1" for row in rows])


def read_partition(path: Path, names: list[str]) -> list[str]:
    """Split of each of ``names`` from list_eval_partition.txt, whose lines are an image's name and 0, 1 or 2.

    Raises:
        InputError: damaged file, or one of ``names`` is not in it.
    """
    split_of = {}
    for number, line in enumerate(_lines(path), start=1):
        row = line.split()
        if not row:
            continue
        if len(row) != 2 or row[1] not in SPLITS:
            raise InputError(f"{path}: line {number} is not a name and 0, 1 or 2; download it again")
        split_of[row[0]] = SPLITS[row[1]]
    missing = [name for name in names if name not in split_of]
    if missing:
        raise InputError(f"{path}: lacks {len(missing)} of {len(names)} images, first {missing[0]}; download it again")
    return [split_of[name] for name in names]


def _paths_of(files: Files, names: list[str]) -> list[str]:
    """The path of each name, in whatever folder the image lies."""
    path_of = {path.rpartition("/")[2]: path for path in files.paths}
    missing = [name for name in names if name not in path_of]
    if missing:
        raise InputError(
            f"{files.origin}: lacks {len(missing)} of the {len(names)} images that {ATTRIBUTES} lists, "
            f"first {missing[0]}; unpack or download the images again"
        )
    return [path_of[name] for name in names]


def _find(folder: Path, name: str) -> Path | None:
    """The file or folder, in ``folder`` or in a subfolder as the official download has them (Anno, Eval, Img)."""
    return next((path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.exists()), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); download it again") from None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
