"""A generator, the identity map and whatever else has translated the same images, measured alike."""

import argparse
import functools
from pathlib import Path

import torch

from rdmd_fast.data.sample_names import refuse_inside
from rdmd_fast.data.shards.locate import default_cache
from rdmd_fast.errors import InputError
from rdmd_fast.metrics.feature_extractor import load_extractor
from rdmd_fast.metrics.image_candidates import IDENTITY, Candidate, candidates, row_name, row_names
from rdmd_fast.metrics.image_facts import fact_lines, image_facts
from rdmd_fast.metrics.image_report import LPIPS_BATCH, ImageReport
from rdmd_fast.metrics.image_sets import ImageSet, OpenImages, first_side, open_images
from rdmd_fast.metrics.judges import DigitJudge
from rdmd_fast.metrics.tables import format_table
from rdmd_fast.model_files.models import Generator, load_generator
from rdmd_fast.monitoring.drawing import image_grid
from rdmd_fast.networks.feature_networks import PerceptualDistance
from rdmd_fast.pixels import PixelImages
from rdmd_fast.processes.devices import pick_device

PICTURED = 16  # images in a row of the picture


def evaluate_images(arguments: argparse.Namespace) -> dict:
    """Print a table of ``--model`` and ``--outputs`` on the same sources; returns it with what it was measured on.

    Raises:
        InputError: options that do not fit together, missing or unreadable images, networks that do not fit them.
    """
    device, seed, batch_size = pick_device(arguments.device), arguments.seed or 0, arguments.batch_size
    generator = load_generator(arguments.model).to(device) if arguments.model else None
    folders, weights = arguments.outputs or (), arguments.transport_weight or ()
    inputs = [(f"--{role}", getattr(arguments, role)) for role in ("source", "target", "truth")]
    inputs = [(option, folder) for option, folder in inputs if folder]
    for option in ("picture", "out"):
        if getattr(arguments, option):
            refuse_inside(getattr(arguments, option), f"--{option}", inputs)
    labels = row_names(folders, [row_name(weight) for weight in weights or (None,)] if generator else [])
    sources, targets = (open_images(getattr(arguments, role), f"--{role}", folders) for role in ("source", "target"))
    others = [open_images(folder, "--outputs") for folder in folders]
    size = _size(arguments, generator, [sources, targets, *others])
    names, real_names = sources.chosen(arguments.count, seed, 0), targets.chosen(arguments.count, seed, 1)
    true = open_images(arguments.truth, "--truth") if arguments.truth else None
    for each in [*others, *([true] if true else [])]:
        each.check_pairs(names)
    judge = _judge(arguments)
    source, target = sources.read(size, names), targets.read(size, real_names)
    truth = true.read(size, names).images if true else None
    report = _report(arguments, judge, target, device, truth)

    def read(folder: OpenImages) -> PixelImages:
        return folder.read(size, names).images

    compared = candidates(
        source.images, generator, arguments.model, weights, arguments.teacher, device, batch_size, truth
    )
    compared += [
        Candidate(label, functools.partial(read, each), {}) for label, each in zip(labels, others, strict=True)
    ]
    rows, pictured = [], [("source x", _spread(source.images))]
    for candidate in compared:
        row, images = _measure(report, source, candidate)
        rows.append(row)
        if candidate.name != IDENTITY:
            pictured.append((candidate.name, images))
    print(format_table(rows))
    facts = image_facts(report, source, target, arguments.model)
    print("\n".join(fact_lines(facts, arguments.label)))
    if arguments.picture:
        real = ("truth", truth) if truth is not None else ("target (unpaired)", target.images)
        image_grid([*pictured, (real[0], _spread(real[1]))], arguments.picture)
    return {"rows": rows, **facts}


def _size(arguments: argparse.Namespace, generator: Generator | None, folders: list[OpenImages]) -> tuple[int, int]:
    """Choose (H, W) at which all is measured: the generator's, --resolution, that of shards, or of the first output."""
    shape = tuple(generator.config.sample_shape) if generator else None
    if shape is not None and (len(shape) != 3 or shape[0] != 3):
        raise InputError(
            f"--model {arguments.model}: is for samples of shape {shape}, images are measured: name translated ones by "
            "--outputs"
        )
    asked = (arguments.resolution,) * 2 if arguments.resolution else None
    if shape and asked not in (None, shape[1:]):
        raise InputError(
            f"--resolution {arguments.resolution}: the generator is of {shape[1]}x{shape[2]}, leave it out"
        )
    stored = next((each.size for each in folders if each.size), None)
    return (shape[1:] if shape else None) or asked or stored or (first_side(folders[2]),) * 2


def _judge(arguments: argparse.Namespace) -> DigitJudge | None:
    if arguments.judge is None:
        return None
    judge = DigitJudge(arguments.judge)
    if arguments.label is not None:
        try:
            judge.check(arguments.label)
        except InputError as error:
            raise InputError(f"--label {arguments.label}: {error}") from None
    return judge


def _report(
    arguments: argparse.Namespace, judge: DigitJudge | None, target: ImageSet, device, truth: PixelImages | None
) -> ImageReport:
    features, batch_size = None, arguments.batch_size
    if arguments.features is not None:
        features = load_extractor(arguments.features, arguments.features_input, device, batch_size)
    lpips = PerceptualDistance(device) if arguments.lpips else False
    cache = Path(arguments.cache) if arguments.cache else default_cache() / "features"
    pairs = min(LPIPS_BATCH, batch_size)
    return ImageReport(target.images, judge, arguments.label, features, lpips, arguments.seed or 0, cache, pairs, truth)


def _measure(report: ImageReport, source: ImageSet, candidate: Candidate) -> tuple[dict, torch.Tensor]:
    """Measure a row, and keep some of its images for the picture."""
    images = candidate.make()  # forgotten before the next candidate's are made
    return report.row(candidate.name, source.images, images, **candidate.more), _spread(images)


def _spread(images: PixelImages) -> torch.Tensor:
    """Choose some for a picture, over the whole set: neighbours in a shard are often the same motif."""
    return images[torch.linspace(0, len(images) - 1, min(PICTURED, len(images))).long()]
