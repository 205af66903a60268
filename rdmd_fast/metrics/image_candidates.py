"""The rows of an evaluation: a generator at each λ, the identity map, the untrained generator, other translations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from rdmd_fast.errors import InputError
from rdmd_fast.metrics.paired import fitted_colour_map
from rdmd_fast.model_files.models import Generator, condition_inputs, load_denoiser
from rdmd_fast.networks.feature_networks import fitting
from rdmd_fast.pixels import PixelImages, to_uint8

IDENTITY, UNTRAINED = "identity", "untrained (teacher at σ)"
COLOUR_MAP = "colour map (sees the truth)"


class Candidate(NamedTuple):
    """A row of the table: its name, what makes its images, and further columns."""

    name: str
    make: Callable[[], PixelImages]
    more: dict[str, float]


def candidates(
    images: PixelImages,
    generator: Generator | None,
    model: str | None,
    weights: Sequence[float],
    teacher: str | None,
    device: torch.device,
    batch_size: int,
    truth: PixelImages | None = None,
) -> list[Candidate]:
    """List the generator at each λ, the identity map and the untrained generator, those that apply.

    Where the truth is known so is the colour map that comes nearest to it: what an unpaired method does not see.

    Args:
        images: the sources.
        truth: true translations of the sources, in their order.
        model, teacher: exports of the generator and of its teacher; None for none.
        weights: λ of the generator; none for the middle of its range, or for one that takes none.
    """

    def translate(network: Generator, *rest) -> Callable[[], PixelImages]:
        return lambda: translated(network, images, device, batch_size, *rest)

    rows = []
    if generator is not None:
        for weight in weights:
            condition_inputs(generator.config, weight, 1)  # names a λ that it does not take ahead of any work
        for weight in weights or (None,):
            more = {} if weight is None else {"transport_weight": weight}
            rows.append(Candidate(row_name(weight), translate(generator, model, weight), more))
    rows.append(Candidate(IDENTITY, lambda: images, {}))
    if truth is not None:
        rows.append(Candidate(COLOUR_MAP, lambda: _as_pixels(fitted_colour_map(images, truth)(images[:])), {}))
    if teacher:
        denoiser = load_denoiser(teacher).to(device)
        update = {"reading": "teacher", "transport_weights": None}  # the teacher is not told λ
        untrained = Generator(denoiser.model, generator.config.model_copy(update=update))
        rows.append(Candidate(UNTRAINED, translate(untrained, teacher), {}))
    return rows


def _as_pixels(images: torch.Tensor) -> PixelImages:
    return PixelImages(to_uint8(images))


@torch.no_grad()
def translated(
    generator: Generator,
    images: PixelImages,
    device: torch.device,
    batch_size: int,
    what: str,
    weight: float | None = None,
) -> PixelImages:
    """Translate images as a user receives them: clipped to [-1, 1] and rounded to 8 bits.

    Raises:
        InputError: what comes out is not finite, which a picture would hide; a batch does not fit the memory.
    """
    parts = []
    batches = -(-len(images) // batch_size)
    for part in tqdm(images.split(batch_size), desc=str(what), unit="batch", total=batches, disable=None):
        with fitting(what, device, "--batch-size"):
            outputs = generator(part.to(device), weight)
        if not outputs.isfinite().all():
            raise InputError(f"{what}: gives NaN or infinity, take an earlier export of the run")
        parts.append(to_uint8(outputs).cpu())
    return PixelImages(torch.cat(parts))


def row_names(outputs: Sequence[str], names: Sequence[str]) -> list[str]:
    """Name the folders of ``--outputs``, by their paths where names are shared or those of other rows.

    Args:
        names: rows of the generator.

    Raises:
        InputError: a folder or a λ is named twice.
    """
    folders = [Path(folder) for folder in outputs]
    paths = [str(folder.resolve()) for folder in folders]
    for option, labels in (("--outputs", paths), ("--transport-weight", names)):
        twice = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
        if twice:
            raise InputError(f"{option}: two rows would be {twice}, name it once")
    taken = {IDENTITY, UNTRAINED, COLOUR_MAP, *names}
    choices = ([folder.name for folder in folders], [str(folder) for folder in folders])
    unique = (labels for labels in choices if len({*labels, *taken}) == len(labels) + len(taken))
    return next(unique, paths)


def row_name(weight: float | None) -> str:
    return "RDMD" if weight is None else f"RDMD λ={weight:g}"
