"""Small sets of tars whose samples tell their own number, and ways to damage them."""

import sys
import tarfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # for the processes of tests
import material
import numpy as np
from material import encoded, random_pixels, write_shards

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import SampleStream
from rdmd_fast.randomness import Philox, Stream

SHARDS, EACH = 4, 5
COUNT = SHARDS * EACH


def picture(number):
    """A noisy 16x16 image whose first pixel is its number."""
    image = random_pixels(number, 16, 16, 3)
    image[0, 0] = number
    return image


def write_tar(path, numbers, name="{}.png"):
    material.write_tar(path, [(name.format(number), encoded(picture(number))) for number in numbers])


def foreign(folder):
    for shard in range(SHARDS):
        write_tar(folder / f"shard-{shard:06d}.tar", range(shard * EACH, shard * EACH + EACH))
    return folder


def packed(folder):
    return write_shards(folder, map(picture, range(COUNT)), EACH)


def members(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


def flip(path, offset, count=4):
    with open(path, "r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))


def stream_of(spec, cache=None, **options):
    return SampleStream(
        ShardSet(spec, tolerant=True, cache_dir=cache), Philox(1), Stream.SOURCE_ORDER, **{"prefetch": 2, **options}
    )


def served(stream, first=0, count=None, batch=4):
    """Numbers of the samples at ``count`` positions from ``first`` on, an epoch by default."""
    stop = first + (stream.len if count is None else count)
    batches = [stream.batch(np.arange(at, min(at + batch, stop))) for at in range(first, stop, batch)]
    return [number for each in batches for number in each[:, 0, 0, 0].tolist()]
