"""Shards from elsewhere, brought to a local cache once for a node: http(s), fsspec, what a shell command writes."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from rdmd_fast.data.shards.parts import INDEX, MANIFEST
from rdmd_fast.errors import InputError

PIPE = "pipe:"
_TRIES = 3
_TIMEOUT = 60.0  # seconds without a byte


class MissingDriver(InputError):
    """Nothing of an address's scheme can be read; being tolerant of damaged shards does not help."""


def is_remote(spec: str) -> bool:
    """Whether a spec names something that has to be brought here first."""
    return spec.startswith(PIPE) or re.match(r"[a-z][a-z0-9+.-]+://", spec) is not None


@contextlib.contextmanager
def cache_lock(cache: Path, name: str) -> Iterator[Path | None]:
    """The cache's file for ``name``, which one process at a time holds; None where the cache cannot be written."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
    entry = cache / "indexes" / f"{digest}.json"
    try:
        lock = _locked(entry)
    except OSError:
        yield None
        return
    with lock:
        yield entry


def fetch_shard(spec: str, cache: Path, tolerant: bool) -> Path:
    """The local copy of a URL's or command's tar, made now if there is none.

    Raises:
        InputError: a command fails, or, unless ``tolerant``, a URL does; the latter's copy is missing otherwise.
    """
    digest = hashlib.sha256(spec.encode()).hexdigest()[:16]
    if spec.startswith(PIPE):
        return _once(cache / "pipes" / f"{digest}.tar", lambda partial: _spool(spec.removeprefix(PIPE), partial))
    name = re.sub(r"[^\w.-]", "_", Path(re.split("[?#]", spec)[0]).name)
    path = cache / "urls" / digest / name
    try:
        return _once(path, lambda partial: _download(spec, partial))
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
    folder = cache / "urls" / hashlib.sha256(base.encode()).hexdigest()[:16]
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
    return _once(folder / name, lambda partial: _download(url, partial, digest, size))


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by one process of the node while others wait; it is there whole or not at all."""
    try:
        if path.exists():
            return path
        with _locked(path):
            if not path.exists():
                partial = path.with_name(f".{path.name}.partial")
                make(partial)
                os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or change data.cache_dir"
        ) from None
    return path


def _locked(path: Path) -> contextlib.AbstractContextManager:
    """Wait until no other process has ``path``; raises OSError where its folder can be neither made nor locked."""
    from filelock import FileLock

    return FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False).acquire()


def _download(url: str, partial: Path, digest: str | None = None, size: int | None = None) -> None:
    """Write what ``url`` sends to ``partial``.

    Raises:
        InputError: it cannot be had after three tries, or is not what the manifest says.
    """
    for attempt in range(_TRIES):
        try:
            _transfer(url, partial, digest, size)
            return
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
    partial.unlink(missing_ok=True)
    raise InputError(f"{url}: cannot be downloaded ({reason}); check the address and the connection")


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


def _transfer(url: str, partial: Path, digest: str | None, size: int | None) -> None:
    with _open(url) as source, open(partial, "wb+") as file:
        told = getattr(source, "length" if _is_http(url) else "size", None)
        shutil.copyfileobj(source, file, 1 << 24)  # a request to an object store brings at least as much
        expected = told if size is None else size
        if expected is not None and file.tell() != expected:
            raise ValueError(f"{file.tell()} bytes came of {expected}")
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if digest and hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError("its sha256 is not the manifest's")


def _spool(command: str, partial: Path) -> None:
    """Run the user's own command, as WebDataset does, and keep what it writes."""
    with open(partial, "wb") as file:
        done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=file, check=False)
        file.flush()
        os.fsync(file.fileno())
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise InputError(f"{PIPE}{command}: exit status {done.returncode}; run the command by hand")
