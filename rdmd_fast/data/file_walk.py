"""Walking folders: every file below one, and a word on what was left out."""

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
ARRAY_SUFFIX = ".npy"
UNREAD_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jif", ".apng", ".psd", ".tga", ".ico", ".svg", ".eps"),
        *(".exr", ".hdr", ".dds", ".pcx", ".pbm", ".pfm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf"),
        *(".rw2", ".raw", ".tar", ".zip", ".tgz", ".7z", ".rar", ".npz"),
    )
)
"""Of pictures that are not read, and of archives: what users may expect to be part of a folder of pictures."""

HOUSEKEEPING = frozenset(("@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"))
"""Folders that file servers and archivers make: their thumbnails are no pictures of the user's."""


class Files(NamedTuple):
    """Files below a folder.

    Attributes:
        paths: relative POSIX paths, sorted, without hidden files and what lies in hidden or housekeeping folders.
        left_out: what else was met, and how often.
    """

    paths: list[str]
    left_out: Counter[str]


def walk_files(folder: Path, without: Iterable[str | Path] = ()) -> Files:
    """Find every file below ``folder``. Links are followed, but none to a folder that it lies in itself.

    Args:
        without: folders that are passed over where they lie below ``folder``.

    Raises:
        InputError: the folder, or one below it, cannot be listed.
    """
    left_out: Counter[str] = Counter()
    paths: list[str] = []
    passed_over = {_identity(each) for each in without if os.path.isdir(each)}
    waiting: list[tuple[str, frozenset]] = [("", frozenset())]
    while waiting:
        prefix, trail = waiting.pop()
        here, entries = list_entries(folder / prefix)
        if here in trail:
            left_out[f"link to a folder that it lies in ({prefix[:-1]})"] += 1
            continue
        if prefix and here in passed_over:
            continue
        for name, is_folder in entries:
            if is_hidden(name):
                left_out[f"folder {name}"] += name in HOUSEKEEPING
            elif is_folder:
                waiting.append((f"{prefix}{name}/", trail | {here}))
            else:
                paths.append(prefix + name)
    return Files(sorted(paths), +left_out)


def list_entries(folder: Path) -> tuple[tuple[int, int], list[tuple[str, bool]]]:
    """(device and inode, (name, whether it is a folder) of each entry); InputError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return _identity(folder), [(entry.name, _is_folder(entry)) for entry in entries]
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where}: cannot be listed ({error.strerror}); make it readable or move it away") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself leads nowhere, as a broken one does
            raise
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def is_hidden(path: str) -> bool:
    """Whether a relative path leads through a hidden name, or through a housekeeping folder."""
    return any(part.startswith(".") or part in HOUSEKEEPING for part in path.split("/"))


def is_image(path: str) -> bool:
    """Whether a path has the suffix of an image file that is read."""
    return suffix_of(path) in IMAGE_SUFFIXES


def is_array(path: str) -> bool:
    """Whether a path has the suffix of an array file."""
    return suffix_of(path) == ARRAY_SUFFIX


def suffix_of(path: str) -> str:
    """The last suffix of a path in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def unread(paths: Iterable[str]) -> Counter[str]:
    """Count the files that a user may take for pictures of the folder and that are not read, by suffix."""
    return Counter(f"{suffix} files" for path in paths if (suffix := suffix_of(path)) in UNREAD_SUFFIXES)


def counted(left_out: Counter[str]) -> str:
    """What was left out and how often, for a message."""
    return ", ".join(f"{count} × {what}" for what, count in sorted(left_out.items()))


def tell_left_out(origin: str | Path, left_out: Counter[str]) -> None:
    """Print one line on standard error if anything was left out."""
    if left_out:
        print(f"{origin}: left out {counted(left_out)}", file=sys.stderr)
