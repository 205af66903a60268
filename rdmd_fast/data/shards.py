"""Reading sample i of a folder of WebDataset tars by its byte offset, without walking the tar.

A packed folder holds ``shard-*.tar``, ``index.json`` (keys, offsets, sizes and class labels) and
``manifest.json``, which is written last: a folder with a manifest is complete. Foreign WebDataset tars work too;
their headers are scanned once, at opening.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import weakref
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rdmd_fast.data.images import UNREADABLE, to_rgb
from rdmd_fast.errors import InputError

MANIFEST = "manifest.json"
UNFINISHED_MANIFEST = "manifest.json.partial"
INDEX = "index.json"
MANIFEST_VERSION = 1
IMAGE_EXTENSIONS = frozenset(("png", "jpg", "jpeg", "webp"))
ARRAY_EXTENSION = "npy"
LABEL_EXTENSION = "cls"  # WebDataset's: the class as decimal text

_BLOCK = 512  # bytes of a tar block
_MAX_OPEN = 256  # sets of more shards open a file for each read instead of holding them all


class TarMember(NamedTuple):
    """One regular file of a tar: WebDataset key and extension, and where its bytes lie."""

    key: str
    extension: str
    offset: int
    size: int


def scan_shard(path: Path) -> list[TarMember]:
    """List a shard's members by walking its headers.

    Raises:
        InputError: not a plain tar, or cut short.
    """
    members, end = [], 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + (member.size + _BLOCK - 1) // _BLOCK * _BLOCK
                # WebDataset's naming: the key ends at the first dot of the file name, an extension follows.
                split = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name, flags=re.DOTALL)
                if member.isreg() and split:
                    members.append(TarMember(split[1], split[2].lower(), member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: truncated or not an uncompressed tar ({error}); copy or pack it again") from error
    if path.stat().st_size < end + _BLOCK:
        raise InputError(f"{path}: truncated, the end-of-archive block is missing; copy or pack it again")
    return members


class ShardSet:
    """The samples of a folder of shards in one fixed order: shards by name, samples as they stand in them.

    Args:
        path: folder with ``manifest.json`` (from ``rdmd pack``) or with WebDataset .tar files of png, jpg,
            jpeg, webp or npy samples, .cls class labels beside them or not. Other members are ignored.

    Attributes:
        path: the folder.
        kind: "image" or "array".
        shape: of one sample, (H, W, 3) or as stored, (D,) for points.
        extension: of the samples.
        keys: WebDataset keys, list of len(self) strings.
        classes: names of the classes that ``labels`` count, where the manifest tells them.

    Raises:
        InputError: folder missing or without shards, unfinished or damaged packing, truncated shard.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"{self.path}: no such folder of shards; make one with `rdmd pack SOURCE --out {self.path}`"
            )
        packed = (self.path / MANIFEST).is_file()
        self.classes: list[str] | None = None
        self._packed_labels: np.ndarray | None = None
        self._label_members: list[dict[str, TarMember]] | None = None
        self._names, tables = self._read_index() if packed else self._scan_foreign()
        self.keys = [key for keys, _, _ in tables for key in keys]
        self._first = [0, *accumulate(len(keys) for keys, _, _ in tables)]
        self._offsets = np.concatenate([np.asarray(offsets, dtype=np.int64) for _, offsets, _ in tables])
        self._sizes = np.concatenate([np.asarray(sizes, dtype=np.int64) for _, _, sizes in tables])
        self._files: list[int] | None = None
        if len(self._names) <= _MAX_OPEN:
            self._files = [os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC) for name in self._names]
            weakref.finalize(self, _close, self._files)
        if not packed:
            self.kind = "array" if self.extension == ARRAY_EXTENSION else "image"
            self.shape = self._decode(0, self._bytes(0)).shape

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> np.ndarray:
        """Sample ``index`` in [0, len): uint8 [H, W, 3] of an image, float32 of an array.

        Raises:
            IndexError: no such sample.
            InputError: shard cut short, sample undecodable, or of another shape than the set's.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.path}, which has {len(self)}")
        sample = self._decode(index, self._bytes(index))
        if sample.shape != self.shape:
            raise InputError(
                f"{self._where(index)} has shape {sample.shape} where the set has {self.shape}; "
                "pack the set at one resolution"
            )
        return sample

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class of each sample, int64 [len]; None where the set has none. Foreign tars are read when first asked.

        Raises:
            InputError: a sample of foreign tars has no .cls member beside it, or no whole number >= 0 in it.
        """
        if self._packed_labels is not None or not self._label_members or not any(self._label_members):
            return self._packed_labels
        return np.array([self._read_label(index) for index in range(len(self))], dtype=np.int64)

    def _read_label(self, index: int) -> int:
        shard = self._shard(index)
        member = self._label_members[shard].get(self.keys[index])
        if member is None:
            raise InputError(f"{self._where(index)} has no .cls member where others do; label all samples or none")
        text = self._pread(shard, member.offset, min(member.size, 20)).strip()
        if not re.fullmatch(rb"[0-9]{1,18}", text):
            raise InputError(f"{self._where(index)}: .cls holds {text!r}, no class number; write it as decimal text")
        return int(text)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _where(self, index: int) -> str:
        return f"{self.path / self._names[self._shard(index)]}: sample {self.keys[index]!r}"

    def _bytes(self, index: int) -> bytes:
        size = int(self._sizes[index])
        data = self._pread(self._shard(index), int(self._offsets[index]), size)
        if len(data) < size:
            raise InputError(f"{self._where(index)} is cut short; copy or pack the shard again")
        return data

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        if self._files is not None:
            return os.pread(self._files[shard], size, offset)
        with open(self.path / self._names[shard], "rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _decode(self, index: int, data: bytes) -> np.ndarray:
        try:
            if self.kind == "array":
                return np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32, casting="same_kind")
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                return np.asarray(to_rgb(image))
        except UNREADABLE as error:
            raise InputError(f"{self._where(index)} cannot be decoded ({error}); pack the set again") from error

    def _read_index(self) -> tuple[list[str], list[tuple]]:
        """Shard names and (keys, offsets, sizes) of each, from the manifest and the index beside it."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["version"] != MANIFEST_VERSION:
                raise InputError(
                    f"{self.path / MANIFEST}: version {manifest['version']} where this program reads "
                    f"{MANIFEST_VERSION}; pack the set again"
                )
            self.kind, self.shape = manifest["kind"], tuple(manifest["shape"])
            self.extension = manifest["extension"]
            index_bytes = (self.path / INDEX).read_bytes()
            if hashlib.sha256(index_bytes).hexdigest() != manifest["index_sha256"]:
                raise InputError(f"{self.path / INDEX}: does not belong to {MANIFEST}; copy both again or pack again")
            index = json.loads(index_bytes)
            sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
            tables = [(shard["keys"], shard["offsets"], shard["sizes"]) for shard in index]
            names = [shard["file"] for shard in index]
            self.classes = manifest.get("classes")
            if any("labels" in shard for shard in index):
                labels = [label for shard in index for label in shard["labels"]]
                self._packed_labels = np.array(labels, dtype=np.int64)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{self.path / MANIFEST}: unreadable packing ({error!r}); pack the set again") from error
        for name in names:
            self._check_size(name, sizes[name])
        return names, tables

    def _check_size(self, name: str, expected: int) -> None:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{path}: shard is missing though {MANIFEST} lists it; copy or pack the set again")
        size = path.stat().st_size
        if size != expected:
            fault = "truncated" if size < expected else "too long"
            raise InputError(f"{path}: {fault}, {size} bytes of {expected}; copy or pack the set again")

    def _scan_foreign(self) -> tuple[list[str], list[tuple]]:
        """Shard names and (keys, offsets, sizes) of each, from the tars' own headers; sets ``extension``."""
        if (self.path / UNFINISHED_MANIFEST).exists():
            raise InputError(f"{self.path}: packing was interrupted; run the same `rdmd pack` command again")
        names = sorted(entry.name for entry in self.path.glob("*.tar"))
        if not names:
            raise InputError(f"{self.path}: no {MANIFEST} and no .tar shards here{self._hint()}")
        scanned = [scan_shard(self.path / name) for name in names]
        found = {member.extension for members in scanned for member in members}
        wanted = (found & IMAGE_EXTENSIONS) or (found & {ARRAY_EXTENSION})
        if not wanted:
            raise InputError(
                f"{self.path}: its shards hold no png, jpg, jpeg, webp or npy samples, only "
                f"{', '.join(sorted(found)) or 'nothing'}; convert them or pack the images anew"
            )
        self.extension = min(wanted)
        self._label_members = [{m.key: m for m in members if m.extension == LABEL_EXTENSION} for members in scanned]
        tables = []
        for name, members in zip(names, scanned, strict=True):
            chosen = [member for member in members if member.extension in wanted]
            keys = [member.key for member in chosen]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise InputError(f"{self.path / name}: two images share the key {twice!r}; keep one of them")
            tables.append((keys, [member.offset for member in chosen], [member.size for member in chosen]))
        return names, tables

    def _hint(self) -> str:
        inside = sorted(manifest.parent.name for manifest in self.path.glob(f"*/{MANIFEST}"))
        if inside:
            return f"; name one of the sets inside: {', '.join(inside[:8])}"
        return f"; make them with `rdmd pack SOURCE --out {self.path}`, or unpack compressed ones"


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
