"""Pictures of a run's samples: images as they are, latents through their decoder, 2-D points as maps."""

from collections.abc import Callable
from pathlib import Path

import torch

from rdmd_fast.diffusion import denoise
from rdmd_fast.engine.options import DTYPES
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.models import condition_inputs, translator
from rdmd_fast.model_files.weights import rebuild
from rdmd_fast.monitoring.validation import PointsValidator
from rdmd_fast.networks.class_labels import varied_labels
from rdmd_fast.processes.world import World
from rdmd_fast.randomness import Stream
from rdmd_fast.samplers import heun_sample, sampling_levels
from rdmd_fast.transport_weight import output_name, reported_weights, with_condition

Rows = list[tuple[str, torch.Tensor]]
Picture = Callable[[dict[str, torch.Tensor], Path], None]
"""Draws a picture from the averaged weights; a collective call, the main rank writes."""


def picture_writer(decoder: str | None, shape: tuple[int, ...], world: World) -> Callable[[Rows, Path], None] | None:
    """A function that writes rows of (label, samples [N, C, H, W]) as a grid; None if such samples have no picture.

    Args:
        decoder: folder of a diffusers AutoencoderKL for latents; None draws samples of one or three channels.
        shape: of a sample.
        world: where latents are decoded; only the main rank keeps a decoder.

    Raises:
        InputError: no decoder there, or one for other samples.
    """
    from rdmd_fast.monitoring.drawing import image_grid

    if decoder is None:
        return image_grid if len(shape) == 3 and shape[0] in (1, 3) else None
    from rdmd_fast.model_files.autoencoder import Autoencoder

    autoencoder = Autoencoder(decoder)
    if len(shape) != 3 or shape[0] != autoencoder.channels:
        raise InputError(
            f"telemetry.decoder: {decoder} decodes latents of {autoencoder.channels} channels, the data has shape "
            f"{tuple(shape)}: name the autoencoder that has encoded it"
        )
    if not world.is_main:
        return lambda rows, path: None

    def write(rows: Rows, path: Path) -> None:
        # On the device for the time of a picture alone: the memory is the training's.
        autoencoder.to(world.device)
        image_grid([(label, autoencoder.decode(samples)) for label, samples in rows], path)
        autoencoder.to("cpu")

    return write


def no_picture(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Stands in where samples cannot be drawn."""


def teacher_picture(config, world, export, philox, target) -> Picture:
    """Real targets beside samples of the averaged weights."""
    write = picture_writer(config.telemetry.decoder or export.autoencoder, target.shape, world)
    if write is None:
        return no_picture
    count = config.telemetry.sample_count
    labels = varied_labels(export.classes, config.data.target_class, count, world.device)
    real = target.batch(torch.arange(count))
    noise = philox.normal(Stream.VALIDATION_NOISE, torch.arange(count), target.shape).to(world.device)

    def picture(weights: dict[str, torch.Tensor], path: Path) -> None:
        if not world.is_main:
            return
        network = rebuild(export, weights, "EMA").to(world.device)
        samples = heun_sample(
            lambda state, sigma: denoise(network, state, sigma, export.diffusion, labels),
            noise,
            sampling_levels(18, export.diffusion),
        )
        write([("target", real), ("samples", samples)], path)

    return picture


def rdmd_picture(config, world, export, philox, validation, teacher, fake_score, label) -> Picture:
    """Sources, their translations, and what teacher and fake score make of those; of 2-D points a map."""
    write = picture_writer(config.telemetry.decoder or export.autoencoder, tuple(export.sample_shape), world)
    if validation.points is not None:
        return _toy_picture(config, world, export, validation.points)
    if write is None:
        return no_picture
    sources = validation.held_out_sources
    count = min(config.telemetry.sample_count, len(sources))
    # Spread over the held-out set: neighbours in a shard are often the same motif.
    x = sources[torch.linspace(0, len(sources) - 1, count).long()].to(world.device)
    sigma = config.telemetry.sample_sigma or config.rdmd.generator_sigma
    noise = philox.normal(Stream.VALIDATION_NOISE, torch.arange(count), tuple(x.shape[1:])).to(world.device)
    dtype = DTYPES[config.train.dtype]
    labels = None if label is None else label.expand(count, -1)

    @torch.no_grad()
    def picture(weights: dict[str, torch.Tensor], path: Path) -> None:
        looks = sorted(reported_weights(export.weight_range).values())
        outputs = [translator(weights, export, world.device, weight)(x).to(world.device) for weight in looks]
        y, inputs = outputs[len(looks) // 2], condition_inputs(export, None, count, world.device)
        # Sharded networks take every rank to run, though one draws.
        real, fake = (
            denoise(network, y + sigma * noise, sigma, export.diffusion, labels, dtype)
            for network in (teacher, with_condition(fake_score, inputs))
        )
        if world.is_main:
            rows = [("source x", x), *zip(map(output_name, looks), outputs, strict=True)]
            write([*rows, ("teacher of noised G(x)", real), ("fake score's", fake)], path)

    return picture


def _toy_picture(config, world, export, validator: PointsValidator) -> Picture:
    from rdmd_fast.extras import check_installed
    from rdmd_fast.monitoring.drawing import toy_picture

    check_installed("matplotlib", "eval")  # missing now is better than missing after the training

    def picture(weights: dict[str, torch.Tensor], path: Path) -> None:
        if not world.is_main:
            return
        looks = sorted(reported_weights(export.weight_range).values())
        outputs = {
            output_name(weight): translator(weights, export, world.device, weight)(validator.source).numpy()
            for weight in looks
        }
        names = (getattr(domain, "toy", "points") for domain in (config.data.source, config.data.target))
        title = " → ".join(names)
        if len(looks) == 1:
            title += f", λ = {config.rdmd.transport_weight:g}"
        toy_picture(validator.source.numpy(), outputs, validator.target.numpy(), path, title)

    return picture
