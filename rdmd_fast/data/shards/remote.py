"""Shards from elsewhere, brought to a local cache once for a node: http(s) and what a shell command writes."""

from __future__ import annotations

import contextlib
import fcntl
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
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from rdmd_fast.data.shards.parts import INDEX, MANIFEST
from rdmd_fast.errors import InputError

PIPE = "pipe:"
_TRIES = 3
_TIMEOUT = 60.0  # seconds without a byte
_UNREACHABLE = (urllib.error.URLError, HTTPException, OSError, ValueError)


def is_remote(spec: str) -> bool:
    """Whether a spec names something that has to be brought here first."""
    return spec.startswith(("http://", "https://", PIPE))


@contextlib.contextmanager
def cache_lock(cache: Path, name: str) -> Iterator[Path | None]:
    """The cache's file for ``name``, which one process at a time holds; None where the cache cannot be written."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
    entry = cache / "indexes" / f"{digest}.json"
    try:
        descriptor = _locked(entry)
    except OSError:
        yield None
        return
    try:
        yield entry
    finally:
        os.close(descriptor)


def fetch_shard(spec: str, cache: Path, tolerant: bool) -> Path:
    """The local copy of a URL's or command's tar, made now if there is none.

    Raises:
        InputError: a command fails, or, unless ``tolerant``, a URL does; the latter's copy is missing otherwise.
    """
    digest = hashlib.sha256(spec.encode()).hexdigest()[:16]
    if spec.startswith(PIPE):
        return _once(cache / "pipes" / f"{digest}.tar", lambda partial: _spool(spec.removeprefix(PIPE), partial))
    name = re.sub(r"[^\w.-]", "_", Path(urlsplit(spec).path).name)
    path = cache / "urls" / digest / name
    try:
        return _once(path, lambda partial: _download(spec, partial))
    except InputError as error:
        if not tolerant:
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
    parts = urlsplit(base)
    url = urlunsplit(parts._replace(path=f"{parts.path}/{quote(name)}"))
    return _once(folder / name, lambda partial: _download(url, partial, digest, size))


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by one process of the node while others wait; it is there whole or not at all."""
    try:
        if path.exists():
            return path
        descriptor = _locked(path)
        try:
            if not path.exists():
                partial = path.with_name(f".{path.name}.partial")
                make(partial)
                os.replace(partial, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or change data.cache_dir"
        ) from None
    return path


def _locked(path: Path) -> int:
    """A descriptor whose closing lets the next process have ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _download(url: str, partial: Path, digest: str | None = None, size: int | None = None) -> None:
    """Write what ``url`` sends to ``partial``.

    Raises:
        InputError: it cannot be had after three tries, or is not what the manifest says.
    """
    for attempt in range(_TRIES):
        try:
            _transfer(url, partial, digest, size)
            return
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500:
                break
        except _UNREACHABLE as error:
            reason = " ".join(str(getattr(error, "reason", error)).split())
        time.sleep(0.2 * 4**attempt)
    partial.unlink(missing_ok=True)
    raise InputError(f"{url}: cannot be downloaded ({reason}); check the address and the connection")


def _transfer(url: str, partial: Path, digest: str | None, size: int | None) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(partial, "wb+") as file:
        shutil.copyfileobj(response, file, 1 << 20)
        expected = size if size is not None else int(response.headers.get("Content-Length") or file.tell())
        if file.tell() != expected:
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
