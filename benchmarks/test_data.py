"""Samples a second of our stream beside others on the same images; the results go into a table at the end.

    pytest benchmarks/test_data.py --benchmark-json benchmarks/results/data.json [--images 4096]

64x64 JPEG and PNG, batches of 64, one and two workers; first epoch (nothing decoded yet) and cached epochs. Each round
opens its pipeline anew, workers included, but for the cached epochs; indexes are on disk, as after `rdmd pack`. Others:
a plain WebDataset pipeline (shuffle, decode, batch), a torch DataLoader over the image folder, mosaicml-streaming
(extra `bench`; MDS shards of the same files). Workers are worker processes. While our stream waits for a batch its own
process decodes too, what no worker has begun: with one worker two processes decode, where the others' main process
only collects. "Added MiB" is what process and workers hold more than before (PSS), in a round that is not timed.
Speeds are the best of three rounds (cached: of five): the machine may have other work.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks.images import BATCH, FORMATS, SHARDS, encode, write
from rdmd_fast.data.pictures import decode_rgb
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import SampleStream
from rdmd_fast.randomness import Philox, Stream

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def sets(tmp_path_factory, request):
    """One folder a format: the same encoded images as files, WebDataset tars and, where installed, MDS shards."""
    count = request.config.getoption("--images") // (BATCH * SHARDS) * BATCH * SHARDS
    root = tmp_path_factory.mktemp("data")
    for name, (suffix, options) in FORMATS.items():
        files = [encode(number, name, options) for number in range(count)]
        write(root / name, suffix, files)
    return root, count


def rgb(data: bytes | str) -> np.ndarray:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return np.asarray(image.convert("RGB"))


# -- pipelines: each is opened with (folder, count, workers) and gives the batches of one epoch ------------------------


def open_stream(folder: Path, workers: int, cache_bytes: int = 4 << 30) -> SampleStream:
    shards = ShardSet(folder / "tars", tolerant=True, cache_dir=folder / "cache")
    return SampleStream(shards, Philox(0), Stream.SOURCE_ORDER, cache_bytes, workers, prefetch=4)


def epoch(stream: SampleStream, number: int):
    for first in range(number * stream.len, (number + 1) * stream.len, BATCH):
        yield stream.batch(np.arange(first, first + BATCH))


def ours(folder: Path, count: int, workers: int):
    return epoch(open_stream(folder, workers), 0)


def ours_uncached(folder: Path, count: int, workers: int):
    return epoch(open_stream(folder, workers, cache_bytes=0), 0)


def plain_webdataset(folder: Path, count: int, workers: int):
    import webdataset

    urls = sorted(str(path) for path in (folder / "tars").glob("*.tar"))
    pipeline = webdataset.WebDataset(urls, shardshuffle=SHARDS, seed=0).shuffle(1000).decode("rgb8")
    pipeline = pipeline.to_tuple("jpg;png").batched(BATCH)
    return webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers)


class ImageFolder(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.paths = sorted(str(path) for path in folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(rgb(self.paths[index]).copy())


def dataloader(folder: Path, count: int, workers: int):
    return torch.utils.data.DataLoader(ImageFolder(folder / "files"), BATCH, shuffle=True, num_workers=workers)


def mosaicml_streaming(folder: Path, count: int, workers: int):
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed (extra `bench`)")
    target = folder / "mds"
    if not target.exists():
        with streaming.MDSWriter(out=str(target), columns={"image": "bytes"}) as writer:
            for path in sorted((folder / "files").iterdir()):
                writer.write({"image": path.read_bytes()})

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, index):
            return torch.from_numpy(rgb(super().__getitem__(index)["image"]).copy())

    streaming.base.util.clean_stale_shared_memory()
    dataset = Decoded(local=str(target), shuffle=True, batch_size=BATCH)
    return torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers)


PIPELINES = {
    "ours, first epoch": ours,
    "ours, not cached": ours_uncached,
    "WebDataset": plain_webdataset,
    "DataLoader": dataloader,
    "mosaicml-streaming": mosaicml_streaming,
}


# -- measurements ------------------------------------------------------------------------------------------------------


def run_through(batches) -> int:
    """Samples that came."""
    return sum(len(batch[0] if isinstance(batch, tuple | list) else batch) for batch in batches)


def peak_memory(batches) -> float:
    """The most MiB held after any 16th batch and after the last, while workers still live."""
    peak, last = 0.0, None
    for number, batch in enumerate(batches):
        last = batch
        if number % 16 == 15:
            peak = max(peak, memory())
    del last
    return max(peak, memory())


def memory() -> float:
    """MiB that this process and its workers hold, shared pages counted once (PSS)."""
    process = psutil.Process(os.getpid())
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def note(benchmark, request, form: str, pipeline: str, workers: int, count: int, added: float) -> None:
    rate = count / benchmark.stats.stats.min
    row = {"format": form, "pipeline": pipeline, "workers": workers, "samples_per_second": rate, "added_MiB": added}
    benchmark.extra_info.update(row)
    request.config.data_rows.append(row)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_epoch(benchmark, request, sets, form, workers, pipeline):
    root, count = sets
    build, before = PIPELINES[pipeline], memory()
    if pipeline == "mosaicml-streaming":
        pytest.importorskip("streaming", reason="mosaicml-streaming is not installed (extra `bench`)")
    benchmark.group = f"{form}, {workers} workers"
    added = peak_memory(build(root / form, count, workers)) - before  # and warms the page cache
    seen = benchmark.pedantic(lambda: run_through(build(root / form, count, workers)), rounds=3, iterations=1)
    assert seen == count
    note(benchmark, request, form, pipeline, workers, count, added)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
def test_cached_epochs(benchmark, request, sets, form, workers):
    root, count = sets
    before = memory()
    stream = open_stream(root / form, workers)
    assert run_through(epoch(stream, 0)) == count
    numbers = iter(range(1, 100))
    benchmark.group = f"{form}, {workers} workers"
    benchmark.pedantic(lambda: run_through(epoch(stream, next(numbers))), rounds=5, warmup_rounds=1, iterations=1)
    note(benchmark, request, form, "ours, cached", workers, count, memory() - before)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("decode", [decode_rgb, rgb], ids=["ours", "Image.open"])
def test_decoding_alone(benchmark, form, decode):
    files = [encode(number, form, FORMATS[form][1]) for number in range(BATCH)]
    benchmark.group = f"{form}, a batch decoded in line"
    benchmark(lambda: [decode(data) for data in files])
