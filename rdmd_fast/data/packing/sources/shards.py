"""The samples of a shard set, ours or any WebDataset tars, as files to be packed again."""

import json
import os
import re
from collections import Counter
from pathlib import Path

from rdmd_fast.data.shards.parts import (
    ARRAY_EXTENSION,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    MANIFEST,
    UNFINISHED_MANIFEST,
)
from rdmd_fast.data.shards.tar import TarMember, scan_shard
from rdmd_fast.errors import InputError


def is_packed(folder: Path) -> bool:
    """Whether ``rdmd pack`` wrote, or began to write, a set there."""
    return any((folder / mark).is_file() for mark in (MANIFEST, UNFINISHED_MANIFEST))


class ShardFiles:
    """Images and arrays of a folder of tars in their order, the interface of ``files.FolderFiles``.

    Attributes:
        origin: the folder, for messages.
        paths: KEY.EXTENSION of each sample; SHARD/KEY.EXTENSION where shards share keys.
        classes: names of the classes, where a manifest tells them.

    Raises:
        InputError: packing was interrupted, a shard is missing or cut short.
    """

    def __init__(self, folder: Path):
        self.origin = str(folder)
        self._folder = folder
        if not (folder / MANIFEST).is_file() and (folder / UNFINISHED_MANIFEST).exists():
            raise InputError(f"{folder}: packing was interrupted; run the same `rdmd pack` command again")
        self.classes, listed = _manifest(folder)
        names = sorted(listed or (path.name for path in folder.glob("*.tar")))
        self._places: dict[str, tuple[str, TarMember]] = {}
        self._label_places: dict[tuple[str, str], TarMember] = {}
        self._fingerprints = {name: listed.get(name, "") for name in names}
        scanned = {name: self._scan(name) for name in names}
        wanted = IMAGE_EXTENSIONS | {ARRAY_EXTENSION}
        samples = [(name, member) for name in names for member in scanned[name] if member.extension in wanted]
        taken = Counter((member.key, member.extension) for _, member in samples)
        for name, member in samples:
            prefix = f"{Path(name).stem}/" if taken[member.key, member.extension] > 1 else ""
            path = f"{prefix}{member.key}.{member.extension}"
            if path in self._places:
                raise InputError(f"{folder / name}: two samples share the key {member.key!r}; keep one of them")
            self._places[path] = name, member
        for name in names:
            self._label_places |= {(name, m.key): m for m in scanned[name] if m.extension == LABEL_EXTENSION}
        self.paths = list(self._places)

    def read(self, path: str) -> bytes:
        """A sample's bytes; ValueError where the shard is cut short by now."""
        name, member = self._places[path]
        return self._read_member(name, member)

    def fingerprint(self, path: str) -> str:
        """Place and size, and the shard's sha256 where a manifest tells it; no sample is read."""
        name, member = self._places[path]
        return f"{name} {member.offset} {member.size} {self._fingerprints[name]}"

    def labels(self, paths: list[str]) -> list[int | None]:
        """The class of each sample, all None where the shards hold no .cls.

        Raises:
            InputError: some samples have one and some have none, or it is no whole number.
        """
        if not self._label_places:
            return [None] * len(paths)
        return [self._label(*self._places[path]) for path in paths]

    def _label(self, name: str, sample: TarMember) -> int:
        member = self._label_places.get((name, sample.key))
        text = self._read_member(name, member) if member and member.size <= 20 else b""
        if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", text):
            raise InputError(
                f"{self._folder / name}: sample {sample.key!r} has no class number in a .cls member where others do; "
                "label all samples or none"
            )
        return int(text)

    def _scan(self, name: str) -> list[TarMember]:
        if not (self._folder / name).is_file():
            raise InputError(f"{self._folder / name}: shard is missing though {MANIFEST} lists it; pack the set again")
        return scan_shard(self._folder / name)

    def _read_member(self, name: str, member: TarMember) -> bytes:
        with open(self._folder / name, "rb") as file:
            data = os.pread(file.fileno(), member.size, member.offset)
        if len(data) < member.size:
            raise ValueError(f"{name} is cut short")
        return data


def _manifest(folder: Path) -> tuple[list[str] | None, dict[str, str]]:
    """(class names or None, sha256 by shard) of a packed set; (None, {}) of foreign tars."""
    path = folder / MANIFEST
    if not path.is_file():
        return None, {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = {shard["file"]: str(shard["sha256"]) for shard in manifest["shards"]}
        if any(name != os.path.basename(name) for name in shards):
            raise ValueError("shards outside the folder")
        return manifest.get("classes"), shards
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: unreadable ({error!r}); pack the set again") from error
