"""Telling what a folder or a file is: a packed set, foreign tars, images, arrays. One rule for every command."""

import json
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.data.file_walk import (
    ARRAY_SUFFIX,
    IMAGE_SUFFIXES,
    counted,
    is_array,
    is_image,
    list_entries,
    suffix_of,
    unread,
    walk_files,
)
from rdmd_fast.data.shards.parts import INDEX, MANIFEST, MOST_INDEX_BYTES, UNFINISHED_MANIFEST
from rdmd_fast.data.shards.tar import scan_shard
from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text

UNKNOWN_FILE = "is a file, no folder of samples"


class Kind(Enum):
    """What a folder holds, in the words of messages."""

    PACKED = "a packed set"
    TARS = "tars"
    IMAGES = "images"
    ARRAYS = f"{ARRAY_SUFFIX} files"
    NOTHING = "nothing that is read"


class Contents(NamedTuple):
    """What ``look_into`` has found.

    Attributes:
        paths: of images or arrays below the folder, or names of tars; relative, sorted; [] of a packed set.
        left_out: what a user may miss, and how often.
    """

    folder: Path
    kind: Kind
    paths: list[str]
    left_out: Counter[str]

    def require_samples(self) -> None:
        """InputError where there is nothing."""
        if self.kind is Kind.NOTHING:
            found = f"; there are {counted(self.left_out)}, which are not read" if self.left_out else ""
            suffixes = ", ".join(sorted({ARRAY_SUFFIX, *IMAGE_SUFFIXES}))
            raise InputError(f"{self.folder}: no images and no arrays below this folder (looked for {suffixes}){found}")


def look_into(folder: str | Path, without: Sequence[str | Path] = ()) -> Contents:
    """Tell what a folder is for: one kind of samples, whatever else there is.

    Tars count where they lie in the folder itself, images and arrays anywhere below. Images beside the tar that they
    were unpacked from are images; a manifest.json of another program is a file like any other.

    Args:
        without: folders that are passed over where they lie below ``folder``.

    Raises:
        InputError: no folder, one that cannot be listed, or one of two kinds; the line names a file of each.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: {describe_file(folder)}")
    _, entries = list_entries(folder)
    if is_packed(folder):
        if strays := [name for name, _ in entries if is_image(name)]:
            raise mixed(folder, {Kind.PACKED: [MANIFEST], Kind.IMAGES: sorted(strays)})
        return Contents(folder, Kind.PACKED, [], Counter())
    files = walk_files(folder, without)
    kinds = {
        Kind.IMAGES: [path for path in files.paths if is_image(path)],
        Kind.ARRAYS: [path for path in files.paths if is_array(path)],
        Kind.TARS: [path for path in files.paths if suffix_of(path) == ".tar" and "/" not in path],
    }
    if kinds[Kind.IMAGES]:
        kinds[Kind.TARS] = [tar for tar in kinds[Kind.TARS] if not _is_unpacked(folder / tar, kinds[Kind.IMAGES])]
    found = [kind for kind, paths in kinds.items() if paths]
    if len(found) > 1:
        raise mixed(folder, {each: kinds[each] for each in found})
    kind = found[0] if found else Kind.NOTHING
    taken = set(kinds.get(kind, ()))
    return Contents(
        folder,
        kind,
        kinds.get(kind, []),
        files.left_out + unread(path for path in files.paths if path not in taken),
    )


def is_packed(folder: Path) -> bool:
    """Whether ``rdmd pack`` wrote, or began to write, a set there: other programs write a manifest.json too."""
    if (folder / UNFINISHED_MANIFEST).is_file():
        return True
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads(read_text(folder / MANIFEST, MOST_INDEX_BYTES))
        if isinstance(manifest, dict) and not {"index_sha256", "shards"}.isdisjoint(manifest):
            return True
    except (OSError, ValueError, RecursionError):
        pass
    return (folder / INDEX).is_file() and any(folder.glob("shard-*.tar"))  # then it is ours, and damaged


def _is_unpacked(tar: Path, images: list[str]) -> bool:
    """Whether every image in ``tar`` lies among ``images``: then it is the archive that they came from."""
    present = set(map(_stem, images))
    try:
        members = scan_shard(tar)
    except (InputError, OSError):
        return False
    names = (f"{member.key}.{member.extension}" for member in members)
    return all(_stem(name) in present for name in names if is_image(name))


def _stem(path: str) -> str:
    """The file's name without suffix: what is unpacked may have been converted since."""
    return os.path.splitext(os.path.basename(path))[0]


def mixed(origin: str | Path, files: dict[Kind, list[str]]) -> InputError:
    """The error of samples of several kinds in one place: a file of each is named."""
    named = " and ".join(f"{kind.value} ({paths[0]})" for kind, paths in files.items())
    return InputError(f"{origin}: holds {named}; keep one kind there and move the others elsewhere")


def describe_file(path: Path) -> str:
    """What is wrong with a path where a folder of samples is wanted, and what to do: the end of a message."""
    if not path.exists():
        return "no such folder"
    suffix = suffix_of(path.name)
    if suffix == ".tar":
        return "is one tar; name the folder that holds it"
    if is_image(path.name):
        return "is one image; name the folder that holds it"
    if suffix == ARRAY_SUFFIX or suffix == ".npz":
        return f"is a NumPy file, no folder; save rows [N, C, H, W] by numpy.save, then `rdmd pack {path.stem}.npy`"
    if zipfile.is_zipfile(path):
        return f"is a zip archive, which `rdmd pack {path} --out FOLDER` reads; or unpack it"
    if suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"):
        return "is a compressed archive; unpack it and name the folder"
    return UNKNOWN_FILE
