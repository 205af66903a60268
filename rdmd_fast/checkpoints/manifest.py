"""Folders of checkpoints: a manifest that tells whether one is whole, and names that only whole ones bear.

step_00001000/manifest.json   content, every file with size and SHA-256, and a SHA-256 of the manifest itself
.step_00001000.*.partial      being written, or being removed
.step_00001000.retired        had the name until its successor got it; the checkpoint itself if that never came
"""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from rdmd_fast.errors import InputError
from rdmd_fast.files import (
    denied,
    fsync_path,
    make_folder,
    read_text,
    remove,
    remove_leftovers,
    rename_durably,
    sha256_of,
    write_atomically,
)
from rdmd_fast.options import explain

FORMAT = 2
FILE = "manifest.json"
MOST_BYTES = 1 << 26  # of a manifest; thousands of ranks write a few MiB
_NAME = re.compile(r"step_(\d{8,})$")


class Defect(InputError):
    """Why a folder is no whole checkpoint of this version; the message does not name the folder."""


Count = Annotated[int, Field(ge=0, le=2**53)]


class _File(BaseModel, strict=True):
    size: Count
    sha256: str


class _Engine(BaseModel, strict=True):
    parameters: dict[str, list[Count]]
    counters: dict[str, float]
    has_ema: bool


class _Content(BaseModel, strict=True):
    """What is read of a manifest."""

    step: Count
    counters: dict[str, float]
    engines: dict[str, _Engine]
    export: dict[str, Any]
    world_size: Annotated[int, Field(ge=1, le=2**31)]
    config: dict[str, Any]
    made_of: dict[str, list[str | None]] = {}
    files: dict[str, _File]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders with a checkpoint's name, whole or not, newest first."""
    return sorted((path for path in root.glob("step_*") if _NAME.match(path.name)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(_NAME.match(folder.name)[1])


# -- writing -----------------------------------------------------------------------------------------------------------


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Flush files to disk; returns each one's size in bytes and SHA-256, read back from it."""
    sealed = {}
    for name in names:
        fsync_path(folder / name)
        sealed[name] = {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return sealed


def write_manifest(folder: Path, content: dict, files: dict[str, dict]) -> None:
    """Flush the folders below ``folder`` and write its manifest, the last file of a checkpoint."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_path(path)
    manifest = {"format": FORMAT, **content, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_atomically(folder / FILE, json.dumps(manifest, indent=1))


def _digest(manifest: dict) -> str:
    """SHA-256 of everything in a manifest but this digest itself, whatever its order and layout."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint, itself unharmed.

    Raises:
        Defect: it is missing, damaged or of another format.
        InputError: this account may not read it.
    """
    try:
        manifest = json.loads(read_text(folder / FILE, MOST_BYTES))
        form = manifest.get("format")
    except FileNotFoundError:
        raise Defect(f"{FILE} is missing") from None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise Defect(f"{FILE} cannot be read") from None
    if form != FORMAT:
        older = "older than" if isinstance(form, int) and form < FORMAT else "not"
        raise Defect(f"the format of {FILE}, {form!r}, is {older} the {FORMAT} of this version")
    if manifest.get("sha256") != _digest(manifest):
        raise Defect(f"{FILE} has changed since it was written")
    try:
        _Content.model_validate(manifest)
    except ValidationError as error:
        raise Defect(f"{FILE} does not hold what this version reads ({explain(error)})") from None
    return manifest


def check_sizes(folder: Path, files: dict[str, dict]) -> None:
    """Every file of a manifest is there with its size, or else a Defect; InputError where they may not be read."""
    for name, expected in files.items():
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            raise Defect(f"{name} is missing") from None
        except PermissionError:
            raise denied(folder / name) from None
        except OSError as error:
            raise Defect(f"{name} cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):  # on a pipe or a device, reading may never end
            raise Defect(f"{name} is no regular file")
        if status.st_size != expected["size"]:
            raise Defect(f"{name} has {status.st_size} bytes instead of {expected['size']}")


def check_hashes(folder: Path, files: dict[str, dict]) -> None:
    """Every file has the content that was written, or else a Defect; InputError where it may not be read."""
    for name, expected in files.items():
        try:
            actual = sha256_of(folder / name)
        except OSError as error:
            raise Defect(f"{name} cannot be read ({error.strerror})") from None
        if actual != expected["sha256"]:
            raise Defect(f"{name} is not what was written (its SHA-256 differs)")


def read_whole_manifest(folder: Path) -> dict:
    """``read_manifest`` of a checkpoint whose files are all there with their sizes, or else a Defect."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest["files"])
    return manifest


def looks_whole(folder: Path) -> bool:
    """By manifest and sizes, without reading the files."""
    try:
        read_whole_manifest(folder)
    except InputError:
        return False
    return True


# -- housekeeping, by the job that holds the run folder ----------------------------------------------------------------


def clear_leftovers(root: Path) -> None:
    """Remove what killed saves have left; a checkpoint that was about to be replaced gets its name back."""
    for retired in root.glob(".step_*.retired"):
        folder = root / retired.name[1:].removesuffix(".retired")
        if not folder.exists() and looks_whole(retired):
            rename_durably(retired, folder)
        else:
            remove(retired)
    for partial in root.glob(".step_*.partial"):
        # A reader elsewhere, or an orphan rank of a dead job that still writes, may keep some of it: next time, then.
        remove(partial)
    remove_leftovers(root)


def prune(root: Path, keep: int, keep_every: int) -> None:
    """Remove checkpoints older than the ``keep`` newest whole ones, but for steps that ``keep_every`` divides."""
    folders = checkpoint_folders(root)
    whole = list(islice(filter(looks_whole, folders), keep))
    for folder in folders[folders.index(whole[-1]) + 1 :] if whole else ():
        if not (keep_every and step_of(folder) and step_of(folder) % keep_every == 0):
            # What is half removed must not bear a checkpoint's name.
            doomed = root / f".{folder.name}.{secrets.token_hex(4)}.partial"
            os.replace(folder, doomed)
            remove(doomed)


def set_aside_newer(run_dir: Path, step: int) -> Path | None:
    """Move checkpoints of later steps to RUN/checkpoints.old: they are of a course that this run leaves.

    A later ``--resume auto`` would else take them for its own. Returns the folder if anything was moved; where
    RUN/checkpoints is a link, it lies beside what that points to, on the same disk.
    """
    root = run_dir / "checkpoints"
    if root.is_symlink():
        root = root.resolve()
    aside = root.with_name(f"{root.name}.old")
    later = [folder for folder in checkpoint_folders(root) if step_of(folder) > step]
    for folder in later:
        make_folder(aside)
        remove(aside / folder.name)
        rename_durably(folder, aside / folder.name)
    return aside if later else None
