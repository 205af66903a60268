"""Where the members of a tar lie, also in a damaged one."""

import errno
import os
import re
import stat
import struct
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rdmd_fast.errors import InputError

BLOCK = 512  # bytes of a tar block
RECORD = 20 * BLOCK  # to which archives are filled up with zeros
_CHUNK = 2048  # blocks read at a time in search of a header
_MOST_FAULTS = 1000  # of one tar; a new start at each costs a walk
_BROKEN = (
    *(tarfile.TarError, EOFError, ValueError, TypeError, LookupError, OverflowError, MemoryError, RecursionError),
    struct.error,
)


class TarMember(NamedTuple):
    """One regular file of a tar: WebDataset key and extension, and where its bytes lie.

    The key ends at the first dot of the file's name; of the extension, what follows its last dot is in lower case.
    """

    key: str
    extension: str
    offset: int
    size: int


def scan_shard(path: Path) -> list[TarMember]:
    """List a shard's members by walking its headers.

    Raises:
        InputError: not a plain tar, cut short, or with a damaged header.
    """
    members, faults = walk_shard(path)
    if faults:
        raise InputError(f"{path}: {faults[0]}; copy or pack it again")
    return members


def walk_shard(path: Path) -> tuple[list[TarMember], list[str]]:
    """The members whose bytes are all there, and what is wrong with the tar; a damaged header is stepped over.

    Raises:
        OSError: the file cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        return walk_file(file)


def walk_file(file: BinaryIO) -> tuple[list[TarMember], list[str]]:
    """``walk_shard`` of an open file."""
    members, faults, start = [], [], 0
    size = file.seek(0, 2)
    while start is not None and len(faults) < _MOST_FAULTS:
        found, stop, fault = _walk_from(file, start, size)
        members += [member for member in found if member.offset + member.size <= size]
        start = _next_header(file, stop + BLOCK)
        if start is not None:
            fault = f"damaged at byte {stop}, before its end"
        if fault:
            faults.append(fault)
    return members, faults


def _walk_from(file: BinaryIO, start: int, size: int) -> tuple[list[TarMember], int, str | None]:
    """(members, byte at which the walk ended, fault if that is no end of an archive)."""
    members, stop = [], start
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as tar:
            for member in tar:
                after = member.offset_data + (member.size + BLOCK - 1) // BLOCK * BLOCK
                # A negative size would lead tarfile back to where it was, again and again.
                if member.size < 0 or member.offset_data < stop or after > size + BLOCK:
                    raise EOFError(f"a member of {member.size} bytes at byte {member.offset_data}")
                stop = after
                split = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*?)([^./]*)", member.name, flags=re.DOTALL)
                if member.isreg() and not member.issparse() and split:
                    extension = split[2] + split[3].lower()
                    members.append(TarMember(split[1], extension, member.offset_data, member.size))
    except _BROKEN as error:
        return members, stop, f"truncated or not an uncompressed tar ({error})"
    file.seek(stop)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        return members, stop, "truncated, the end-of-archive block is missing"
    return members, stop, f"damaged header at byte {stop}" if any(block) else None


def _next_header(file: BinaryIO, start: int) -> int | None:
    """The first block from ``start`` on that is a tar header, if any."""
    file.seek(start)
    while chunk := file.read(_CHUNK * BLOCK):
        for at in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[at + 257 : at + 262] == b"ustar" and _is_header(chunk[at : at + BLOCK]):
                return start + at
        start += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except _BROKEN:
        return False
    return True
