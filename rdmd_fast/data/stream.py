"""Endless streams of samples as pure functions of (seed, position), so that a resumed run needs no state.

A position counts a stream's samples from the start of the run. In a data set of n samples, position p is
sample order(epoch)[p mod n] of epoch p // n (``order``); in a toy it is the p-th point. Ranks and micro-batches ask
for their own positions, so the data do not depend on how a batch is split.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rdmd_fast.data.cache.sample_cache import open_samples
from rdmd_fast.data.options import DataOptions
from rdmd_fast.data.order import EpochOrder
from rdmd_fast.data.shards.sample_reader import BAD, UNKNOWN
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream


class SampleStream:
    """Samples of a shard set, each epoch in a fresh random order.

    A sample that cannot be read is replaced by the next readable one of a fixed sequence: i, i + s, i + 2 s, …
    modulo the set's size, with s near its golden section, so that neighbours get different substitutes. Which sample
    stands at a position is thus a function of the seed, the position and the files.

    Decoded samples stay in memory if the whole set fits ``cache_bytes``: images as uint8, each decoded when
    first asked for. Larger sets are decoded anew each time.

    Args:
        shards: the samples.
        philox: the run's counter-based generator.
        order_stream: stream of the epochs' orders.
        cache_bytes: memory for decoded samples, of this process or, if ``share``, of the node.
        workers: processes that decode; 0 decodes in line, and nothing ahead.
        prefetch: batches that workers decode ahead. Which these are is guessed from the last two: batches whose
            positions advance by equal steps are foreseen, others are merely not ready.
        window: shards whose samples are shuffled together (see ``EpochOrder``).
        share: whether the node's processes that open the same set share its decoded samples.

    Attributes:
        shape: of one sample as ``batch`` returns it, (C, H, W) or (D,).
        len: samples in the set.
        shards: as given.
        waited: seconds that ``batch`` has taken so far.
    """

    def __init__(
        self,
        shards: ShardSet,
        philox: Philox,
        order_stream: Stream,
        cache_bytes: int = 4 << 30,
        workers: int = 0,
        prefetch: int = 4,
        window: int = 256,
        share: bool = False,
    ):
        self.shards, self.len = shards, len(shards)
        self.shape = channels_first(shards)
        self.waited = 0.0
        self._order = EpochOrder(philox, order_stream, shards.counts, window)
        self._samples = open_samples(shards, cache_bytes, workers, prefetch, share)
        self._prefetch = prefetch if workers else 0
        self._last: np.ndarray | None = None  # positions of the last batch
        self._step = 0  # by which they had advanced
        self._stride = _golden_stride(self.len)

    def batch(self, positions: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """The samples at ``positions``, int64 [N] of non-negative values.

        Returns:
            uint8 [N, C, H, W] in channels_last memory (see ``kernels.image_normalize``), or float32 [N, D].

        Raises:
            ValueError: a negative position.
            InputError: no sample of the set can be read.
        """
        positions = _checked(positions)
        begin = time.perf_counter()
        indices = self._readable(self._order.indices(positions), reload=True)
        batch = torch.from_numpy(self._samples.take(indices))
        self.waited += time.perf_counter() - begin
        self._look_ahead(positions)
        return batch.permute(0, 3, 1, 2) if self.shards.kind == "image" else batch

    def indices(self, positions: torch.Tensor | Sequence[int]) -> np.ndarray:
        """Which samples of the set are served at ``positions``: int64 [N] in [0, len). Those unknown are read.

        Raises:
            ValueError: a negative position.
            InputError: no sample of the set can be read.
        """
        return self._readable(self._order.indices(_checked(positions)))

    def labels(self, positions: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Class labels of the samples at ``positions``: int64 [N], on the CPU.

        Raises:
            ValueError: a negative position.
            InputError: the set has no labels, or no sample of it can be read.
        """
        labels = self.shards.labels
        if labels is None:
            raise InputError(
                f"{self.shards.path}: its samples carry no class labels; pack them with --labels, "
                "name data.target_class, or take a network without classes"
            )
        return torch.from_numpy(labels[self.indices(positions)])

    def close(self) -> None:
        """End the workers, give the memory back and close the shards; no more batches."""
        self._samples.close()
        self.shards.close()

    @property
    def dropped(self) -> np.ndarray:
        """Samples that are known to be unreadable: bool [len]."""
        return self._samples.status == BAD

    def fault(self, index: int) -> str | None:
        """What is wrong with a dropped sample, as far as this process has seen it."""
        name = self.shards.shard_names[int(self.shards.shard_of(index))]
        return self._samples.decoder.faults.get(index) or self.shards.faults.get(name)

    def _readable(self, indices: np.ndarray, reload: bool = False) -> np.ndarray:
        """``indices`` with substitutes for those that cannot be read; all of known status, in memory if ``reload``."""
        status = self._samples.status
        while True:
            served = indices
            dropped = np.flatnonzero(status[indices] == BAD)
            if len(dropped):
                served = indices.copy()
                served[dropped] = [self._substitute(index) for index in indices[dropped].tolist()]
            if reload or (status[served] == UNKNOWN).any():
                self._samples.load(served)
            if not (status[served] == BAD).any():
                return served

    def _substitute(self, index: int) -> int:
        """The first of the sample's sequence that is not known to be unreadable."""
        status = self._samples.status
        for _ in range(self.len - 1):
            index = (index + self._stride) % self.len
            if status[index] != BAD:
                return index
        known = next(iter(self._samples.decoder.faults.values()), "") or next(iter(self.shards.faults.values()), "")
        raise InputError(f"{self.shards.path}: none of its {self.len} samples can be read ({known}); pack it again")

    def _look_ahead(self, positions: np.ndarray) -> None:
        if not self._prefetch or not len(positions) or self._samples.complete:
            return
        step = 0
        if self._last is not None and len(self._last) == len(positions):
            step = int(positions[0] - self._last[0])
        # A step seen once may be a jump (to a picture's samples, say): only a repeated one is followed.
        if step > 0 and step == self._step:
            for batch in range(1, self._prefetch + 1):
                self._samples.ahead(self._order.indices(positions + batch * step))
        self._last, self._step = positions, step


def _golden_stride(count: int) -> int:
    """A step near the golden section of ``count`` that visits every sample once around."""
    stride = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


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

    def close(self) -> None:
        """Forget the points that were drawn."""
        self._blocks.clear()

    def _block(self, number: int) -> torch.Tensor:
        if number not in self._blocks:
            positions = torch.arange(number * self._BLOCK, (number + 1) * self._BLOCK)
            self._blocks[number] = self.distribution.sample(self._philox, self._stream, positions)
            for old in list(self._blocks)[: -self._KEPT]:
                del self._blocks[old]
        return self._blocks[number]


def open_stream(
    spec: str | Path | Sequence[str] | ToyDistribution,
    philox: Philox,
    role: Literal["source", "target"],
    options: DataOptions | None = None,
) -> SampleStream | ToyStream:
    """Open what ``data.source`` or ``data.target`` names.

    Args:
        spec: shards (see ``locate``), a toy distribution, or ``toy:NAME`` for a toy as it comes.
        philox: the run's counter-based generator.
        role: picks the streams of randomness, so that source and target are independent on the same data.
        options: cache, workers and shuffling; by default in line, with a private cache.

    Raises:
        InputError: the shards cannot be opened, or no such toy.
    """
    order, points = {
        "source": (Stream.SOURCE_ORDER, Stream.SOURCE_POINTS),
        "target": (Stream.TARGET_ORDER, Stream.TARGET_POINTS),
    }[role]
    if isinstance(spec, str) and spec.startswith("toy:"):
        spec = ToyDistribution.parse({"toy": spec.removeprefix("toy:")}, f"data.{role} {spec}")
    if isinstance(spec, ToyDistribution):
        return ToyStream(spec, philox, points)
    if options is None:
        return SampleStream(ShardSet(spec, tolerant=True), philox, order)
    return SampleStream(
        ShardSet(spec, tolerant=True, cache_dir=options.cache_dir),
        philox,
        order,
        int(options.cache_gib * 2**30),
        options.workers or 0,
        options.prefetch,
        options.shuffle_shards,
        share=True,
    )


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
