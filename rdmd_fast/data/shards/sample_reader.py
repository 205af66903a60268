"""One sample of a set of shards by its number, as bytes for a row of memory.

Imported by decoding workers, which shall start fast and stay small: no torch here, and numpy for arrays alone.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from rdmd_fast.data.pictures import UNREADABLE, decode_rgb
from rdmd_fast.errors import InputError

UNKNOWN, GOOD, BAD = 0, 1, 2
"""What is known of a sample: nothing, that it was read, that it cannot be read."""

_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class SampleReader:
    """Where each sample's bytes lie, and how they are decoded.

    Args:
        kind: "image" or "array".
        paths: of the shards.
        files: open descriptors of the shards; None for one that is opened anew for each read.
        first: number of each shard's first sample, and of all samples at the end.
        offsets, sizes: of the samples in their shards, bytes; int64 memory.
        shape: of one sample, (H, W, 3) or as stored; None where the first one will tell.
    """

    def __init__(
        self,
        kind: str,
        paths: Sequence[str],
        files: Sequence[int | None],
        first: Sequence[int],
        offsets: memoryview,
        sizes: memoryview,
        shape: tuple[int, ...] | None,
    ):
        self.kind, self.shape = kind, shape
        self.files = list(files)
        self._paths, self._first, self._offsets, self._sizes = list(paths), list(first), offsets, sizes

    def read(self, index: int) -> bytes:
        """Sample ``index``: uint8 of an image, native float32 of an array, in C order of ``shape``.

        Raises:
            InputError: what is wrong with it; which sample that is the caller knows.
            OSError, MemoryError: the machine has no memory or no open file left; nothing is known of the sample.
        """
        shape, sample = self.decode(self.fetch(index))
        if shape != self.shape:
            raise InputError(f"has shape {shape} where the set has {self.shape}; pack the set at one resolution")
        return sample

    def fetch(self, index: int) -> bytes:
        """The sample's bytes as they stand in its shard; raises as ``read`` does."""
        shard, offset, size = bisect_right(self._first, index) - 1, self._offsets[index], self._sizes[index]
        for anew in (False, True):  # twice: a server may have forgotten the open file, or be back in a moment
            try:
                data = self.pread(shard, offset, size, anew)
                break
            except OSError as error:
                if _is_the_machines(error):
                    error.filename = self._paths[shard]
                    raise
                if anew:
                    raise InputError(f"cannot be read ({error.strerror}); copy the shard again") from error
        if len(data) < size:
            raise InputError("is cut short; copy or pack the shard again")
        return data

    def pread(self, shard: int, offset: int, size: int, anew: bool = False) -> bytes:
        """Bytes of a shard, opened ``anew`` or not; OSError where it cannot be read."""
        if self.files[shard] is not None and not anew:
            return os.pread(self.files[shard], size, offset)
        with open(self._paths[shard], "rb") as file:
            return os.pread(file.fileno(), size, offset)

    def decode(self, data: bytes) -> tuple[tuple[int, ...], bytes]:
        """(shape, decoded bytes) of a sample; raises as ``read`` does."""
        try:
            return decode(data, self.kind)
        except UNREADABLE as error:
            if _is_the_machines(error):
                raise
            raise InputError(f"cannot be decoded ({error}); pack the set again") from error

    # -- on their way to workers ---------------------------------------------------------------------------------------

    def to_descriptor(self) -> int:
        """Memory that holds all of this, for ``from_descriptor`` in a process that inherits it and ``files``."""
        fields = {"kind": self.kind, "shape": self.shape, "paths": self._paths, "files": self.files}
        head = json.dumps({**fields, "first": self._first}).encode()
        head += b" " * (-len(head) % 8)
        descriptor = os.memfd_create("rdmd_fast-table")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.write(self._offsets)
            file.write(self._sizes)
        return descriptor

    @classmethod
    def from_descriptor(cls, descriptor: int) -> SampleReader:
        """What ``to_descriptor`` has put there; the places are mapped, not copied."""
        table = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        end = 8 + int.from_bytes(table[:8], "little")
        head = json.loads(bytes(table[8:end]))
        places = table[end:].cast("q")
        half = len(places) // 2
        shape = tuple(head.pop("shape"))
        return cls(**head, shape=shape, offsets=places[:half], sizes=places[half:])


def fill(reader: SampleReader, memory: mmap.mmap, rows: int, pairs: Iterable[tuple[int, int]]) -> dict[int, str]:
    """Read samples into a store's memory (``store.Store``), each pair a sample's number and its row.

    Returns:
        What was wrong with those that could not be read, by number.

    Raises:
        OSError, MemoryError: as ``SampleReader.read``; rows that are not filled stay of unknown status.
    """
    size = len(memory) // rows - 1  # of a sample; one byte more of each is its status
    status, faults = rows * size, {}
    for index, row in pairs:
        try:
            memory[row * size : (row + 1) * size] = reader.read(index)
            memory[status + row] = GOOD
        except InputError as error:
            faults[index] = str(error)
            memory[status + row] = BAD
    return faults


def _is_the_machines(error: Exception) -> bool:
    """Whether it says nothing about the sample, which may well be read the next time."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _OF_THE_MACHINE


def decode(data: bytes, kind: str) -> tuple[tuple[int, ...], bytes]:
    """(shape, bytes) of an image's uint8 [H, W, 3] or a .npy file's float32; raises ``pictures.UNREADABLE``."""
    if kind == "array":
        from rdmd_fast.data.shards.decode_arrays import decode_array

        array = decode_array(data)
        return array.shape, array.tobytes()
    image = decode_rgb(data)
    return (image.height, image.width, 3), image.tobytes()
