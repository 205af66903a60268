"""A generator, the identity map and whatever else has translated the same images, measured alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rdmd_fast.data.shards.locate import default_cache
from rdmd_fast.errors import InputError
from rdmd_fast.metrics.features import FeatureExtractor, load_features
from rdmd_fast.metrics.image_report import LPIPS_BATCH, ImageReport
from rdmd_fast.metrics.image_sets import ImageSet, OpenImages, first_side, open_images
from rdmd_fast.metrics.judges import DigitJudge
from rdmd_fast.metrics.kernel_distance import SUBSET_SIZE, SUBSETS
from rdmd_fast.metrics.tables import format_table
from rdmd_fast.model_files.models import Generator, conditions, load_denoiser, load_generator
from rdmd_fast.networks.feature_networks import fitting
from rdmd_fast.pixels import PixelImages
from rdmd_fast.processes.devices import pick_device

PICTURED = 16  # images in a row of the picture
IDENTITY, UNTRAINED = "identity", "untrained (teacher at σ)"


def evaluate_images(arguments: argparse.Namespace) -> dict:
    """Print a table of ``--model`` and ``--outputs`` on the same sources; returns it with what it was measured on.

    Raises:
        InputError: options that do not fit together, missing or unreadable images, networks that do not fit them.
    """
    _check(arguments)
    device = pick_device(arguments.device)
    generator = load_generator(arguments.model).to(device) if arguments.model else None
    labels = _labels(arguments)
    source, target, others = _open(arguments, generator)
    judge = _judge(arguments)
    source, target = source(), target()
    features = _features(arguments, device)
    lpips = _lpips(device) if arguments.lpips else False
    cache = Path(arguments.cache) if arguments.cache else default_cache() / "features"
    report = ImageReport(
        target.images,
        judge,
        arguments.label,
        features,
        lpips,
        arguments.seed or 0,
        cache,
        min(LPIPS_BATCH, arguments.batch_size),
    )

    def measure(candidate: Candidate) -> tuple[dict, torch.Tensor]:
        images = candidate.make()  # forgotten before the next candidate's are made
        return report.row(candidate.name, source.images, images, **candidate.more), _spread(images)

    rows, pictured = [], [("source x", _spread(source.images))]
    candidates = _translations(arguments, generator, source.images, device)
    candidates += [Candidate(label, read, {}) for label, read in zip(labels, others, strict=True)]
    for candidate in candidates:
        row, images = measure(candidate)
        rows.append(row)
        if candidate.name != IDENTITY:
            pictured.append((candidate.name, images))
    print(format_table(rows))
    facts = _facts(arguments, source, target, features, lpips)
    print("\n".join(_fact_lines(facts)))
    if judge:
        facts |= {"knn_accuracy": judge.knn_accuracy}
    if judge and arguments.label is not None:
        facts |= {"recall_real_heldout": judge.recall(arguments.label)}
        print(f"3-NN's recall on the real held-out images of {arguments.label}: {facts['recall_real_heldout']:.4f}")
    if arguments.picture:
        from rdmd_fast.monitoring.drawing import image_grid

        image_grid([*pictured, ("target (unpaired)", _spread(target.images))], arguments.picture)
    return {"rows": rows, **facts}


class Candidate(NamedTuple):
    """A row of the table: its name, what makes its images, and further columns."""

    name: str
    make: Callable[[], PixelImages]
    more: dict[str, float]


def _check(arguments: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("source", "target") if getattr(arguments, name) is None]
    if arguments.model is None and not arguments.outputs:
        missing.insert(0, "--model or --outputs")
    if missing:
        raise InputError(f"missing {', '.join(missing)}: see rdmd evaluate --help")
    for option, needed in (("label", "judge"), ("teacher", "model"), ("transport_weight", "model")):
        if getattr(arguments, option) is not None and getattr(arguments, needed) is None:
            raise InputError(f"--{option.replace('_', '-')}: says nothing without --{needed}, add it or leave it out")
    for option, least in (("count", 2), ("batch_size", 1), ("resolution", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise InputError(f"--{option.replace('_', '-')} {value}: must be at least {least}")


# -- images ------------------------------------------------------------------------------------------------------------


def _open(
    arguments: argparse.Namespace, generator: Generator | None
) -> tuple[Callable[[], ImageSet], Callable[[], ImageSet], list[Callable[[], PixelImages]]]:
    """What reads the sources, the targets, and the translations of the sources in each folder of ``--outputs``."""
    results = arguments.outputs or ()
    source = open_images(arguments.source, "--source", results)
    target = open_images(arguments.target, "--target", results)
    others = [open_images(folder, "--outputs") for folder in results]
    size = _size(arguments, generator, [source, target, *others])
    seed = arguments.seed or 0
    names, real_names = source.chosen(arguments.count, seed, 0), target.chosen(arguments.count, seed, 1)
    for each in others:
        _check_pairs(each, names)

    def reader(folder: OpenImages) -> Callable[[], PixelImages]:
        return lambda: folder.read(size, names).images

    return (
        lambda: source.read(size, names),
        lambda: target.read(size, real_names),
        [reader(each) for each in others],
    )


def _size(arguments: argparse.Namespace, generator: Generator | None, folders: list[OpenImages]) -> tuple[int, int]:
    """(H, W) at which all is measured: the generator's, --resolution, that of shards, or of the first output."""
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
    return (shape[1:] if shape else None) or asked or stored or (first_side(folders[2], folders[2].path),) * 2


def _check_pairs(outputs: OpenImages, names: list[str]) -> None:
    present = set(outputs.names)
    missing = [name for name in names if name not in present]
    if missing:
        raise InputError(
            f"--outputs {outputs.path}: has no translation of source {missing[0]!r} ({len(missing)} of {len(names)} "
            "are missing): images are paired by name, translate all of --source"
        )


def _labels(arguments: argparse.Namespace) -> list[str]:
    """Names of the folders of ``--outputs``, or their paths where names are shared or those of other rows.

    Raises:
        InputError: a folder or a λ is named twice.
    """
    folders = [Path(folder) for folder in arguments.outputs or ()]
    weights = [_row_name(weight) for weight in arguments.transport_weight or (None,)] if arguments.model else []
    for option, labels in (
        ("--outputs", [str(folder.resolve()) for folder in folders]),
        ("--transport-weight", weights),
    ):
        twice = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
        if twice:
            raise InputError(f"{option}: two rows would be {twice}, name it once")
    taken = {IDENTITY, UNTRAINED, *weights}
    choices = ([folder.name for folder in folders], [str(folder) for folder in folders])
    unique = (labels for labels in choices if len({*labels, *taken}) == len(labels) + len(taken))
    return next(unique, [str(folder.resolve()) for folder in folders])


def _row_name(weight: float | None) -> str:
    return "RDMD" if weight is None else f"RDMD λ={weight:g}"


# -- translations ------------------------------------------------------------------------------------------------------


def _translations(
    arguments: argparse.Namespace, generator: Generator | None, source: PixelImages, device: torch.device
) -> list[Candidate]:
    """The generator at each λ, the identity map and the untrained generator, those that apply."""

    def translate(network, *rest) -> Callable[[], PixelImages]:
        return lambda: _translate(network, source, device, arguments.batch_size, *rest)

    candidates = []
    if generator is not None:
        for weight in arguments.transport_weight or ():
            conditions(generator.config, weight, 1)  # names a λ that it does not take ahead of any work
        for weight in arguments.transport_weight or (None,):
            more = {} if weight is None else {"transport_weight": weight}
            candidates.append(Candidate(_row_name(weight), translate(generator, arguments.model, weight), more))
    candidates.append(Candidate(IDENTITY, lambda: source, {}))
    if arguments.teacher:
        teacher = load_denoiser(arguments.teacher).to(device)
        update = {"reading": "teacher", "transport_weights": None}  # the teacher is not told λ
        untrained = Generator(teacher.model, generator.config.model_copy(update=update))
        candidates.append(Candidate(UNTRAINED, translate(untrained, arguments.teacher), {}))
    return candidates


@torch.no_grad()
def _translate(
    generator: Generator,
    images: PixelImages,
    device: torch.device,
    batch_size: int,
    what: str,
    weight: float | None = None,
) -> PixelImages:
    """As a user receives them: clipped to [-1, 1] and rounded to 8 bits.

    Raises:
        InputError: what comes out is not finite, which a picture would hide; a batch does not fit the memory.
    """
    from tqdm import tqdm

    from rdmd_fast.pixels import to_uint8

    parts = []
    batches = -(-len(images) // batch_size)
    for part in tqdm(images.split(batch_size), desc=str(what), unit="batch", total=batches, disable=None):
        with fitting(what, device, "--batch-size"):
            outputs = generator(part.to(device), weight)
        if not outputs.isfinite().all():
            raise InputError(f"{what}: gives NaN or infinity, take an earlier export of the run")
        parts.append(to_uint8(outputs).cpu())
    return PixelImages(torch.cat(parts))


# -- what it is measured with, and on ----------------------------------------------------------------------------------


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


def _features(arguments: argparse.Namespace, device: torch.device) -> FeatureExtractor | None:
    if arguments.features is None:
        return None
    return load_features(arguments.features, arguments.features_input, device, arguments.batch_size)


def _lpips(device: torch.device) -> torch.nn.Module:
    from rdmd_fast.networks.feature_networks import PerceptualDistance

    return PerceptualDistance(device)


def _facts(arguments, source: ImageSet, target: ImageSet, features: FeatureExtractor | None, lpips) -> dict:
    facts = {"seed": arguments.seed or 0, "source": source.summary(), "target": target.summary()}
    facts["size"] = list(source.images.shape[2:])
    if arguments.model:
        facts["model"] = arguments.model
    if features:
        facts["features"] = {"file": str(features.path), "sha256": features.sha256, "input": features.pixels}
        facts["kid"] = {"subsets": SUBSETS, "subset_size": SUBSET_SIZE}
    if lpips:
        facts["lpips"] = "alex"
    return facts


def _fact_lines(facts: dict) -> list[str]:
    height, width = facts["size"]
    lines = [
        f"{role}: {facts[role]['images']} images of {facts[role]['path']} at {height}x{width}, "
        f"sha256 {facts[role]['sha256'][:16]}"
        for role in ("source", "target")
    ]
    lines.append(f"seed {facts['seed']}; l2 is a Euclidean norm an image, mse_per_pixel a mean square, on [-1, 1]")
    if "features" in facts:
        features = facts["features"]
        lines.append(
            f"fid, kid: in the features of {features['file']} (sha256 {features['sha256'][:16]}, takes "
            f"{features['input']}); kid_std over {facts['kid']['subsets']} subsets"
        )
    return lines


def _spread(images: PixelImages) -> torch.Tensor:
    """Some for a picture, over the whole set: neighbours in a shard are often the same motif."""
    return images[torch.linspace(0, len(images) - 1, min(PICTURED, len(images))).long()]
