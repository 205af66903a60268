"""The samples of a shard set, ours or any WebDataset tars, as files to be packed again."""

import json
import os
import re
from pathlib import Path

from rdmd_fast.data.sample_names import names_in_shards
from rdmd_fast.data.shards.folder_kind import Contents, Kind
from rdmd_fast.data.shards.parts import (
    ARRAY_EXTENSION,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    MANIFEST,
    choose_members,
)
from rdmd_fast.data.shards.tar import TarMember, scan_shard
from rdmd_fast.errors import InputError


class ShardFiles:
    """Images and arrays of a folder of tars in their order, the interface of ``files.FolderFiles``.

    Args:
        contents: of the folder.
        extension: of the samples; None for images of any, or arrays.

    Attributes:
        origin: the folder, for messages.
        paths: KEY.EXTENSION of each sample; SHARD/KEY.EXTENSION where shards share keys.
        classes: names of the classes, where a manifest tells them.
        left_out: images that are not read, and how many of them.

    Raises:
        InputError: packing was interrupted, a shard is missing or cut short, or two images share a key.
    """

    def __init__(self, contents: Contents, extension: str | None = None):
        folder = self._folder = contents.folder
        self.origin = str(folder)
        packed = contents.kind is Kind.PACKED
        if packed and not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: packing was interrupted; run the same `rdmd pack` command again")
        self.classes, listed = _manifest(folder) if packed else (None, {})
        shards = sorted(listed) or contents.paths
        self._fingerprints = {name: listed.get(name, "") for name in shards}
        self.left_out = contents.left_out.copy()
        found = [(name, member) for name in shards for member in self._members(name, extension)]
        wanted = {extension} if extension else IMAGE_EXTENSIONS | {ARRAY_EXTENSION}
        samples = [(name, member) for name, member in found if member.extension in wanted]
        self._check_keys(samples)
        names = names_in_shards([name for name, _ in samples], [[member.key] for _, member in samples])
        self._places = {f"{name}.{place[1].extension}": place for name, place in zip(names, samples, strict=True)}
        self._label_places = {(name, m.key): m for name, m in found if m.extension == LABEL_EXTENSION}
        self.paths = list(self._places)

    def _members(self, name: str, extension: str | None) -> list[TarMember]:
        members = self._scan(name)
        if extension:  # names are taken as WebDataset has them: this may be one of several dots
            return members
        members, left_out = choose_members(members)
        self.left_out += left_out
        return members

    def _check_keys(self, samples: list[tuple[str, TarMember]]) -> None:
        """A photo and its mask under one key are one sample of two images."""
        taken: dict[tuple[str, str], TarMember] = {}
        for name, member in samples:
            first = taken.setdefault((name, member.key), member)
            if first is not member:
                kinds = f"({first.extension} and {member.extension})"
                choice = f", or choose one kind, say by --extension {first.extension}"
                raise InputError(
                    f"{self._folder / name}: two samples share the key {member.key!r} {kinds}; keep one of them"
                    f"{choice if first.extension != member.extension else ''}"
                )

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
    """(class names or None, sha256 by shard) of a packed set."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = {shard["file"]: str(shard["sha256"]) for shard in manifest["shards"]}
        if any(name != os.path.basename(name) for name in shards):
            raise ValueError("shards outside the folder")
        return manifest.get("classes"), shards
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: unreadable ({error!r}); pack the set again") from error
