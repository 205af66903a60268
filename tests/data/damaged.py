"""Small sets of tars whose samples tell their own number, and ways to damage them."""

import io
import tarfile

import numpy as np
from PIL import Image

from rdmd_fast.data.packing.shard_writer import ShardWriter
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import SampleStream
from rdmd_fast.randomness import Philox, Stream

SHARDS, EACH = 4, 5
COUNT = SHARDS * EACH


def picture(number):
    """A noisy 16x16 image whose first pixel is its number."""
    image = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image[0, 0] = number
    return image


def encoded(number, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, form)
    return buffer.getvalue()


def write_tar(path, numbers, name="{}.png"):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = encoded(number)
            info = tarfile.TarInfo(name.format(number))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def foreign(folder):
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        write_tar(folder / f"shard-{shard:06d}.tar", range(shard * EACH, shard * EACH + EACH))
    return folder


def packed(folder):
    with ShardWriter(folder, {}, "test", EACH) as writer:
        for number in range(COUNT):
            writer.write(f"{number}", picture(number))
        writer.commit()
    return folder


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
