"""Memory that checks every access: bounds, alignment, and races of threads with no barrier between them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from tests.gpu_stand_in.ptx.faults import Fault

_WARP_BITS, _EPOCH_BITS = 8, 24
_MANY_WARPS = (1 << _WARP_BITS) - 1
_MANY_BLOCKS = (1 << 31) - 1


class Accessors:
    """Who accesses: of each thread its block, its warp there, and how many barriers the block has passed."""

    def __init__(self, block: np.ndarray, warp: np.ndarray, epoch: np.ndarray):
        self.block = block.astype(np.int64)
        self.warp = warp.astype(np.int64)
        self.epoch = epoch.astype(np.int64)

    def tags(self) -> np.ndarray:
        return (self.block << (_WARP_BITS + _EPOCH_BITS)) | (self.epoch << _WARP_BITS) | (self.warp + 1)


def _conflicts(last: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """Whether accesses ``last`` and ``tags`` are in no order: other blocks, or other warps with no barrier between."""
    others = (last != tags) & (last != 0)
    if not others.any():
        return others
    same_epoch = (last >> _WARP_BITS) == (tags >> _WARP_BITS)
    same_block = (last >> (_WARP_BITS + _EPOCH_BITS)) == (tags >> (_WARP_BITS + _EPOCH_BITS))
    return others & (same_epoch | ~same_block)


# History is kept for pairs of bytes, which every access but those of single bytes covers whole.
_CELL = 2


def _by_copies(last: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """Whether accesses ``last`` are reads of one place by several warps of the block that ``tags`` belongs to."""
    blocks = _WARP_BITS + _EPOCH_BITS
    return (last & _MANY_WARPS == _MANY_WARPS) & (last >> blocks == tags >> blocks)


class History:
    """Who read and who wrote each place last.

    Args:
        copies: a place that several warps of a block read may then be written: Triton has each of them compute the
            same, where a tile has fewer elements than the block threads, and stores what one of them computes.
    """

    def __init__(self, size: int, copies: bool = False):
        self._copies = copies
        self._read = np.zeros(size // _CELL + 1, np.int64)
        self._written = np.zeros(size // _CELL + 1, np.int64)
        self._was_read = self._was_written = False

    def read(self, offsets: np.ndarray, width: int, accessors: Accessors) -> None:
        cells = max(width // _CELL, 1)
        rows, tags = offsets // (cells * _CELL), accessors.tags()[:, None]
        if self._was_written and _conflicts(_rows(self._written, cells)[rows], tags).any():
            raise Fault("race: reads what other threads wrote with no barrier between")
        read = _rows(self._read, cells)
        before = read[rows] if self._was_read else np.int64(0)
        read[rows] = tags
        self._was_read = True
        self._remember_many(read, rows, before, tags)

    def write(self, content: np.ndarray, offsets: np.ndarray, values: np.ndarray, accessors: Accessors) -> None:
        """Put ``values`` into ``content``.

        Two may write the same to one place, as Triton's layouts do. Lanes of one warp may write different things there
        at once: PTX does not say which stays, here that of the last lane does.
        """
        width, tags = values.shape[1], accessors.tags()[:, None]
        cells = max(width // _CELL, 1)
        rows, written = offsets // (cells * _CELL), _rows(self._written, cells)
        if self._was_read and self._overwrites(_rows(self._read, cells)[rows], tags):
            raise Fault("race: writes what other threads read with no barrier between")
        places, content = offsets // width, _rows(content, width)
        before = _conflicts(written[rows], tags)
        lost = before.any() and _differ(content[places], values, cells) & before
        content[places], written[rows] = values, tags
        self._was_written = True
        at_once = _conflicts(written[rows], tags)
        lost |= at_once.any() and _differ(content[places], values, cells) & at_once
        if np.any(lost):
            raise Fault("race: writes what other threads wrote with no barrier between")

    def _overwrites(self, read: np.ndarray, tags: np.ndarray) -> bool:
        conflicts = _conflicts(read, tags)
        return bool((conflicts & ~_by_copies(read, tags) if self._copies else conflicts).any())

    @staticmethod
    def _remember_many(read: np.ndarray, rows: np.ndarray, before: np.ndarray, tags: np.ndarray) -> None:
        """Where several warps, or blocks, read in one epoch, the next writer must wait for all of them."""
        after = read[rows]
        many = _conflicts(before, tags) | _conflicts(after, tags)
        if not many.any():
            return
        blocks = _WARP_BITS + _EPOCH_BITS
        of_blocks = ((before >> blocks != tags >> blocks) & (before != 0)) | (after >> blocks != tags >> blocks)
        marked = np.where(of_blocks, _MANY_BLOCKS << blocks, after) | _MANY_WARPS
        some = many.any(axis=1)
        read[rows[some]] = np.where(many, marked, after)[some]


def _differ(content: np.ndarray, values: np.ndarray, cells: int) -> np.ndarray:
    """Whether what is in a cell is not what a thread wrote there."""
    return (content != values).reshape(len(values), cells, -1).any(axis=2)


def _rows(values: np.ndarray, width: int) -> np.ndarray:
    """One row for each place that an aligned access of ``width`` can have."""
    return values[: len(values) // width * width].reshape(-1, width)


class GlobalMemory:
    """What is allocated on the device; the history of one launch.

    Args:
        blocks: (address, size) of each allocation.
        copies: as of a history.
    """

    def __init__(self, blocks: Iterable[tuple[int, int]], copies: bool = False):
        self._copies = copies
        blocks = sorted(blocks)
        self._starts = np.array([start for start, _ in blocks], np.uint64)
        self._sizes = np.array([size for _, size in blocks], np.uint64)
        self._bytes: dict[int, np.ndarray] = {}
        self._histories: dict[int, History] = {}

    def load(self, addresses: np.ndarray, width: int, accessors: Accessors) -> np.ndarray:
        """``width`` bytes from each address: an array of (addresses, width)."""
        out = np.empty((len(addresses), width), np.uint8)
        for block, here, offsets in self._places(addresses, width):
            self._history(block).read(offsets, width, _chosen(accessors, here))
            out[here] = _rows(self._content(block), width)[offsets // width]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, accessors: Accessors) -> None:
        """``values`` is an array of (addresses, bytes)."""
        width = values.shape[1]
        for block, here, offsets in self._places(addresses, width):
            self._history(block).write(self._content(block), offsets, values[here], _chosen(accessors, here))

    def _places(self, addresses: np.ndarray, width: int):
        """(number of the allocation, which addresses are in it, their offsets)."""
        if addresses.size == 0:
            return
        misaligned = addresses % np.uint64(width) > 0
        if misaligned.any():
            raise Fault(f"misaligned: access of {width} bytes at {int(addresses[misaligned][0]):#x}")
        numbers = self._numbers(addresses, width)
        if (numbers == numbers[0]).all():
            yield int(numbers[0]), slice(None), (addresses - self._starts[numbers[0]]).astype(np.int64)
            return
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            yield int(number), here, (addresses[here] - self._starts[number]).astype(np.int64)

    def _numbers(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Of the allocations that hold the accesses whole."""
        numbers = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        outside = numbers < 0
        if len(self._starts):
            known = np.maximum(numbers, 0)
            outside |= addresses - self._starts[known] + np.uint64(width) > self._sizes[known]
        if outside.any():
            first = int(addresses[outside][0])
            raise Fault(f"out of bounds: {outside.sum()} accesses of {width} bytes, the first at {first:#x}")
        return numbers

    def _content(self, number: int) -> np.ndarray:
        if number not in self._bytes:
            memory = (ctypes.c_uint8 * int(self._sizes[number])).from_address(int(self._starts[number]))
            self._bytes[number] = np.ctypeslib.as_array(memory)
        return self._bytes[number]

    def _history(self, number: int) -> History:
        if number not in self._histories:
            self._histories[number] = History(int(self._sizes[number]), self._copies)
        return self._histories[number]


def _chosen(accessors: Accessors, here: np.ndarray | slice) -> Accessors:
    if isinstance(here, slice):
        return accessors
    return Accessors(accessors.block[here], accessors.warp[here], accessors.epoch[here])


class SharedMemory:
    """Of several blocks, each its own, one behind the other.

    Args:
        size: bytes of one.
    """

    def __init__(self, size: int, blocks: int):
        # Multiples of 16, so that rows of no access cross from one block to the next.
        self._size, self._stride = size, (size + 15) // 16 * 16
        self._bytes = np.full(self._stride * blocks, 0xFF, np.uint8)
        self._history = History(self._stride * blocks)

    def load(self, offsets: np.ndarray, width: int, slot: np.ndarray, accessors: Accessors) -> np.ndarray:
        """``width`` bytes from each offset, of the block in each ``slot``."""
        places = self._places(offsets, width, slot)
        self._history.read(places, width, accessors)
        return _rows(self._bytes, width)[places // width]

    def store(self, offsets: np.ndarray, values: np.ndarray, slot: np.ndarray, accessors: Accessors) -> None:
        width = values.shape[1]
        places = self._places(offsets, width, slot)
        self._history.write(self._bytes, places, values, accessors)

    def _places(self, offsets: np.ndarray, width: int, slot: np.ndarray) -> np.ndarray:
        offsets = offsets.astype(np.int64)
        outside = (offsets < 0) | (offsets + width > self._size)
        if outside.any():
            raise Fault(f"out of bounds: {width} bytes at {int(offsets[outside][0])} of shared memory of {self._size}")
        if (offsets % width).any():
            raise Fault(f"misaligned: access of {width} bytes of shared memory")
        return slot.astype(np.int64) * self._stride + offsets


class LocalMemory:
    """Of each thread its own.

    Args:
        size: bytes of one.
    """

    FIRST = 2**16  # its addresses begin here: kernels go below the beginning, and come back by an offset

    def __init__(self, size: int, threads: int):
        self._bytes = np.full((threads, (size + 15) // 16 * 16), 0xFF, np.uint8)
        self._size = size

    def load(self, addresses: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        return self._bytes[threads[:, None], self._places(addresses, width)]

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        self._bytes[threads[:, None], self._places(addresses, values.shape[1])] = values

    def _places(self, addresses: np.ndarray, width: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.FIRST
        if ((offsets < 0) | (offsets + width > self._size)).any():
            raise Fault(f"out of bounds: access of {width} bytes of local memory of {self._size}")
        if (offsets % width).any():
            raise Fault(f"misaligned: access of {width} bytes of local memory")
        return offsets[:, None] + np.arange(width)
