"""What each shard of a data set holds: from its packing's index, or from the tar's own headers."""

import hashlib
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.data.file_walk import HOUSEKEEPING, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from rdmd_fast.data.shards.tar import BLOCK, RECORD, TarMember, walk_shard
from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text

MANIFEST = "manifest.json"
UNFINISHED_MANIFEST = "manifest.json.partial"
INDEX = "index.json"
MANIFEST_VERSION = 1
MOST_INDEX_BYTES = 2**30  # of index.json and manifest.json: ten million samples
MOST_ELEMENTS, MOST_BYTES = 2**28, 2**60  # of a sample, of a shard: more is damage
IMAGE_EXTENSIONS = frozenset(("png", "jpg", "jpeg", "jfif", "webp"))
ARRAY_EXTENSION = "npy"
PICTURE_SUFFIXES = IMAGE_SUFFIXES | UNREAD_SUFFIXES
LABEL_EXTENSION = "cls"  # WebDataset's: the class as decimal text


class Samples(NamedTuple):
    """What of a tar's members is used: ``members``, and how many images, by what they are called, are not."""

    members: list[TarMember]
    left_out: Counter[str]


def choose_members(members: Sequence[TarMember]) -> Samples:
    """Read names with several dots, and count the images that are left out.

    ``img v1.3.png`` is an image of its own; ``0001.seg.png`` is a field of sample 0001, as WebDataset has it, where
    that has an image already or the word "seg" comes again and again.
    """
    pictured = {member.key for member in members if member.extension in IMAGE_EXTENSIONS}
    dotted = [(member.key, *_split(member)) for member in members if "." in member.extension]
    words = Counter(word for _, word, extension in dotted if extension in IMAGE_EXTENSIONS)
    of_their_own = {
        (key, word)
        for key, word, extension in dotted
        if extension in IMAGE_EXTENSIONS and key not in pictured and (words[word] == 1 or not word.isalpha())
    }
    chosen, left_out = [], Counter()
    for member in members:
        word, extension = _split(member)
        if aside := HOUSEKEEPING.intersection(member.key.split("/")):
            left_out[f"members in {min(aside)}"] += 1
            continue
        if (member.key, word) in of_their_own:
            member = member._replace(key=f"{member.key}.{word}", extension=extension)
        elif member.extension not in IMAGE_EXTENSIONS and f".{extension}" in PICTURE_SUFFIXES:
            left_out[f".{member.extension} members"] += 1
        chosen.append(member)
    return Samples(chosen, left_out)


def _split(member: TarMember) -> tuple[str, str]:
    """("seg", "png") of the extension seg.png, ("", "png") of png."""
    word, _, extension = member.extension.rpartition(".")
    return word, extension


class Walked(NamedTuple):
    """A tar's members and faults; ``complete`` if the members are known to be all, readable or not."""

    members: list[TarMember]
    faults: list[str]
    complete: bool


def walk(path: Path) -> Walked:
    """A tar as its headers tell."""
    members, faults = walk_shard(path)
    return Walked(members, faults, not faults)


@dataclass
class Shard:
    """One tar and its samples.

    Attributes:
        path: of the tar, which need not be there.
        keys, offsets, sizes: of its samples.
        labels: their classes, from an index.
        label_members: .cls members by key, of a foreign tar.
        faults: what is wrong with the tar.
        lost: samples that are gone and not among ``keys``, an estimate.
    """

    path: Path
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] | None = None
    label_members: dict[str, TarMember] | None = None
    faults: list[str] = field(default_factory=list)
    lost: int = 0


@dataclass
class Part:
    """Shards that were made together. ``kind`` and ``shape`` are None where only a sample can tell.

    Attributes:
        shas: SHA-256 of each shard, where a manifest tells them.
    """

    shards: list[Shard]
    extension: str
    kind: str
    shape: tuple[int, ...] | None = None
    classes: list[str] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    shas: list[str] | None = None


def read_packed(folder: Path, tolerant: bool = False) -> Part:
    """A folder that `rdmd pack` has finished.

    Raises:
        InputError: manifest or index are damaged; unless ``tolerant``, also a shard that is missing or cut short.
    """
    manifest_path = folder / MANIFEST
    try:
        manifest = json.loads(read_text(manifest_path, MOST_INDEX_BYTES))
        if not (folder / INDEX).is_file():
            raise ValueError(f"{INDEX} is missing")
        if manifest["version"] != MANIFEST_VERSION:
            raise InputError(
                f"{manifest_path}: version {manifest['version']} where this program reads {MANIFEST_VERSION}; "
                "pack the set again"
            )
        index_bytes = (folder / INDEX).read_bytes()
        if hashlib.sha256(index_bytes).hexdigest() != manifest["index_sha256"]:
            raise InputError(f"{folder / INDEX}: does not belong to {MANIFEST}; copy both again or pack again")
        expected = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        shards = [_indexed_shard(folder, each, expected) for each in json.loads(index_bytes)]
        _check_manifest(manifest)
        part = Part(shards, manifest["extension"], manifest["kind"], tuple(manifest["shape"]), manifest.get("classes"))
        sha_of = {shard["file"]: str(shard.get("sha256")) for shard in manifest["shards"]}
        part.shas = [sha_of[shard.path.name] for shard in shards]
        sizes = [expected[shard.path.name] for shard in shards]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{manifest_path}: unreadable packing ({error!r}); pack the set again") from error
    for shard, size in zip(shards, sizes, strict=True):
        fault = _size_fault(shard.path, size)
        if fault and not tolerant:
            raise InputError(f"{shard.path}: {fault}; copy or pack the set again")
        shard.faults += [fault] if fault else []
    return part


def _check_manifest(manifest: dict) -> None:
    """ValueError where a manifest tells no kind and shape of samples."""
    kind, extension, shape, classes = (manifest.get(key) for key in ("kind", "extension", "shape", "classes"))
    known = {"image": IMAGE_EXTENSIONS, "array": (ARRAY_EXTENSION,)}
    if not isinstance(kind, str) or not isinstance(extension, str) or extension not in known.get(kind, ()):
        raise ValueError(f"kind {kind!r} with extension {extension!r}")
    sides = isinstance(shape, list) and all(type(side) is int and 0 < side <= MOST_ELEMENTS for side in shape)
    if (
        not sides
        or len(shape) not in (1, 3)
        or math.prod(shape) > MOST_ELEMENTS
        or (kind == "image" and shape[2:] != [3])
    ):
        raise ValueError(f"shape {str(shape)[:60]}")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("classes that are no names")


def _indexed_shard(folder: Path, entry: dict, expected: dict[str, int]) -> Shard:
    """A shard as index.json tells; ValueError and the like where that makes no sense."""
    name, keys, labels = entry["file"], entry["keys"], entry.get("labels")
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is no file name")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{name}: keys that are no texts")
    for field_name in ("offsets", "sizes", *(["labels"] if labels is not None else [])):
        numbers = entry[field_name]
        if not isinstance(numbers, list) or len(numbers) != len(keys):
            raise ValueError(f"{name}: {field_name} of another number than keys")
        if not all(type(number) is int and 0 <= number < MOST_BYTES for number in numbers):
            raise ValueError(f"{name}: {field_name} that are no numbers from 0 up")
    if type(expected[name]) is not int:
        raise ValueError(f"{name}: bytes that are no number")
    ends = (offset + size for offset, size in zip(entry["offsets"], entry["sizes"], strict=True))
    if max(ends, default=0) > expected[name]:
        raise ValueError(f"{name}: samples beyond its end")
    return Shard(folder / name, keys, entry["offsets"], entry["sizes"], labels)


def _size_fault(path: Path, expected: int) -> str | None:
    if not path.is_file():
        return f"shard is missing though {MANIFEST} lists it"
    size = path.stat().st_size
    if size == expected:
        return None
    return f"{'truncated' if size < expected else 'too long'}, {size} bytes of {expected}"


def read_foreign(
    paths: Sequence[Path], name: str, tolerant: bool = False, walk: Callable[[Path], Walked] = walk
) -> Part:
    """Tars of anybody, from their own headers.

    Args:
        name: what messages call them all.
        walk: lists a tar's members and faults.

    Raises:
        InputError: no samples of a known kind; unless ``tolerant``, also a damaged tar or two samples of one key.
    """
    walked = [_walk(path, tolerant, walk) for path in paths]
    samples = [choose_members(each.members) for each in walked]
    left_out = sum((each.left_out for each in samples), Counter())
    walked = [each._replace(members=chosen.members) for each, chosen in zip(walked, samples, strict=True)]
    found = {member.extension for each in walked for member in each.members}
    wanted = (found & IMAGE_EXTENSIONS) or (found & {ARRAY_EXTENSION})
    if not wanted:
        faults = [f"{path.name} {each.faults[0]}" for path, each in zip(paths, walked, strict=True) if each.faults]
        raise InputError(
            f"{name}: its shards hold no {', '.join(sorted(IMAGE_EXTENSIONS))} or {ARRAY_EXTENSION} samples, only "
            f"{', '.join(sorted(found)) or 'nothing'}"
            f"{' (' + '; '.join(faults[:3]) + ')' if faults else ''}; convert them or pack the images anew"
        )
    shards = []
    for path, (members, known_faults, _) in zip(paths, walked, strict=True):
        chosen: dict[str, TarMember] = {}
        faults = list(known_faults)
        for member in members:
            if member.extension in wanted and (first := chosen.setdefault(member.key, member)) is not member:
                fault = f"two images share the key {member.key!r}"
                if first.extension != member.extension:  # a photo and its mask, say: not damage, and not for us to tell
                    raise InputError(
                        f"{path}: {fault} ({first.extension} and {member.extension}); choose one kind, say by "
                        f"`rdmd pack FOLDER --out SET --extension {first.extension}`"
                    )
                if not tolerant:
                    raise InputError(f"{path}: {fault}; keep one of them")
                faults.append(fault)
        labels = {member.key: member for member in members if member.extension == LABEL_EXTENSION}
        samples = chosen.values()
        shards.append(
            Shard(path, list(chosen), [m.offset for m in samples], [m.size for m in samples], None, labels, faults)
        )
    _estimate_losses(shards, walked)
    kind = "array" if wanted == {ARRAY_EXTENSION} else "image"
    return Part(shards, min(wanted), kind, left_out=left_out)


def _walk(path: Path, tolerant: bool, walk: Callable[[Path], Walked]) -> Walked:
    try:
        walked = walk(path)
    except OSError as error:
        walked = Walked([], [f"cannot be read ({error.strerror})"], False)
    if walked.faults and not tolerant:
        raise InputError(f"{path}: {walked.faults[0]}; copy or pack it again")
    return walked


def _estimate_losses(shards: list[Shard], walked: list[Walked]) -> None:
    """A damaged tar whose members are not known has lost one sample at least.

    It has lost what whole tars hold more, and what the bytes that none of its members takes would hold.
    """
    whole = [len(shard.keys) for shard, each in zip(shards, walked, strict=True) if each.complete]
    usual = int(statistics.median(whole)) if whole else 0
    taken = [sum(map(_bytes_of, each.members)) for each in walked]
    per_sample = sum(taken) / max(1, sum(len(shard.keys) for shard in shards))
    for shard, each, bytes_taken in zip(shards, walked, taken, strict=True):
        if not each.complete:
            size = shard.path.stat().st_size if shard.path.is_file() else 0
            in_gaps = int((size - bytes_taken - RECORD) / per_sample) if per_sample else 0
            shard.lost = max(1, usual - len(shard.keys), in_gaps)


def _bytes_of(member: TarMember) -> int:
    """What a member takes of a tar: a header, and its content in whole blocks."""
    return BLOCK + (member.size + BLOCK - 1) // BLOCK * BLOCK
