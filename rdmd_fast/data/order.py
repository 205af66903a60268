"""The order of a data set's samples, a pure function of (seed, position)."""

from collections.abc import Sequence

import numpy as np

from rdmd_fast.randomness import Philox, Stream

# Positions of the order's stream that no epoch reaches: epochs draw at their own number.
_SHARDS = 1 << 62
_WINDOWS = 1 << 61
_KEPT = 4  # permutations in memory


class EpochOrder:
    """Each epoch another random order: shards permuted, then the samples of each window of them together.

    A set that fits one window is permuted as a whole. Any position is reached at once.

    Args:
        philox: the run's counter-based generator.
        stream: stream of the orders.
        counts: samples of each shard.
        window: shards whose samples are permuted together.
    """

    def __init__(self, philox: Philox, stream: Stream, counts: Sequence[int], window: int):
        self._philox, self._stream = philox, stream
        self._counts = np.asarray(counts, dtype=np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._window = max(1, window)
        self._windows = -(-len(self._counts) // self._window)
        self.len = int(self._counts.sum())
        self._kept: dict[tuple, np.ndarray] = {}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Which samples stand at ``positions``, int64 [N] of non-negative values: int64 [N] in [0, len)."""
        epochs, places = np.divmod(positions, self.len)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            indices[of_epoch] = self._of_epoch(epoch, places[of_epoch])
        return indices

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self._windows <= 1:
            return self._permutation(epoch, self.len)[places]
        shards = self._permutation(_SHARDS + epoch, len(self._counts))
        ends = np.cumsum(self._counts[shards])
        last = np.append(np.arange(self._window, len(shards), self._window), len(shards)) - 1
        ends = ends[last]  # of the windows
        windows = np.searchsorted(ends, places, side="right")
        indices = np.empty_like(places)
        for window in np.unique(windows).tolist():
            chosen = windows == window
            begin = ends[window - 1] if window else 0
            members = self._members(epoch, window, shards)
            indices[chosen] = members[places[chosen] - begin]
        return indices

    def _members(self, epoch: int, window: int, shards: np.ndarray) -> np.ndarray:
        """The samples of a window in their order."""
        key = ("window", epoch, window)
        if key not in self._kept:
            inside = shards[window * self._window : (window + 1) * self._window]
            samples = np.concatenate([self._first[shard] + np.arange(self._counts[shard]) for shard in inside])
            number = _WINDOWS + epoch * self._windows + window
            self._keep(key, samples[self._draw(number, len(samples))])
        return self._kept[key]

    def _permutation(self, number: int, count: int) -> np.ndarray:
        if number not in self._kept:
            self._keep(number, self._draw(number, count))
        return self._kept[number]

    def _draw(self, number: int, count: int) -> np.ndarray:
        return self._philox.permutation(self._stream, number, count).numpy()

    def _keep(self, key, order: np.ndarray) -> None:
        self._kept[key] = order
        # A batch straddles two epochs at most, unless the set is smaller than the batch.
        for old in list(self._kept)[:-_KEPT]:
            del self._kept[old]
