"""Files and folders that are there whole or not at all: all that the program leaves on a disk is written here.

Each is made beside its place as ``.rdmd-<16 hex digits>.partial``, a name as long for a long name as for a short one,
and renamed when it is whole. Its mode is what the umask allows. Where a link stands in its place, the link's target is
replaced. A temporary is locked as long as its writer lives; the next process that writes into a folder removes those
of dead ones.
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import pwd
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rdmd_fast.errors import InputError

_TEMPORARY = re.compile(r"\.rdmd-[0-9a-f]{16}\.partial")
_LONGEST_NAME = 255  # bytes, of most file systems
# What a folder answers to fsync where a file system has none (many FUSE ones), and where it may be written alone.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_swept: set[Path] = set()  # folders that this process has cleared of leftovers


# -- text --------------------------------------------------------------------------------------------------------------


def encoded(content: str | bytes) -> bytes:
    r"""UTF-8; what is none in a file's name (lone surrogates) becomes ``\udcXX``, which JSON reads as what it was."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def is_utf8(path: str | Path) -> bool:
    """Whether a file's name is UTF-8, without which some libraries (safetensors) do not open it."""
    return os.fspath(path).isascii() or encoded(os.fspath(path)) == os.fsencode(path)


def print_any_text() -> None:
    """Let this process print any file's name: what its terminal or log cannot take is written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # closed, or no text of the interpreter's
            stream.reconfigure(errors="backslashreplace")


def strict_json(value):
    """JSON has neither NaN nor infinities: the identity map's PSNR becomes null."""
    if isinstance(value, dict):
        return {key: strict_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- to disk -----------------------------------------------------------------------------------------------------------


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC or not os.path.isdir(path):
            raise


def fsync_tree(folder: Path) -> None:
    """Flush all that is in ``folder``, and itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            fsync_path(path)


def rename_durably(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``, which it has after a power failure, too."""
    os.replace(source, target)
    fsync_path(target.parent)


def make_folder(folder: str | Path, durable: bool = True) -> None:
    """Make a folder and those above it; of a link that points nowhere, what it points to.

    Args:
        durable: they are there after a power failure, too.
    """
    if not os.path.isdir(folder):
        folder = Path(os.path.realpath(folder))
        make_folder(folder.parent, durable)
        folder.mkdir(exist_ok=True)
        if durable:
            fsync_path(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not its target) as far as that can be done."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


# -- files -------------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, whatever ends the process or the machine."""
    replace_file(path, lambda file: file.write(encoded(content)), durable=True)


def replace_file(path: str | Path, save: Callable[[IO[bytes]], object], durable: bool = False) -> None:
    """Let ``save`` write a temporary file, then give it the name ``path``: readers never see half of it.

    Args:
        durable: whatever ends the machine; without it there may be nothing in the file after a power failure.

    Raises:
        OSError: names ``path``, whatever could not be written.
    """
    try:
        target = _target(Path(path))
        if target is None:
            with open(path, "wb") as file:
                save(file)
            return
        make_folder(target.parent, durable)
        with _temporary(target, _create_file) as (partial, descriptor):
            with open(descriptor, "wb+", closefd=False) as file:
                save(file)
            if durable:
                os.fsync(descriptor)
            os.replace(partial, target)
        if durable:
            fsync_path(target.parent)
    except OSError as error:
        if error.errno is not None:  # else its text would be lost
            error.filename, error.filename2 = os.fspath(path), None
        raise


def save_by_name(path: Path, save: Callable[[Path], object]) -> None:
    """Let a library write a new file by its name; its mode is what the umask allows, whatever the library likes."""
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save(path)
    with contextlib.suppress(OSError):  # a file system without modes
        os.chmod(path, mode)


def append_line(path: Path, text: str) -> None:
    """Append a line; if the disk takes but a part of it, that is cut off again, or the next line would join it."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(encoded(f"{text}\n"))
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def _target(path: Path) -> Path | None:
    """What is replaced by a file of that name: where it is a link, what that points to, there or not.

    A link to a folder is no place for a file and is replaced itself. None stands for a pipe, a terminal or a device,
    which is written to and not replaced.
    """
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            target, mode = Path(os.path.realpath(path)), os.stat(path).st_mode
            path = path if stat.S_ISDIR(mode) else target
    except FileNotFoundError:
        return Path(os.path.realpath(path)) if os.path.islink(path) else path
    return path if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else None


# -- folders -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` when the block ends well and is removed when it does not.

    ``folder`` is the old one until the new one is whole and on disk.
    """
    target = Path(os.path.realpath(folder))
    make_folder(target.parent)
    with _temporary(target, _create_folder) as (partial, _):
        yield partial
        fsync_tree(partial)
        replace_folder(partial, target)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give ``partial``, whole and flushed, the name ``folder``.

    What has that name waits as ``.NAME.retired`` meanwhile: where a kill left ``folder`` missing, it is there.
    """
    name = f".{folder.name}.retired"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".rdmd-{_digest(folder.name)}.retired"
    retired = folder.with_name(name)
    if os.path.lexists(folder):
        remove(retired)
        os.replace(folder, retired)
    try:
        os.replace(partial, folder)
    except OSError:
        if os.path.lexists(retired) and not os.path.lexists(folder):
            os.replace(retired, folder)
        raise
    fsync_path(folder.parent)
    remove(retired)


# -- temporaries and locks ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _temporary(target: Path, create: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """(name, open descriptor) of what the block makes and renames to ``target``; removed if it fails."""
    if target.parent not in _swept:
        _swept.add(target.parent)
        remove_leftovers(target.parent)
    while True:
        partial = target.with_name(f".rdmd-{secrets.token_hex(8)}.partial")
        descriptor = create(partial)
        with contextlib.suppress(OSError):  # without locks on a file system nobody takes it for a leftover either
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.path.lexists(partial):
            break
        os.close(descriptor)  # another process has removed it before it was locked
    try:
        yield partial, descriptor
    except BaseException:
        remove(partial)
        raise
    finally:
        os.close(descriptor)


def _create_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _create_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def remove_leftovers(folder: Path) -> None:
    """Remove temporaries in ``folder`` whose writers are dead: nobody holds their locks."""
    with contextlib.suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(folder) if _TEMPORARY.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                access = os.O_RDONLY if path.is_dir() else os.O_RDWR
                descriptor = os.open(path, access | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody writes
                    remove(path)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for ``path``.

    Raises:
        OSError: its folder can be neither made nor locked.
    """
    from filelock import FileLock

    make_folder(path.parent)
    with FileLock(path.with_name(f".rdmd-{_digest(path.name)}.lock"), fallback_to_soft=False):
        yield


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


# -- reading -----------------------------------------------------------------------------------------------------------


def open_to_read(path: str | Path) -> IO[bytes]:
    """``open(path, "rb")``; InputError, which says who may, where this account may not."""
    try:
        return open(path, "rb")
    except PermissionError:
        raise denied(path) from None


def is_file(path: str | Path) -> bool:
    """Whether a regular file is there; InputError as ``open_to_read`` where this account may not look."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        raise denied(path) from None
    except (OSError, ValueError):
        return False


def check_readable(path: str | Path) -> None:
    """Whether a file can be read and is there itself; what is wrong with its content is the reader's to say.

    Raises:
        InputError: this account may not read it, or Git LFS has left a pointer in its place.
        OSError: it cannot be read for another reason.
    """
    if not is_file(path):
        return
    with open_to_read(path) as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(
                f"{path}: is a Git LFS pointer and not the file itself, run `git lfs pull` in its repository"
            )


def denied(path: str | Path) -> InputError:
    """The error of a path that this account may not read: what bars it, for whom that is open, and what to do."""
    place = Path(os.path.realpath(path))
    barred = next((each for each in reversed(place.parents) if not os.access(each, os.X_OK)), place)
    try:
        mode = stat.S_IMODE(os.stat(barred).st_mode)
    except OSError:
        return InputError(f"{path}: permission denied, ask its owner to let this account read it")
    owner = owner_of(barred)
    readers = f"{owner} and its group" if mode & (stat.S_IRGRP | stat.S_IXGRP) else owner
    return InputError(
        f"{path}: permission denied: {'it' if barred == place else barred} may be read by {readers} alone (mode "
        f"{mode:04o}), let {owner} run `chmod -R a+rX {barred}`"
    )


def owner_of(path: Path) -> str:
    """The account that ``path`` belongs to, by its name where it has one here."""
    number = os.stat(path).st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; InputError where this account may not read it."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path, most: int) -> str:
    """The text of a small file in UTF-8. Pipes and devices, on which reading may never end, are not opened.

    Raises:
        InputError: as ``check_readable``.
        OSError, ValueError: not there, no regular file, more than ``most`` bytes, or no text.
    """
    check_readable(path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > most:
        raise ValueError(f"larger than {most // 1024} KiB")
    with open(path, "rb") as file:
        content = file.read(status.st_size)
    return content.decode()
