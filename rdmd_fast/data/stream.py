"""Endless streams of samples as pure functions of (seed, position), so that a resumed run needs no state.

A position counts a stream's samples from the start of the run. In a data set of n samples, position p is
sample permutation(epoch)[p mod n] of epoch p // n; in a toy it is the p-th point. Ranks and micro-batches ask
for their own positions, so the data do not depend on how a batch is split.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError

from rdmd_fast.data.shards import ShardSet
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

_POOL_FROM = 8  # samples from which decoding on threads repays handing them over


class SampleStream:
    """Samples of a shard set, each epoch in a fresh random order.

    Decoded samples stay in memory if the whole set fits ``cache_bytes``: images as uint8, each decoded when
    first asked for. Larger sets are decoded anew each time.

    Args:
        shards: the samples.
        philox: the run's counter-based generator.
        order_stream: stream of the epochs' orders.
        cache_bytes: memory for decoded samples, of this process.

    Attributes:
        shape: of one sample as ``batch`` returns it, (C, H, W) or (D,).
        len: samples in the set.
        shards: as given.
    """

    def __init__(self, shards: ShardSet, philox: Philox, order_stream: Stream, cache_bytes: int = 4 << 30):
        self.shards, self.len = shards, len(shards)
        self.shape = channels_first(shards)
        self._philox, self._order_stream = philox, order_stream
        self._orders: dict[int, np.ndarray] = {}
        self._dtype = np.uint8 if shards.kind == "image" else np.float32
        size = self.len * int(np.prod(shards.shape)) * np.dtype(self._dtype).itemsize
        # Pages of the cache are taken as samples come in, not here.
        self._cache = np.empty((self.len, *shards.shape), self._dtype) if size <= cache_bytes else None
        self._decoded = np.zeros(self.len, dtype=bool)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def batch(self, positions: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """The samples at ``positions``, int64 [N] of non-negative values.

        Returns:
            uint8 [N, C, H, W] in channels_last memory (see ``kernels.image_normalize``), or float32 [N, D].

        Raises:
            ValueError: a negative position.
            InputError: a sample cannot be read.
        """
        return self._tensor(self.indices(positions))

    def indices(self, positions: torch.Tensor | Sequence[int]) -> np.ndarray:
        """Which samples of the set stand at ``positions``: int64 [N] in [0, len)."""
        positions = _checked(positions)
        epochs, places = np.divmod(positions, self.len)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            indices[of_epoch] = self._order(epoch)[places[of_epoch]]
        return indices

    def labels(self, positions: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Class labels of the samples at ``positions``: int64 [N], on the CPU.

        Raises:
            ValueError: a negative position.
            InputError: the set has no labels.
        """
        labels = self.shards.labels
        if labels is None:
            raise InputError(
                f"{self.shards.path}: its samples carry no class labels; pack them with --labels, "
                "name data.target_class, or take a network without classes"
            )
        return torch.from_numpy(labels[self.indices(positions)])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = self._philox.permutation(self._order_stream, epoch, self.len).numpy()
            # A batch straddles two epochs at most, unless the set is smaller than the batch.
            for old in list(self._orders)[:-2]:
                del self._orders[old]
        return self._orders[epoch]

    def _tensor(self, indices: np.ndarray) -> torch.Tensor:
        if self._cache is None:
            samples = np.empty((len(indices), *self.shards.shape), self._dtype)
            self._read_into(samples, range(len(indices)), indices)
        else:
            missing = np.unique(indices[~self._decoded[indices]])
            self._read_into(self._cache, missing, missing)
            self._decoded[missing] = True
            samples = self._cache.take(indices, axis=0)
        batch = torch.from_numpy(samples)
        return batch.permute(0, 3, 1, 2) if self.shards.kind == "image" else batch

    def _read_into(self, out: np.ndarray, rows: Sequence[int], indices: np.ndarray) -> None:
        """out[rows[i]] = sample indices[i]."""

        def read(row: int, index: int) -> None:
            out[row] = self.shards.read(int(index))

        spread = self._pool.map if len(indices) >= _POOL_FROM else map
        for _ in spread(read, rows, indices):
            pass


class ToyStream:
    """Points of a toy distribution, drawn a block of consecutive positions at a time and served from it.

    Args:
        distribution: the toy.
        philox: the run's counter-based generator.
        stream: stream of the points.

    Attributes:
        shape: (2,).
        len: None, the stream never repeats.
        distribution: as given.
    """

    # A small draw costs mostly the calls; 16,384 points take about as long as 32 batches of 512 should.
    _BLOCK = 1 << 14
    _KEPT = 2

    shape = (2,)
    len = None

    def __init__(self, distribution: ToyDistribution, philox: Philox, stream: Stream):
        self.distribution = distribution
        self._philox, self._stream = philox, stream
        self._blocks: dict[int, torch.Tensor] = {}

    def batch(self, positions: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """The points at ``positions`` (int64 [N], non-negative): float32 [N, 2], as ``distribution.sample``.

        Raises:
            ValueError: a negative position.
        """
        positions = torch.from_numpy(_checked(positions))
        if not len(positions):
            return torch.empty(0, 2)
        first, last = (int(end) // self._BLOCK for end in torch.aminmax(positions))
        if first == last:
            return self._block(first)[positions - first * self._BLOCK]
        if last - first >= self._KEPT:
            return self.distribution.sample(self._philox, self._stream, positions)
        both = torch.cat([self._block(first), self._block(last)])
        return both[positions - first * self._BLOCK]

    def _block(self, number: int) -> torch.Tensor:
        if number not in self._blocks:
            positions = torch.arange(number * self._BLOCK, (number + 1) * self._BLOCK)
            self._blocks[number] = self.distribution.sample(self._philox, self._stream, positions)
            for old in list(self._blocks)[: -self._KEPT]:
                del self._blocks[old]
        return self._blocks[number]


def open_stream(
    spec: str | Path | ToyDistribution,
    philox: Philox,
    role: Literal["source", "target"],
    cache_bytes: int = 4 << 30,
) -> SampleStream | ToyStream:
    """Open what ``data.source`` or ``data.target`` names.

    Args:
        spec: a folder of shards, a toy distribution, or ``toy:NAME`` for a toy as it comes.
        philox: the run's counter-based generator.
        role: picks the streams of randomness, so that source and target are independent on the same data.
        cache_bytes: memory for the decoded samples of a shard set, of this process.

    Raises:
        InputError: the shards cannot be opened, or no such toy.
    """
    order, points = {
        "source": (Stream.SOURCE_ORDER, Stream.SOURCE_POINTS),
        "target": (Stream.TARGET_ORDER, Stream.TARGET_POINTS),
    }[role]
    if isinstance(spec, str) and spec.startswith("toy:"):
        try:
            spec = ToyDistribution(toy=spec.removeprefix("toy:"))
        except ValidationError as error:
            raise InputError(f"data.{role}: no such toy {spec!r} ({error.errors()[0]['msg']})") from error
    if isinstance(spec, ToyDistribution):
        return ToyStream(spec, philox, points)
    return SampleStream(ShardSet(spec), philox, order, cache_bytes)


def channels_first(shards: ShardSet) -> tuple[int, ...]:
    """Shape of a sample as networks take it: (C, H, W) of an image, (D,) of an array."""
    if shards.kind != "image":
        return shards.shape
    height, width, channels = shards.shape
    return channels, height, width


def _checked(positions: torch.Tensor | Sequence[int]) -> np.ndarray:
    positions = torch.as_tensor(positions, dtype=torch.int64, device="cpu").numpy()
    if len(positions) and positions.min() < 0:
        raise ValueError(f"position {positions.min()} is negative")
    return positions
