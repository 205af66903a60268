"""What ``rdmd pack`` reads: each source turns command-line arguments into the sets that are to be written."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rdmd_fast.errors import InputError
from rdmd_fast.randomness import Philox, Stream

Sample = tuple[str, np.ndarray, int | None]
"""Key, uint8 [H, W, 3] or float32 array, class label or None."""

MAX_UNREADABLE = 0.01  # share of a source's files
CHUNK = 16  # samples that a worker loads, and an encoder encodes, at a time


@dataclass(frozen=True)
class SampleSet:
    """One set of shards to be written.

    Attributes:
        folder: where below --out, "" for --out itself.
        content: what the set is made of, JSON types; equal content means an equal set.
        count: positions in it; fewer samples come where some cannot be read.
        load: the sample at a position in [0, count), from any thread; raises ``pictures.UNREADABLE`` for a file
            that cannot be read.
        classes: names of the classes that labels count.
        paths: the file at each position, for messages; needed only where ``load`` meets unreadable files.
        generated: made here and not read: there is nothing to doubt, so no report is written unless --other asks.
        encode: turns a list of up to ``CHUNK`` arrays into as many others, from one thread; None leaves them.
    """

    folder: str
    content: dict
    count: int
    load: Callable[[int], Sample]
    classes: list[str] | None = None
    paths: Sequence[str] | None = None
    generated: bool = False
    encode: Callable[[list[np.ndarray]], Iterable[np.ndarray]] | None = None


class Unreadable:
    """Files of one source that could not be read: a few are listed and skipped, more are an error."""

    def __init__(self, source: str, count: int):
        self._source, self._count, self._unreadable = source, count, 0

    def skip(self, path: str, reason: str) -> None:
        """Note one of them.

        Raises:
            InputError: they are more than ``MAX_UNREADABLE`` of the source by now.
        """
        self._unreadable += 1
        print(f"skipped, unreadable: {self._source}: {path} ({reason})", file=sys.stderr)
        if self._unreadable > MAX_UNREADABLE * self._count:
            raise InputError(
                f"{self._source}: {self._unreadable} of {self._count} files are unreadable (the last is {path}: "
                f"{reason}), over {MAX_UNREADABLE:.0%}; mend or remove the files listed above"
            )


def hold_out(count: int, share: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of each split in rising order: {"": all} for share 0, else a random ``share`` as "test".

    Raises:
        InputError: one side would be empty.
    """
    if share == 0:
        return {"": np.arange(count)}
    held_out = round(share * count)
    if not 0 < held_out < count:
        raise InputError(f"--holdout {share} of {count} samples leaves one side empty; choose another share")
    order = Philox(seed).permutation(Stream.SPLIT, 0, count).numpy()
    return {"test": np.sort(order[:held_out]), "train": np.sort(order[held_out:])}
