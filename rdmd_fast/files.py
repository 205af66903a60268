"""Files that are there whole or not at all."""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders.
        if not (error.errno == errno.EINVAL and Path(path).is_dir()):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, whatever ends the process or the machine."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_path(partial)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    fsync_path(path.parent)


def append_line(path: Path, text: str) -> None:
    """Append a line; if the disk takes but a part of it, that is cut off again, or the next line would join it."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(f"{text}\n".encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Give ``partial``, whole and flushed, the name ``folder``.

    What has that name waits as ``.NAME.retired`` meanwhile: where a kill left ``folder`` missing, it is there.
    """
    retired = folder.with_name(f".{folder.name}.retired")
    if folder.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(folder, retired)
    try:
        os.replace(partial, folder)
    except OSError:
        if retired.exists() and not folder.exists():
            os.replace(retired, folder)
        raise
    fsync_path(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


def read_text(path: str | Path, most: int) -> str:
    """The text of a small file in UTF-8. Pipes and devices, on which reading may never end, are not opened.

    Raises:
        OSError, ValueError: not there, no regular file, more than ``most`` bytes, or no text.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > most:
        raise ValueError(f"larger than {most // 1024} KiB")
    with open(path, "rb") as file:
        content = file.read(status.st_size)
    return content.decode()


def replace_file(path: str | Path, save: Callable[[IO[bytes]], None]) -> None:
    """Let ``save`` write a temporary file beside ``path``, then rename it: readers never see half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def strict_json(value):
    """JSON has neither NaN nor infinities: the identity map's PSNR becomes null."""
    if isinstance(value, dict):
        return {key: strict_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
