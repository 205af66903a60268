"""One device's share of a translation: files are read ahead and written behind while the generator computes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.errors import InputError

from .inputs import Samples, Unreadable
from .outputs import Outputs
from .sizes import Crop, Resize, Tiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Job(NamedTuple):
    """What to translate, and how. Small: it is sent to other processes.

    Attributes:
        model: folder of a generator's export.
        autoencoder: folder of a diffusers AutoencoderKL, or None.
        dtype: of the generator, a key of ``DTYPES``.
        batch_size: most images, tiles or latents at a time.
        skip_unreadable: go on after a sample that cannot be read.
        threads: that read, and as many that write.
        transport_weight: λ for a generator of a range of them, None for its middle.
    """

    model: str
    autoencoder: str | None
    samples: Samples
    size: Crop | Resize | Tiles
    outputs: Outputs
    dtype: str = "fp32"
    batch_size: int = 64
    skip_unreadable: bool = False
    threads: int = 1
    transport_weight: float | None = None


class Piece(NamedTuple):
    """A sample as the generator takes it: uint8 [n, h, w, 3] of an image of that size, or float32 [1, C, H, W]."""

    pieces: np.ndarray
    height: int = 0
    width: int = 0


class Translator:
    """Generator, and autoencoder if any, on a device."""

    def __init__(self, job: Job, device: torch.device, autoencoder=None):
        from rdmd_fast.networks.exported import load_generator

        self.job, self.device = job, device
        self.generator = load_generator(job.model).to(device=device, dtype=DTYPES[job.dtype])
        if autoencoder is None and job.autoencoder:
            from rdmd_fast.latents import Autoencoder

            autoencoder = Autoencoder(job.autoencoder)
        self.autoencoder = autoencoder.to(device) if autoencoder else None

    def __call__(self, pieces: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What ``Outputs`` asks for of pieces (see ``Piece``): float32 [n, C, H, W], and levels [n, h, w, 3]."""
        try:
            parts = [self._finish(self.translate(part)) for part in _parts(pieces, self.job.batch_size)]
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {self.job.batch_size}: does not fit the memory of {self.device}, lower it"
            ) from None
        return tuple(None if each[0] is None else np.concatenate(each) for each in zip(*parts, strict=True))

    def _finish(self, translated: torch.Tensor) -> tuple[np.ndarray | None, np.ndarray | None]:
        outputs = self.job.outputs
        arrays = translated.cpu().numpy() if outputs.arrays else None
        if not outputs.images:
            return arrays, None
        images = self.autoencoder.decode(translated) if self.autoencoder else translated
        return arrays, _levels(images, self.job.size.blends).permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def translate(self, pieces: np.ndarray) -> torch.Tensor:
        """uint8 images [N, H, W, C] or float32 latents [N, C, H, W] in; float32 [N, C, H, W] out, in data units."""
        from rdmd_fast.kernels.image_normalize import image_normalize

        x = torch.from_numpy(pieces).to(self.device)
        if pieces.dtype == np.uint8:
            x = image_normalize(x.permute(0, 3, 1, 2), torch.float32)
            x = self.autoencoder.encode(x) if self.autoencoder else x
        return self.generator(x, self.job.transport_weight)


def _parts(pieces: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (pieces[first : first + size] for first in range(0, len(pieces), size))


def _levels(images: torch.Tensor, exact: bool) -> torch.Tensor:
    """[-1, 1] to [0, 255]: the nearest uint8, or float32 if ``exact``; NaN becomes mid grey in both."""
    from rdmd_fast.drawing import to_uint8

    if not exact:
        return to_uint8(images)
    return ((images.float().nan_to_num() + 1) * 127.5).clamp(0, 255)


def work(
    job: Job,
    device: str | torch.device,
    chunks: Sequence[Sequence[int]],
    report: Callable[[int, list[str]], None],
    autoencoder=None,
) -> None:
    """Translate chunks of samples (numbers) and write them.

    Samples of a chunk go through the generator together, so what is computed does not depend on the other chunks.

    Args:
        report: is told how many samples more are written, and which ones could not be read (a line each).
        autoencoder: of ``job``, if it is loaded already.

    Raises:
        InputError: no such model, an unreadable sample (unless skipped), or an output that cannot be written.
    """
    from rdmd_fast.data.images import map_in_order

    translator = Translator(job, torch.device(device), autoencoder)
    ahead = 2 * max(map(len, chunks), default=1)
    stream = map_in_order(lambda index: _read(job, index), itertools.chain(*chunks), job.threads, ahead)
    writing: deque = deque()
    writers = ThreadPoolExecutor(job.threads)
    try:
        for chunk in chunks:
            read = [(index, next(stream)) for index in chunk]
            unreadable = [str(piece) for _, piece in read if isinstance(piece, Unreadable)]
            if unreadable:
                report(0, unreadable)
            read = [(index, piece) for index, piece in read if not isinstance(piece, Unreadable)]
            if read:
                writing.extend(_translate_chunk(job, translator, writers, read))
            while len(writing) > ahead or (writing and writing[0].done()):
                writing.popleft().result()
                report(1, [])
        while writing:
            writing.popleft().result()
            report(1, [])
    finally:
        stream.close()
        writers.shutdown(cancel_futures=True)


def _translate_chunk(job: Job, translator: Translator, writers: ThreadPoolExecutor, read: list[tuple[int, Piece]]):
    """Start the writing of each sample; yields futures."""
    arrays, levels = translator(np.concatenate([piece.pieces for _, piece in read]))
    first = 0
    for index, piece in read:
        own = slice(first, first + len(piece.pieces))
        first = own.stop
        yield writers.submit(
            _write, job, index, piece, None if arrays is None else arrays[own], None if levels is None else levels[own]
        )


def _read(job: Job, index: int) -> Piece | Unreadable:
    try:
        sample = job.samples.read(index)
    except Unreadable as error:
        if job.skip_unreadable:
            return error
        raise
    return Piece(sample[None]) if job.samples.latents else Piece(job.size.split(sample), *sample.shape[:2])


def _write(job: Job, index: int, piece: Piece, arrays: np.ndarray | None, levels: np.ndarray | None) -> None:
    image = None
    if levels is not None:
        image = levels[0] if job.samples.latents else job.size.join(levels, piece.height, piece.width)
    job.outputs.write(job.samples.names[index], None if arrays is None else arrays[0], image)
