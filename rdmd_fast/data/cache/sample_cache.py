"""Decoded samples by index: kept where the whole set fits the budget, else a window of them read ahead."""

from __future__ import annotations

import numpy as np

from rdmd_fast.data.cache.decoder import Decoder
from rdmd_fast.data.cache.shared_memory import bytes_needed, private_store, shared_store
from rdmd_fast.data.pictures import DECODING
from rdmd_fast.data.shards.sample_reader import BAD, UNKNOWN
from rdmd_fast.data.shards.shard_set import ShardSet


def open_samples(
    shards: ShardSet, cache_bytes: int, workers: int, batches: int, share: bool
) -> CachedSamples | WindowedSamples:
    """The one that fits ``cache_bytes``; ``batches`` is how many are announced ahead of the one that is taken."""
    dtype = np.uint8 if shards.kind == "image" else np.float32
    size = bytes_needed(len(shards), shards.shape, dtype)
    if size <= cache_bytes:
        return CachedSamples(shards, dtype, workers, share)
    return WindowedSamples(shards, dtype, workers, batches if workers else 0)  # in line nothing is announced


class CachedSamples:
    """Every sample is decoded once, when first asked for or ahead of that.

    Attributes:
        status: of each sample, uint8 [len] (see ``shared_memory``); of all processes on the node if ``share``.
        complete: whether every sample is known to have been read or found unreadable.
        decoder: who decodes.
    """

    def __init__(self, shards: ShardSet, dtype, workers: int, share: bool):
        shape = (len(shards), shards.shape, dtype)
        self._store = shared_store(f"{shards.identity} {DECODING}", *shape) if share else private_store(*shape)
        self.status = self._store.status
        self.status[shards.cut & (self.status == UNKNOWN)] = BAD
        self._workers = workers
        self.complete = False
        self.decoder = Decoder(shards, self._store, workers)
        self._tickets: dict[int, int] = {}  # of samples that are being decoded

    def load(self, indices: np.ndarray) -> None:
        """Decode what is missing of samples ``indices``; afterwards their status is known."""
        missing = self._missing(indices)
        if missing:
            self._submit(missing)
            self.decoder.wait({self._tickets[index] for index in missing if index in self._tickets})

    def ahead(self, indices: np.ndarray) -> None:
        """Start decoding what will be asked for."""
        if not self._workers:
            return
        missing = self._missing(indices)
        if missing:
            self._submit(missing)
        elif (self.status != UNKNOWN).all():
            self.complete = True
            self.decoder.close()  # workers have nothing left to do

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Samples that have been loaded, a copy."""
        return self._store.samples.take(indices, axis=0)

    def close(self) -> None:
        """End the workers and give the memory back; ``status`` stays."""
        self.decoder.close()
        self.status = self.status.copy()
        self._store.close()

    def _missing(self, indices: np.ndarray) -> list[int]:
        unknown = self.status[indices] == UNKNOWN
        return list(dict.fromkeys(indices[unknown].tolist())) if unknown.any() else []

    def _submit(self, missing: list[int]) -> None:
        self._tickets |= self.decoder.submit([(index, index) for index in missing if index not in self._tickets])
        if len(self._tickets) > 4096:
            self._tickets = {i: ticket for i, ticket in self._tickets.items() if self.status[i] == UNKNOWN}


class WindowedSamples:
    """Samples pass through a ring of rows: those of this batch and of the ones that were announced.

    Attributes:
        status: of each sample, uint8 [len]: GOOD and BAD say how its last reading went.
        complete: False, samples come and go.
        decoder: who decodes.
    """

    complete = False
    _ROWS = 64  # at first

    def __init__(self, shards: ShardSet, dtype, workers: int, batches: int):
        self._shards, self._dtype, self._workers, self._batches = shards, dtype, workers, batches
        self.status = np.full(len(shards), UNKNOWN, dtype=np.uint8)
        self.status[shards.cut] = BAD
        self.decoder: Decoder | None = None
        self._allocate(self._ROWS)

    def load(self, indices: np.ndarray) -> None:
        """Have samples ``indices`` in the ring; afterwards their status is known."""
        wanted = self._wanted(indices)
        self._request(wanted)
        self.decoder.wait({self._tickets[index] for index in wanted if index in self._tickets})
        self.status[wanted] = self._store.status[[self._rows[index] for index in wanted]]

    def ahead(self, indices: np.ndarray) -> None:
        """Start decoding what will be asked for."""
        if self._workers:
            self._request(self._wanted(indices))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Samples that have been loaded by the last ``load``, a copy."""
        rows = np.array([self._rows[index] for index in indices.tolist()], dtype=np.int64)
        return self._store.samples.take(rows, axis=0)

    def close(self) -> None:
        """End the workers and give the memory back; ``status`` stays."""
        self.decoder.close()
        self._store.close()

    def _allocate(self, rows: int) -> None:
        faults = self.decoder.faults if self.decoder else {}
        if self.decoder:
            self.close()
        self._store = private_store(rows, self._shards.shape, self._dtype)
        self.decoder = Decoder(self._shards, self._store, self._workers)
        self.decoder.faults = faults
        self._rows: dict[int, int] = {}  # of samples, the ones longest unused first
        self._tickets: dict[int, int] = {}
        self._free = list(range(rows))

    def _wanted(self, indices: np.ndarray) -> list[int]:
        return list(dict.fromkeys(indices[self.status[indices] != BAD].tolist()))

    def _request(self, wanted: list[int]) -> None:
        """Give each its row. What was asked for longest ago makes room."""
        if (self._batches + 1) * len(wanted) > len(self._store.status):
            self._grow((self._batches + 1) * len(wanted))
        new = []
        for index in wanted:
            if index in self._rows:
                self._rows[index] = self._rows.pop(index)
            else:
                new.append(index)
        for index in new:
            if not self._free:
                self._evict()
            self._rows[index] = self._free.pop()
        if new:
            self._tickets |= self.decoder.submit([(index, self._rows[index]) for index in new])

    def _evict(self) -> None:
        oldest = next(iter(self._rows))
        if oldest in self._tickets:
            self.decoder.wait([self._tickets.pop(oldest)])
        self._free.append(self._rows.pop(oldest))

    def _grow(self, rows: int) -> None:
        self.decoder.wait(list(self._tickets.values()))
        self._allocate(rows)
