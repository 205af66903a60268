"""From what ``data.source`` names to shards on this machine: folders, globs, brace patterns, URLs, commands."""

import contextlib
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rdmd_fast.data.file_walk import suffix_of, walk_files
from rdmd_fast.data.shards.folder_kind import UNKNOWN_FILE, Contents, Kind, describe_file, look_into
from rdmd_fast.data.shards.parts import MANIFEST, Part, Walked, read_foreign, read_packed, walk
from rdmd_fast.data.shards.remote import PIPE, cache_lock, download_folder, fetch_shard, is_remote
from rdmd_fast.data.shards.tar import TarMember
from rdmd_fast.errors import InputError
from rdmd_fast.files import write_atomically


def default_cache() -> Path:
    """$XDG_CACHE_HOME/rdmd_fast, or ~/.cache/rdmd_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdmd_fast"


def locate(spec: str | Path | Sequence[str], tolerant: bool, cache_dir: str | Path | None = None) -> list[Part]:
    """The parts of a data set: folders in the order in which the spec names them, then single tars.

    A spec is one of these, or several: a list, or joined by ``::`` as WebDataset has it.

        DIR                     a packed folder, or one of tars
        DIR/*.tar               a glob, sorted
        DIR/{000..099}.tar      a brace pattern; shards that it names may be missing if ``tolerant``
        http(s)://…/X.tar       a tar, braces too; kept in ``cache_dir``
        http(s)://…/DIR         a packed folder (its manifest.json is looked for); kept in ``cache_dir``
        s3://…, gs://…, hf://…  both, and whatever else fsspec has a driver for, alike
        pipe:COMMAND            a tar that a shell command writes; run once, what it wrote is kept in ``cache_dir``

    Raises:
        InputError: nothing there, or damaged beyond what ``tolerant`` allows.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    folders, tars = [], []
    for piece in _pieces(spec):
        _place(piece, folders, tars, tolerant, cache)
    parts = [_open_folder(folder, tolerant, cache) for folder in folders]
    if tars:
        parts.append(read_foreign(tars, str(spec), tolerant, _walker(tolerant, cache)))
    return parts


def _pieces(spec: str | Path | Sequence[str]) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand

    if isinstance(spec, Path):
        return [str(spec)]
    pieces = []
    for text in [spec] if isinstance(spec, str) else spec:
        for piece in text.split("::"):
            if os.path.exists(piece):  # a folder may have braces in its name
                pieces.append(piece)
                continue
            try:
                pieces += braceexpand(piece)
            except UnbalancedBracesError as error:
                raise InputError(f"{piece}: {error}; close the brace") from None
    if not pieces:
        raise InputError("data: an empty list of shards; name at least one")
    return pieces


def _place(piece: str, folders: list[Path], tars: list[Path], tolerant: bool, cache: Path) -> None:
    """Bring one piece here and put it where it belongs."""
    if is_remote(piece) and not piece.startswith(PIPE) and not re.search(r"\.tar($|[?#])", piece):
        folders.append(download_folder(piece, cache, tolerant))
    elif is_remote(piece):
        tars.append(fetch_shard(piece, cache, tolerant))
    elif Path(piece).is_dir():
        folders.append(Path(piece))
    elif glob.has_magic(piece) and not Path(piece).exists():
        found = sorted(Path(path) for path in glob.glob(piece, recursive=True))
        if not found:
            start = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(piece).parts))
            if start.is_dir():
                walk_files(start)  # names a folder that may not be listed, which a pattern passes over
            raise InputError(f"{piece}: no file matches; check the pattern")
        for path in found:
            (folders if path.is_dir() else tars).append(path)
    elif Path(piece).is_file() and not _may_be_tar(Path(piece)):
        raise InputError(f"{piece}: {describe_file(Path(piece))}")
    elif piece.endswith(".tar") or Path(piece).is_file():
        tars.append(Path(piece))
    else:
        raise InputError(f"{piece}: no such folder of shards; make one with `rdmd pack SOURCE --out {piece}`")


def _may_be_tar(path: Path) -> bool:
    """By its name, or because nothing says that it is something else: a damaged tar is told as such."""
    return suffix_of(path.name) == ".tar" or describe_file(path) == UNKNOWN_FILE


def _open_folder(folder: Path, tolerant: bool, cache: Path) -> Part:
    contents = look_into(folder)
    if contents.kind is Kind.PACKED:
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: packing was interrupted; run the same `rdmd pack` command again")
        return read_packed(folder, tolerant)
    if contents.kind is not Kind.TARS:
        raise InputError(f"{folder}: no {MANIFEST} and no .tar shards here{_hint(contents)}")
    part = read_foreign([folder / name for name in contents.paths], str(folder), tolerant, _walker(tolerant, cache))
    part.left_out += contents.left_out
    return part


def _hint(contents: Contents) -> str:
    folder = contents.folder
    if contents.kind is not Kind.NOTHING:
        return f", but {contents.kind.value}; make shards of them with `rdmd pack {folder} --out FOLDER`"
    inside = sorted(manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return f"; name one of the sets inside: {', '.join(inside[:8])}"
    return f"; make them with `rdmd pack SOURCE --out {folder}`, or unpack compressed ones"


# -- indexes of foreign tars -------------------------------------------------------------------------------------------


def _walker(tolerant: bool, cache: Path) -> Callable[[Path], Walked]:
    """How to list a tar's members: by its headers, or by the index that a former tolerant opening has kept."""
    return (lambda path: _indexed_walk(path, cache)) if tolerant else walk


def _indexed_walk(path: Path, cache: Path) -> Walked:
    """A tar by its index; it is scanned once for a node, and again when the file has changed.

    A tar that has lost members, or is gone, keeps those that it is known to have had: positions must not shift.
    """
    with cache_lock(cache, str(path.absolute())) as entry:
        stamp, known = _load_index(entry)
        try:
            state = path.stat()
            now = [state.st_size, state.st_mtime_ns, state.st_ino]
            if known and stamp == now:
                return known
            walked = walk(path)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
            return known._replace(faults=[fault]) if known else Walked([], [fault], False)
        if known and walked.faults and set(walked.members) <= set(known.members):
            return known._replace(faults=walked.faults)
        if entry is not None:
            with contextlib.suppress(OSError):
                # By columns: with a list for each member a large index takes twice as long to load.
                columns = list(zip(*walked.members, strict=True))
                index = {"stamp": now, "columns": columns, "faults": walked.faults, "complete": walked.complete}
                write_atomically(entry, json.dumps(index))
        return walked


def _load_index(entry: Path | None) -> tuple[list | None, Walked | None]:
    """(size, mtime and inode of the tar, what was known of it)."""
    try:
        index = json.loads(entry.read_text(encoding="utf-8")) if entry else None
        members = list(map(TarMember._make, zip(*index["columns"], strict=True)))
        faults = [str(fault) for fault in index["faults"]]
        return index["stamp"], Walked(members, faults, bool(index["complete"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
