"""Reading sample i of a set of WebDataset tars by its byte offset, without walking the tars.

A packed folder holds ``shard-*.tar``, ``index.json`` (keys, offsets, sizes and class labels) and
``manifest.json``, which is written last: a folder with a manifest is complete. Foreign WebDataset tars work too;
their headers are scanned once, at opening.
"""

import hashlib
import json
import os
import re
import weakref
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from rdmd_fast.data.sample_names import names_in_shards
from rdmd_fast.data.shards.locate import locate
from rdmd_fast.data.shards.parts import Part
from rdmd_fast.data.shards.sample_reader import SampleReader
from rdmd_fast.errors import InputError

_MAX_OPEN = 256  # sets of more shards open a file for each read instead of holding them all


class ShardSet:
    """The samples of a set of shards in one fixed order: shards as named, samples as they stand in them.

    Args:
        path: folder with ``manifest.json`` (from ``rdmd pack``) or with WebDataset .tar files of png, jpg,
            jpeg, webp or npy samples, .cls class labels beside them or not; or anything else that ``locate`` opens,
            several in one included. Other members are ignored.
        tolerant: damaged shards are opened; what cannot be read of them is in ``cut`` and ``faults``.
        cache_dir: where remote shards and, if ``tolerant``, indexes of foreign ones are kept (locate.default_cache).

    Attributes:
        path: the folder, or the text that names the set.
        kind: "image" or "array".
        shape: of one sample, (H, W, 3) or as stored, (D,) for points.
        extension: of the samples.
        keys: WebDataset keys, list of len(self) strings.
        classes: names of the classes that ``labels`` count, where the manifest tells them.
        shards: list of parts.Shard.
        reader: of the samples, for whoever wants bytes.
        cut: bool [len], samples whose bytes are not all there; all False unless ``tolerant``.
        faults: what is wrong with each damaged shard, by its name.
        left_out: images that are not read, and how many of them.

    Raises:
        InputError: folder missing or without shards, unfinished or damaged packing, truncated shard.
    """

    def __init__(self, path: str | Path | Sequence[str], tolerant: bool = False, cache_dir: str | Path | None = None):
        parts = locate(path, tolerant, cache_dir)
        self.path = Path(path) if isinstance(path, str | Path) else Path("::".join(path))
        self.shards = [shard for part in parts for shard in part.shards]
        self.keys = [key for shard in self.shards for key in shard.keys]
        if not self.keys:
            raise InputError(f"{self.path}: holds no samples{_first_fault(self.shards)}; pack it again")
        self.extension, self.kind, self.shape = parts[0].extension, parts[0].kind, parts[0].shape
        self.classes = parts[0].classes if all(part.classes == parts[0].classes for part in parts) else None
        self._parts = parts
        self.left_out = sum((part.left_out for part in parts), Counter())
        self._first = [0, *accumulate(len(shard.keys) for shard in self.shards)]
        self._offsets = np.concatenate([np.asarray(shard.offsets, dtype=np.int64) for shard in self.shards])
        self._sizes = np.concatenate([np.asarray(shard.sizes, dtype=np.int64) for shard in self.shards])
        self._names = _names([shard.path for shard in self.shards])
        self.faults = {
            name: shard.faults[0] for name, shard in zip(self._names, self.shards, strict=True) if shard.faults
        }
        paths = [shard.path for shard in self.shards]
        self.reader = SampleReader(
            self.kind,
            list(map(str, paths)),
            list(map(_open, paths)) if len(paths) <= _MAX_OPEN else [None] * len(paths),
            self._first,
            memoryview(self._offsets),
            memoryview(self._sizes),
            self.shape,
        )
        self._close = weakref.finalize(self, _close, self.reader.files)
        self.cut = self._find_cut()
        for part in parts[1:]:
            self._check_alike(parts[0], part)
        if self.shape is None:
            self.shape = self.reader.shape = self._first_shape(tolerant)

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
        try:
            sample = self.reader.read(index)
        except InputError as error:
            raise InputError(f"{self.where(index)} {error}") from error
        return np.frombuffer(sample, np.uint8 if self.kind == "image" else np.float32).reshape(self.shape)

    def where(self, index: int) -> str:
        """What messages call a sample."""
        return f"{self.shards[int(self.shard_of(index))].path}: sample {self.keys[index]!r}"

    def close(self) -> None:
        """Close the shards; nothing is read any more."""
        self._close()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class of each sample, int64 [len]; None where the set has none. Foreign tars are read when first asked.

        Raises:
            InputError: a sample of foreign tars has no .cls member beside it, or no whole number >= 0 in it.
        """
        if not any(shard.labels is not None or shard.label_members for shard in self.shards):
            return None
        labels = np.empty(len(self), dtype=np.int64)
        for shard, first, end in zip(self.shards, self._first, self._first[1:], strict=False):
            if shard.labels is not None:
                labels[first:end] = shard.labels
            else:
                labels[first:end] = [self._read_label(index) for index in range(first, end)]
        return labels

    @property
    def shard_names(self) -> list[str]:
        """What messages and metrics call the shards: file names, with folders where those are not unique."""
        return self._names

    @cached_property
    def sample_names(self) -> list[str]:
        """Keys, with the shard's name where shards share them; InputError where two samples still share a name."""
        return names_in_shards(self._names, [shard.keys for shard in self.shards])

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [len(shard.keys) for shard in self.shards]

    @property
    def lost(self) -> int:
        """Samples that damage has taken from the set before they were counted, an estimate."""
        return sum(shard.lost for shard in self.shards)

    def shard_hashes(self) -> list[str | None]:
        """What each shard holds, whatever its path: 16 hexadecimal digits of a SHA-256.

        It is the shard's own where a manifest tells it; else of names, places and sizes of its samples and of the bytes
        of the first and the last, None where these cannot be read.
        """
        hashes: list[str | None] = []
        for part in self._parts:
            numbers = range(len(hashes), len(hashes) + len(part.shards))
            hashes += map(self._headers_sha256, numbers) if part.shas is None else [sha[:16] for sha in part.shas]
        return hashes

    def _headers_sha256(self, shard: int) -> str | None:
        of_shard, first, end = self.shards[shard], self._first[shard], self._first[shard + 1]
        told = [of_shard.keys, list(of_shard.offsets), list(of_shard.sizes)]
        digest = hashlib.sha256(json.dumps(told).encode())
        try:
            for index in (first, end - 1) if first < end else ():
                digest.update(self.reader.fetch(index))
        except InputError:
            return None
        return digest.hexdigest()[:16]

    @cached_property
    def identity(self) -> str:
        """Text that differs between sets, and between states of the files of one."""
        digest = hashlib.sha256(np.concatenate([self._offsets, self._sizes]).tobytes())
        for shard in self.shards:
            digest.update(str(shard.path.absolute()).encode(errors="surrogateescape"))
            if shard.path.exists():
                state = shard.path.stat()
                digest.update(f" {state.st_size} {state.st_mtime_ns} {state.st_ino}".encode())
        return digest.hexdigest()

    def shard_of(self, indices: int | np.ndarray) -> np.ndarray:
        """Which shard holds a sample, by its number."""
        return np.searchsorted(self._first, indices, side="right") - 1

    def _read_label(self, index: int) -> int:
        shard = int(self.shard_of(index))
        member = (self.shards[shard].label_members or {}).get(self.keys[index])
        if member is None:
            raise InputError(f"{self.where(index)} has no .cls member where others do; label all samples or none")
        text = self.reader.pread(shard, member.offset, min(member.size, 20)).strip()
        if not re.fullmatch(rb"[0-9]{1,18}", text):
            raise InputError(f"{self.where(index)}: .cls holds {text!r}, no class number; write it as decimal text")
        return int(text)

    def _find_cut(self) -> np.ndarray:
        cut = np.zeros(len(self), dtype=bool)
        for shard, first, end in zip(self.shards, self._first, self._first[1:], strict=False):
            if shard.faults:
                size = shard.path.stat().st_size if shard.path.is_file() else 0
                cut[first:end] = self._offsets[first:end] + self._sizes[first:end] > size
        return cut

    def _first_shape(self, tolerant: bool) -> tuple[int, ...]:
        """Shape of the first sample, of the first readable one if ``tolerant``."""
        for index in range(len(self)):
            try:
                return self.reader.decode(self.reader.fetch(index))[0]
            except InputError as error:
                if not tolerant or index == len(self) - 1:
                    raise InputError(f"{self.where(index)} {error}") from error
        raise AssertionError("a set has samples")

    def _check_alike(self, first: Part, other: Part) -> None:
        if other.kind != first.kind or (first.shape and other.shape and first.shape != other.shape):
            raise InputError(
                f"{self.path}: {other.shards[0].path.parent} holds {other.kind} samples of shape {other.shape} where "
                f"{first.shards[0].path.parent} holds {first.kind} of {first.shape}; pack them alike"
            )


def _names(paths: list[Path]) -> list[str]:
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _first_fault(shards) -> str:
    faults = [f"{shard.path.name} {shard.faults[0]}" for shard in shards if shard.faults]
    return f" ({'; '.join(faults[:3])})" if faults else ""


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # each read says so
        return None


def _close(files: list[int | None]) -> None:
    for file in files:
        if file is not None:
            os.close(file)
    files.clear()  # their numbers may be another file's next
