"""One device's share of a translation: files are read ahead and written behind while the networks compute."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.translation.inputs import Samples, Unreadable
from rdmd_fast.translation.methods import Method
from rdmd_fast.translation.outputs import Outputs
from rdmd_fast.translation.sizes import Crop, Resize, Tiles


class TranslationPlan(NamedTuple):
    """What to translate, and how. Small: it is sent to other processes.

    Attributes:
        method: what translates a batch.
        autoencoder: folder of a diffusers AutoencoderKL, or None.
        batch_size: most images, tiles or latents at a time.
        skip_unreadable: go on after a sample that cannot be read.
        threads: that read, and as many that write.
    """

    method: Method
    autoencoder: str | None
    samples: Samples
    size: Crop | Resize | Tiles
    outputs: Outputs
    batch_size: int = 64
    skip_unreadable: bool = False
    threads: int = 1


class Sample(NamedTuple):
    """A sample as the networks take it: uint8 [h, w, 3] of an image of that size one by one, or float32 [C, H, W]."""

    pieces: Iterable[np.ndarray]
    height: int = 0
    width: int = 0


class Translator:
    """A job's method, and autoencoder if any, on a device.

    Attributes:
        note: what the method says of the last batch.
    """

    def __init__(self, job: TranslationPlan, device: torch.device, autoencoder=None):
        self.job, self.device, self.note = job, device, ""
        self.method = job.method.load(device)
        if autoencoder is None and job.autoencoder:
            from rdmd_fast.model_files.autoencoder import Autoencoder

            autoencoder = Autoencoder(job.autoencoder)
        self.autoencoder = autoencoder.to(device) if autoencoder else None

    def __call__(self, pieces: np.ndarray, numbers: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What ``Outputs`` asks for of n pieces (see ``Sample``): float32 [n, C, H, W], and levels [n, h, w, 3].

        Args:
            numbers: of the samples that they are of, n.

        Raises:
            InputError: a translation that is not finite, or too little memory.
        """
        try:
            return self._finish(self.translate(pieces, numbers), numbers)
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {self.job.batch_size}: does not fit the memory of {self.device}, lower it"
            ) from None

    def _finish(self, translated: torch.Tensor, numbers: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
        outputs = self.job.outputs
        self._check_finite(translated, numbers)
        arrays = translated.cpu().numpy() if outputs.arrays else None
        if not outputs.images:
            return arrays, None
        images = translated
        if self.autoencoder:
            images = self.autoencoder.decode(translated)
            self._check_finite(images, numbers)
        return arrays, _levels(images, self.job.size.blends).permute(0, 2, 3, 1).cpu().numpy()

    def _check_finite(self, batch: torch.Tensor, numbers: Sequence[int]) -> None:
        finite = batch.isfinite().flatten(1).all(1)
        if not finite.all():
            number = numbers[int(finite.logical_not().nonzero()[0])]
            raise InputError(self.job.method.not_finite(self.job.samples.names[number]))

    @torch.no_grad()
    def translate(self, pieces: np.ndarray, numbers: Sequence[int]) -> torch.Tensor:
        """uint8 images [N, H, W, C] or float32 latents [N, C, H, W] in; float32 [N, C, H, W] out, in data units."""
        from rdmd_fast.kernels.image_normalize import image_normalize

        x = torch.from_numpy(pieces).to(self.device)
        if pieces.dtype == np.uint8:
            x = image_normalize(x.permute(0, 3, 1, 2), torch.float32)
            x = self.autoencoder.encode(x) if self.autoencoder else x
        translated, self.note = self.method(x, torch.tensor(numbers))
        return translated


def _levels(images: torch.Tensor, exact: bool) -> torch.Tensor:
    """[-1, 1] to [0, 255]: the nearest uint8, or float32 if ``exact``."""
    from rdmd_fast.pixels import to_uint8

    if not exact:
        return to_uint8(images)
    return ((images.float() + 1) * 127.5).clamp(0, 255)


def work(
    job: TranslationPlan,
    device: str | torch.device,
    chunks: Sequence[Sequence[int]],
    report: Callable[[int, list[str]], None],
    autoencoder=None,
) -> str:
    """Translate chunks of samples (numbers) and write them.

    Samples of a chunk go through the networks together, so what is computed does not depend on the other chunks. At
    most three chunks' samples are read ahead, and as many wait to be written.

    Args:
        report: is told how many samples more are written, and which ones could not be read (a line each).
        autoencoder: of ``job``, if it is loaded already.

    Returns:
        What the method says of its last batch, "" if there was none.

    Raises:
        InputError: no such model, an unreadable sample (unless skipped), or an output that cannot be written.
    """
    from rdmd_fast.data.threads import map_in_order

    translator = Translator(job, torch.device(device), autoencoder)
    ahead = 2 * max(map(len, chunks), default=1)
    stream = map_in_order(lambda index: _read(job, index), itertools.chain(*chunks), job.threads, ahead)
    writing: deque = deque()
    writers = ThreadPoolExecutor(job.threads)
    try:
        for chunk in chunks:
            read = [(index, next(stream)) for index in chunk]
            unreadable = [str(sample) for _, sample in read if isinstance(sample, Unreadable)]
            if unreadable:
                report(0, unreadable)
            read = [(index, sample) for index, sample in read if not isinstance(sample, Unreadable)]
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
    return translator.note


def _translate_chunk(
    job: TranslationPlan, translator: Translator, writers: ThreadPoolExecutor, read: list[tuple[int, Sample]]
) -> Iterator[Future]:
    """Start the writing of each sample."""
    names = job.samples.names
    if job.size.blends:
        for index, sample in read:
            yield writers.submit(job.outputs.write, names[index], None, _blend(job, translator, index, sample))
        return
    pieces = np.stack([piece for _, sample in read for piece in sample.pieces])
    arrays, levels = translator(pieces, [index for index, _ in read])
    for place, (index, sample) in enumerate(read):
        array, level = (None if each is None else each[place : place + 1] for each in (arrays, levels))
        yield writers.submit(_write, job, names[index], sample, array, level)


def _blend(job: TranslationPlan, translator: Translator, index: int, sample: Sample) -> np.ndarray:
    """The image that translated tiles make; a batch of them is held at a time."""
    tiles = iter(sample.pieces)
    batches = iter(lambda: list(itertools.islice(tiles, job.batch_size)), [])
    translated = (tile for batch in batches for tile in translator(np.stack(batch), [index] * len(batch))[1])
    return job.size.join(translated, sample.height, sample.width)


def _read(job: TranslationPlan, index: int) -> Sample | Unreadable:
    try:
        sample = job.samples.read(index)
    except Unreadable as error:
        if job.skip_unreadable:
            return error
        raise
    return Sample(sample[None]) if job.samples.latents else Sample(job.size.split(sample), *sample.shape[:2])


def _write(
    job: TranslationPlan, name: str, sample: Sample, arrays: np.ndarray | None, levels: np.ndarray | None
) -> None:
    """``arrays`` and ``levels`` are of one piece, or None."""
    image = None
    if levels is not None:
        image = levels[0] if job.samples.latents else job.size.join(levels, sample.height, sample.width)
    job.outputs.write(name, None if arrays is None else arrays[0], image)
