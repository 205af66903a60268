"""Shards from elsewhere, brought to a local cache once for a node: http(s), fsspec, what a shell command writes."""

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import quote

from rdmd_fast.data.shards.parts import INDEX, MANIFEST
from rdmd_fast.data.shards.tar import walk_file
from rdmd_fast.errors import InputError
from rdmd_fast.files import exclusive, replace_file

PIPE = "pipe:"
_TRIES = 3
_TIMEOUT = 60.0  # seconds without a byte
_LONGEST_NAME = 200  # bytes of a name in the cache: the end of a longer one


class MissingDriver(InputError):
    """Nothing of an address's scheme can be read; being tolerant of damaged shards does not help."""


def is_remote(spec: str) -> bool:
    """Whether a spec names something that has to be brought here first."""
    return spec.startswith(PIPE) or re.match(r"[a-z][a-z0-9+.-]+://", spec) is not None


@contextlib.contextmanager
def cache_lock(cache: Path, name: str) -> Iterator[Path | None]:
    """The cache's file for ``name``, which one process at a time holds; None where the cache cannot be written."""
    entry = cache / "indexes" / f"{_digest(name, 32)}.json"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(entry))
        except OSError:
            entry = None
        yield entry


def fetch_shard(spec: str, cache: Path, tolerant: bool) -> Path:
    """The local copy of a URL's or command's tar, made now if there is none.

    Raises:
        InputError: a command fails, or, unless ``tolerant``, a URL does; the latter's copy is missing otherwise.
    """
    if spec.startswith(PIPE):
        return _once(cache / "pipes" / f"{_digest(spec)}.tar", lambda file: _spool(spec.removeprefix(PIPE), file))
    name = re.sub(r"[^\w.-]", "_", Path(re.split("[?#]", spec)[0]).name)
    path = cache / "urls" / _digest(spec) / name.encode()[-_LONGEST_NAME:].decode(errors="ignore")
    try:
        return _once(path, lambda file: _download_tar(spec, file))
    except InputError as error:
        if not tolerant or isinstance(error, MissingDriver):
            raise
        print(f"warning: {error}", file=sys.stderr)
        return path


def download_folder(url: str, cache: Path, tolerant: bool) -> Path:
    """The local copy of a packed folder behind a URL. Shards are checked against the manifest's sizes and sha256.

    Raises:
        InputError: no packed folder there, or, unless ``tolerant``, a shard that does not come whole.
    """
    base = re.sub(rf"/?({re.escape(MANIFEST)}|{re.escape(INDEX)})?$", "", url)
    folder = cache / "urls" / _digest(base)
    manifest = json.loads(_file(base, folder, MANIFEST).read_bytes() or b"{}")
    try:
        _file(base, folder, INDEX, manifest["index_sha256"])
        shards = [(shard["file"], shard["bytes"], shard["sha256"]) for shard in manifest["shards"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{base}/{MANIFEST}: unreadable packing ({error!r}); pack the set again") from None
    for name, size, digest in shards:
        if "/" in name or name.startswith("."):
            raise InputError(f"{base}/{MANIFEST}: {name!r} is no name of a shard; pack the set again")
        try:
            _file(base, folder, name, digest, size)
        except InputError as error:
            if not tolerant:
                raise
            print(f"warning: {error}", file=sys.stderr)
    return folder


def _file(base: str, folder: Path, name: str, digest: str | None = None, size: int | None = None) -> Path:
    url = re.sub("(?=[?#]|$)", f"/{quote(name)}", base, count=1) if _is_http(base) else f"{base}/{name}"
    return _once(folder / name, lambda file: _download(url, file, digest, size))


def _digest(spec: str, length: int = 16) -> str:
    return hashlib.sha256(spec.encode(errors="surrogateescape")).hexdigest()[:length]


def _once(path: Path, make: Callable[[IO[bytes]], None]) -> Path:
    """``path``, made by one process of the node while others wait; it is there whole or not at all."""
    try:
        if path.exists():
            return path
        with exclusive(path):
            if not path.exists():
                replace_file(path, make, durable=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or change data.cache_dir"
        ) from None
    return path


def _download(url: str, file: IO[bytes], digest: str | None = None, size: int | None = None) -> bool:
    """Write what ``url`` sends; returns whether its length was known beforehand.

    Raises:
        InputError: it cannot be had after three tries, or is not what the manifest says.
    """
    for attempt in range(_TRIES):
        try:
            return _transfer(url, file, digest, size)
        except MissingDriver:
            raise
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500:
                break
        except Exception as error:  # of whatever class a driver has
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            if isinstance(error, FileNotFoundError | PermissionError):  # what 404 and 403 are to drivers
                reason = error.strerror or f"{type(error).__name__}: {reason}"
                break
        time.sleep(0.2 * 4**attempt)
    raise InputError(f"{url}: cannot be downloaded ({reason}); check the address and the connection")


def _download_tar(url: str, file: IO[bytes]) -> None:
    """A single tar, whose length not every server tells."""
    if not _download(url, file):
        _check_whole(url, file)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _open(url: str) -> BinaryIO:
    if _is_http(url):  # not by fsspec, which wants aiohttp for it
        return urllib.request.urlopen(url, timeout=_TIMEOUT)
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition(":")[0])
    except (ImportError, ValueError) as error:
        raise MissingDriver(f"{url}: cannot be read here ({error}); install its driver or check the address") from None
    return fsspec.open(url).open()


def _transfer(url: str, file: IO[bytes], digest: str | None, size: int | None) -> bool:
    file.seek(0)
    file.truncate()
    with _open(url) as source:
        told = getattr(source, "length" if _is_http(url) else "size", None)
        shutil.copyfileobj(source, file, 1 << 24)  # a request to an object store brings at least as much
        expected = told if size is None else size
        if expected is not None and file.tell() != expected:
            raise ValueError(f"{file.tell()} bytes came of {expected}")
    file.seek(0)
    if digest and hashlib.file_digest(file, "sha256").hexdigest() != digest:
        raise ValueError("its sha256 is not the manifest's")
    return expected is not None


def _spool(command: str, file: IO[bytes]) -> None:
    """Run the user's own command, as WebDataset does, and keep what it writes.

    Raises:
        InputError: a part of it fails, or what it writes is no whole tar.
    """
    bash = shutil.which("bash")  # of the shells that tell when a command ahead of the last one has failed
    words = [bash, "-o", "pipefail", "-c", command] if bash else ["sh", "-c", command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, check=False)
    if done.returncode:
        raise InputError(f"{PIPE}{command}: exit status {done.returncode}; run the command by hand")
    _check_whole(f"{PIPE}{command}", file)


def _check_whole(origin: str, file: BinaryIO) -> None:
    """InputError unless a tar came to its end: it is not kept."""
    size = file.seek(0, 2)
    _, faults = walk_file(file)
    if faults:
        raise InputError(f"{origin}: {size} bytes came, which are no whole tar ({faults[0]}); nothing of it is kept")
