"""``rdmd pack --check``: whether a shard set is what its manifest says, and which samples two sets share."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from rdmd_fast.data.file_walk import tell_left_out, walk_files
from rdmd_fast.data.packing.report import digest_of, shared_samples
from rdmd_fast.data.pictures import UNREADABLE
from rdmd_fast.data.shards.folder_kind import Kind, is_packed, look_into
from rdmd_fast.data.shards.parts import (
    ARRAY_EXTENSION,
    IMAGE_EXTENSIONS,
    INDEX,
    LABEL_EXTENSION,
    MANIFEST,
    MANIFEST_VERSION,
    MOST_INDEX_BYTES,
    UNFINISHED_MANIFEST,
    choose_members,
)
from rdmd_fast.data.shards.sample_reader import decode
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.shards.tar import TarMember, scan_shard
from rdmd_fast.data.threads import map_in_order
from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text, sha256_of

CHUNK = 64  # samples that a worker decodes at a time


class Fault(NamedTuple):
    """What is wrong and where, in one line."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def check_sets(folders: list[Path], fast: bool, workers: int, other: OtherSet | None = None) -> None:
    """Verify each folder, or the sets inside it, and print every fault.

    Args:
        folders: of shards, packed or foreign, or of such sets.
        fast: hashes, index and headers only; no sample is decoded.
        workers: threads that decode.
        other: print what each set shares with this one.

    Raises:
        InputError: something is wrong; the line names the first fault and counts them.
    """
    faults: list[Fault] = []
    sets = [each for folder in folders for each in sets_below(folder)]
    for folder in sets:
        found, count = check_set(folder, fast, workers)
        faults += found
        for fault in found:
            print(fault)
        state = f"faults: {len(found)}" if found else "whole"
        print(f"{folder}: {count} samples, {state}{', none decoded' if fast else ''}")
        if other is not None and not found:
            shared = other.shared_with(folder)["samples"]
            print(f"{folder}: {len(shared)} samples also in {other.folder}")
            for key, others in shared:
                print(f"  {key} = {', '.join(others)}")
    if faults:
        more = f" (the first of {len(faults)} faults in {len(sets)} sets)" if len(faults) > 1 else ""
        raise InputError(
            f"{faults[0]}{more}; copy what is listed again, or delete it and run the same `rdmd pack` command"
        )


def sets_below(folder: Path) -> list[Path]:
    """The folder itself where it holds shards, else the sets anywhere below it.

    Raises:
        InputError: there are none.
    """
    if look_into(folder).kind in (Kind.PACKED, Kind.TARS):
        return [folder]
    marks = (MANIFEST, UNFINISHED_MANIFEST)
    parents = {(folder / path).parent for path in walk_files(folder).paths if path.rpartition("/")[2] in marks}
    found = sorted(filter(is_packed, parents))
    if not found:
        raise InputError(f"{folder}: holds no shards; make them with `rdmd pack SOURCE --out {folder}`")
    return found


def check_set(folder: Path, fast: bool, workers: int) -> tuple[list[Fault], int]:
    """(faults, samples that the headers tell) of one set."""
    if not is_packed(folder):
        manifest, index, faults = None, {}, []
    elif not (folder / MANIFEST).is_file():
        return [Fault(str(folder), "packing was interrupted")], 0
    else:
        manifest, index, faults = _read_manifest(folder)
        if manifest is None:
            return faults, 0
    listed = [shard["file"] for shard in manifest["shards"]] if manifest else []
    found = sorted(path.name for path in folder.glob("*.tar"))
    if manifest:
        faults += [Fault(str(folder / name), f"is not in {MANIFEST}") for name in found if name not in listed]
    count = 0
    with tqdm(desc=str(folder), unit="shard", total=len(listed or found), disable=None) as bar:
        for number, name in enumerate(listed or found):
            expected = manifest["shards"][number] if manifest else None
            path = folder / name
            damage, members = _check_file(path, expected)
            if members is not None:
                members, left_out = (members, Counter()) if manifest else choose_members(members)
                tell_left_out(path, left_out)
                samples = [m for m in members if m.extension in IMAGE_EXTENSIONS or m.extension == ARRAY_EXTENSION]
                count += len(samples)
                if manifest and index is not None:
                    damage += _check_index(path, index.get(name), samples, members)
                if not fast:
                    damage += _decode_all(path, samples, tuple(manifest["shape"]) if manifest else None, workers)
            faults += damage
            bar.update()
    if manifest and not faults and count != manifest["count"]:
        what = f"counts {manifest['count']} samples where the shards hold {count}"
        faults.append(Fault(str(folder / MANIFEST), what))
    return faults, count


def _read_manifest(folder: Path) -> tuple[dict | None, dict | None, list[Fault]]:
    """(manifest or None, index by shard or None, faults)."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_text(path, MOST_INDEX_BYTES))
        if manifest["version"] != MANIFEST_VERSION:
            what = f"version {manifest['version']}, this program reads {MANIFEST_VERSION}"
            return None, None, [Fault(str(path), what)]
        tuple(map(int, manifest["shape"])), int(manifest["count"])
        index_sha256 = manifest["index_sha256"]
        for shard in manifest["shards"]:
            int(shard["bytes"]), str(shard["sha256"]), int(shard["count"])
            if shard["file"] != os.path.basename(shard["file"]):
                raise ValueError(f"{shard['file']!r} is no file name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, None, [Fault(str(path), f"unreadable ({error!r})")]
    try:
        data = read_text(folder / INDEX, MOST_INDEX_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return manifest, None, [Fault(str(folder / INDEX), f"cannot be read ({reason})")]
    faults = []
    if hashlib.sha256(data.encode()).hexdigest() != index_sha256:
        faults.append(Fault(str(folder / INDEX), f"sha256 differs from what {MANIFEST} says"))
    try:
        index = {shard["file"]: shard for shard in json.loads(data)}
    except (ValueError, KeyError, TypeError) as error:
        return manifest, None, [*faults, Fault(str(folder / INDEX), f"unreadable ({error!r})")]
    return manifest, index, faults


def _check_file(path: Path, expected: dict | None) -> tuple[list[Fault], list[TarMember] | None]:
    """(faults, members where the headers can be walked) of a shard."""
    if not path.is_file():
        return [Fault(str(path), "is missing")], None
    damage = []
    if expected is not None:
        size = path.stat().st_size
        if size != expected["bytes"]:
            damage.append(Fault(str(path), f"has {size} bytes of {expected['bytes']}"))
        elif sha256_of(path) != expected["sha256"]:
            damage.append(Fault(str(path), f"sha256 differs from what {MANIFEST} says"))
    try:
        return damage, scan_shard(path)
    except InputError as error:
        what = str(error).removeprefix(f"{path}: ").partition(";")[0]
        return [*damage, Fault(str(path), what)], None


def _check_index(path: Path, entry: dict | None, samples: list[TarMember], members: list[TarMember]) -> list[Fault]:
    """Whether the index tells the keys, places and labels that the tar's headers tell."""
    if entry is None:
        return [Fault(str(path), f"is not in {INDEX}")]
    told = [entry.get(field) for field in ("keys", "offsets", "sizes")]
    if told != [[m.key for m in samples], [m.offset for m in samples], [m.size for m in samples]]:
        return [Fault(str(path), f"{INDEX} tells other samples than the shard's headers")]
    labels = {member.key: member for member in members if member.extension == LABEL_EXTENSION}
    with open(path, "rb") as file:
        stored = [os.pread(file.fileno(), m.size, m.offset) for m in map(labels.get, told[0]) if m is not None]
    if stored != [str(label).encode() for label in entry.get("labels", [])]:
        return [Fault(str(path), f"{INDEX} tells other labels than the shard")]
    return []


def _decode_all(path: Path, samples: list[TarMember], shape: tuple | None, workers: int) -> list[Fault]:
    chunks = [samples[first : first + CHUNK] for first in range(0, len(samples), CHUNK)]
    return [fault for faults in map_in_order(partial(_decode, path, shape), chunks, workers) for fault in faults]


def _decode(path: Path, shape: tuple | None, samples: list[TarMember]) -> list[Fault]:
    faults = []
    with open(path, "rb") as file:
        for member in samples:
            where = f"{path}: sample {member.key!r}"
            try:
                kind = "array" if member.extension == ARRAY_EXTENSION else "image"
                found, _ = decode(os.pread(file.fileno(), member.size, member.offset), kind)
            except UNREADABLE as error:
                faults.append(Fault(where, f"cannot be decoded ({' '.join(str(error).split())})"))
            else:
                if shape is not None and found != shape:
                    faults.append(Fault(where, f"has shape {found} where {MANIFEST} says {shape}"))
    return faults


class OtherSet:
    """The samples of a set by their contents, to find them in another one.

    Args:
        folder: of shards.
        workers: threads that decode.

    Raises:
        InputError: the folder cannot be read as a set.
    """

    def __init__(self, folder: Path, workers: int):
        self.folder, self._workers = folder, workers
        shards = ShardSet(folder)
        self._shape = tuple(shards.shape)
        self._keys: dict[str, list[str]] = defaultdict(list)
        for key, digest in zip(shards.keys, _digests(shards, workers), strict=True):
            self._keys[digest].append(key)

    def check_shape(self, folder: Path, shape: tuple[int, ...]) -> None:
        """Refuse to compare what can never be equal.

        Raises:
            InputError: samples of the two sets differ in shape.
        """
        if tuple(shape) != self._shape:
            raise InputError(
                f"--other {self.folder}: samples of shape {self._shape} where {folder} has {tuple(shape)}; "
                "pack both at one resolution"
            )

    def shared(self, keys: list[str], digests: list[str]) -> dict:
        """The report's entry ``in_other``: this set's folder, and [key, keys here] of each shared sample."""
        return {"folder": str(self.folder), "samples": shared_samples(keys, digests, self._keys)}

    def shared_with(self, folder: Path) -> dict:
        """The same of the shards in ``folder``."""
        shards = ShardSet(folder)
        self.check_shape(folder, shards.shape)
        return self.shared(shards.keys, _digests(shards, self._workers))


def _digests(shards: ShardSet, workers: int) -> list[str]:
    chunks = [range(first, min(first + CHUNK, len(shards))) for first in range(0, len(shards), CHUNK)]
    digests = map_in_order(lambda chunk: [digest_of(shards.read(index)) for index in chunk], chunks, workers)
    return [digest for chunk in digests for digest in chunk]
