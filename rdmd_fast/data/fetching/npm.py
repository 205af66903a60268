"""Packages of npm as plain archives: the user's own npm downloads them, and nothing in them is ever run."""

import base64
import hashlib
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rdmd_fast.errors import InputError

MOST_BYTES = 1 << 29  # of an archive, packed or unpacked: the largest of ours has 80 MB
MOST_MEMBERS = 50_000

_ERROR_LINE = re.compile(r"npm (?:error|ERR!)\s*(.*)")
_LITTLE_SAID = re.compile(r"(?:(?:code|errno|syscall|type|A complete log|For a full report)\b.*)?")


class Package(NamedTuple):
    """One version of a package; ``integrity`` is its archive's hash as npm publishes it, ``sha512-BASE64``."""

    name: str
    version: str
    integrity: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def download(package: Package, folder: Path) -> Path:
    """The package's archive in ``folder``, which is empty; its hash is the one that is known.

    Raises:
        InputError: there is no npm, it fails, or it brings another archive.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise InputError("npm is not installed: get Node.js (https://nodejs.org), or your system's package npm")
    words = [npm, "pack", "--ignore-scripts", "--loglevel=error", f"--pack-destination={folder}", str(package)]
    try:
        done = subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise InputError(f"{npm}: cannot be run ({error.strerror or error}), install Node.js again") from None
    if done.returncode:
        raise InputError(
            f"{package}: npm could not fetch it ({_reason(done.stderr)}), see whether `npm view {package}` works"
        )
    archives = list(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise InputError(f"{package}: npm left {len(archives)} archives, see what `npm pack {package}` does")
    found = integrity_of(archives[0])
    if found != package.integrity:
        raise InputError(
            f"{package}: its archive has {found} where {package.integrity} is known: another one or damaged, run "
            "`npm cache clean --force` or ask whoever runs your npm registry"
        )
    return archives[0]


def integrity_of(path: Path) -> str:
    """A file's SHA-512 as npm writes it."""
    with open(path, "rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def _reason(said: str) -> str:
    """The line of npm's standard error that tells most."""
    lines = [match[1].strip() for match in map(_ERROR_LINE.match, said.splitlines()) if match]
    telling = [line for line in lines if not _LITTLE_SAID.fullmatch(line)]
    return next(filter(None, (*telling, *lines, *said.splitlines())), "it says nothing").removeprefix("network ")


def read_members(archive: Path, most_bytes: Callable[[str], int | None]) -> dict[str, bytes]:
    """Files of a .tgz by their names in it; nothing is written to disk.

    Args:
        most_bytes: the largest size that a file of this name may have, or None where it is not wanted.

    Raises:
        InputError: a damaged archive, one with links, devices or names that lead outside, or one too large.
    """
    files, total = {}, 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for count, member in enumerate(tar):
                total += member.size
                if count >= MOST_MEMBERS or total > MOST_BYTES:
                    raise InputError(f"{archive.name}: unpacks to more than {MOST_MEMBERS} files or {MOST_BYTES} bytes")
                fault = _fault(member)
                if fault:
                    raise InputError(f"{archive.name}: {member.name!r} {fault}; nothing of it is unpacked")
                most = most_bytes(member.name) if member.isreg() else None
                if most is None:
                    continue
                if member.size > most or member.name in files:
                    fault = f"has {member.size} bytes, over {most}" if member.size > most else "is there twice"
                    raise InputError(f"{archive.name}: {member.name!r} {fault}; nothing of it is unpacked")
                files[member.name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{archive.name}: damaged ({error}), fetch again") from None
    return files


def _fault(member: tarfile.TarInfo) -> str | None:
    if not (member.isreg() or member.isdir()):
        return "is a link or a device"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or not path.parts:
        return "leads outside the archive"
    return None
