"""Packing at full length: images/s by workers, the same bytes from each, and from a run killed half-way.

    python -m benchmarks.packing [--images 10000] [--workers 1 2]

The images are generated: JPEGs of 96 to 512 pixels a side, RGB, grey and CMYK, in all eight EXIF orientations.
Exits with 1 if any two outputs differ.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

RESOLUTION = 64
MODES, SHARES = ("RGB", "L", "CMYK"), (0.8, 0.1, 0.1)
ORIENTATION = 0x0112  # the EXIF tag


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` smooth, noisy pictures, the same each time, a thousand a folder."""
    random = np.random.default_rng(0)
    for i in range(count):
        width, height = map(int, random.integers(96, 513, 2))
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-12, 13, (height, width, 1), dtype=np.int16)
        exif = Image.Exif()
        exif[ORIENTATION] = int(random.integers(1, 9))
        path = folder / f"{i // 1000:02d}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(str(random.choice(MODES, p=SHARES)))
        image.save(path, quality=90, exif=exif)


def pack(images: Path, out: Path, workers: int) -> subprocess.Popen:
    """Start ``rdmd pack``."""
    words = ["pack", str(images), "--out", str(out), "--resolution", str(RESOLUTION), "--workers", str(workers)]
    return subprocess.Popen([sys.executable, "-m", "rdmd_fast.cli", *words], stdout=subprocess.DEVNULL)


def killed(images: Path, out: Path, workers: int) -> int:
    """Kill a packing once a shard is finished and the next is begun; how many were finished."""
    process = pack(images, out, workers)
    while not (list(out.glob("shard-*.json.partial")) and list(out.glob("shard-*.tar.tmp"))):
        if process.poll() is not None:
            raise SystemExit("packing ended before it could be killed: take more --images than one shard has")
        time.sleep(0.01)
    time.sleep(1)
    process.kill()
    process.wait()
    return len(list(out.glob("shard-*.json.partial")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000, help="JPEGs to generate (default: 10000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.images} JPEGs to {RESOLUTION}x{RESOLUTION}")
    with tempfile.TemporaryDirectory() as scratch:
        images, out = Path(scratch) / "images", Path(scratch) / "out"
        write_images(images, args.images)
        results = []
        for workers in args.workers:
            start = time.perf_counter()
            if pack(images, out, workers).wait():
                return 1
            seconds = time.perf_counter() - start
            print(f"{workers} workers: {args.images / seconds:.0f} images/s, start of the program included", flush=True)
            results.append(shutil.move(out, Path(scratch) / f"workers{workers}"))
        finished = killed(images, out, args.workers[-1])
        if pack(images, out, args.workers[-1]).wait():
            return 1
        print(f"killed with {finished} shards finished, then resumed")
        results.append(out)
        names = sorted(path.name for path in results[0].iterdir())
        same = all(
            sorted(path.name for path in other.iterdir()) == names
            and not any(filecmp.cmpfiles(results[0], other, names, shallow=False)[1:])
            for other in results[1:]
        )
    print("all outputs are the same, byte for byte" if same else "the outputs DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
