"""Measuring a translation as a point of a study: its outputs, quality, faithfulness and cost."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.files import replace_file
from rdmd_fast.pixels import to_uint8
from rdmd_fast.studies.training_jobs import referred

SAMPLES = 12  # outputs that a point keeps, for pictures

Translate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict]]
"""(sources [n, C, H, W], their positions int64 [n]) -> (outputs, evaluations of networks for one image)."""


class Run(NamedTuple):
    """Outputs [N, C, H, W] as a user receives them, evaluations for an image, and seconds for an image."""

    outputs: torch.Tensor
    evaluations: dict
    seconds: float


def measure(folder: Path, settings: dict) -> dict:
    """Work of a measuring point: translate the held-out sources and compare with the held-out targets.

    On a CPU one thread computes, and seconds are those that it computed, whatever else runs; on a GPU they are of
    the clock. One batch goes ahead untimed.
    """
    from rdmd_fast.processes.devices import pick_device

    device = pick_device("auto")
    data = settings["data"]
    with one_thread():
        sources = held_out(data["source"], data["held_out"])
        run = timed(translator(settings["model"], folder, device), sources, settings["batch_size"], device)
        metrics = settings["metrics"] | {"target": data["target"], "count": data["held_out"], "device": device}
        row = report(**metrics).row("", sources, run.outputs)
    chosen = torch.linspace(0, len(sources) - 1, min(SAMPLES, len(sources))).long()
    samples = to_uint8(run.outputs[chosen]).numpy()
    replace_file(folder / "samples.npy", lambda file: np.save(file, samples), durable=True)
    return {**without_name(row), **run.evaluations, "seconds_per_image": run.seconds, "device": device.type}


def without_name(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "name"}


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=4)
def held_out(folder: str, count: int) -> torch.Tensor:
    """The first ``count`` images of a set as outputs are read, [n, C, H, W]; InputError where it holds other things."""
    from rdmd_fast.monitoring.validation import held_out_images

    images = held_out_images(folder, count)
    if images.ndim != 4:
        raise InputError(f"{folder}: holds arrays of shape {list(images.shape[1:])}, a study measures images")
    return as_received(images)


def as_received(images: torch.Tensor) -> torch.Tensor:
    """What a user receives of float images in [-1, 1]: clipped and rounded to 8 bits, float32 again."""
    return to_uint8(images).float() / 127.5 - 1


@functools.lru_cache(maxsize=2)
def report(
    target: str, count: int, device: torch.device, judge: str | None, label: int | None, features: str | None, **digests
):
    """The ``ImageReport`` of a study, kept for the points that a process still computes; features are of ``device``."""
    from rdmd_fast.metrics.feature_extractor import load_extractor
    from rdmd_fast.metrics.image_report import ImageReport
    from rdmd_fast.metrics.judges import DigitJudge

    digit_judge = DigitJudge(judge) if judge else None
    extractor = load_extractor(features, device=device) if features else None
    return ImageReport(held_out(target, count), digit_judge, label, extractor)


@torch.no_grad()
def timed(translate: Translate, sources: torch.Tensor, batch_size: int, device: torch.device) -> Run:
    """Translate in batches, timed after a first one that does not count; clipped and rounded to 8 bits."""
    positions = torch.arange(len(sources))
    batches = list(zip(sources.to(device).split(batch_size), positions.split(batch_size), strict=True))
    translate(*batches[0])
    start = _clock(device)
    results = [translate(*batch) for batch in batches]
    seconds = (_clock(device) - start) / len(sources)
    outputs = torch.cat([outputs.float().cpu() for outputs, _ in results])
    if not outputs.isfinite().all():  # rounding to 8 bits would hide it
        raise InputError("gives outputs that are not finite, take this setting out of the study or mend it")
    return Run(as_received(outputs), results[0][1], seconds)


def _clock(device: torch.device) -> float:
    """Seconds: of the clock once the GPU has finished, or that this process has computed."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


# -- what translates ---------------------------------------------------------------------------------------------------


def translator(model: dict, folder: Path, device: torch.device) -> Translate:
    """The function that a point's ``model`` describes by its ``kind``; models are loaded here, once."""
    return TRANSLATORS[model["kind"]](model, folder, device)


def _identity(model, folder, device) -> Translate:
    return lambda x, positions: (x, {"evaluations": 0})


def _generator(model, folder, device) -> Translate:
    """An export of the rdmd stage; of one for many λ, at ``transport_weight``."""
    from rdmd_fast.model_files.models import load_generator

    generator = load_generator(referred(model["export"], folder)).to(device)
    given = {} if model["transport_weight"] is None else {"transport_weight": model["transport_weight"]}
    return lambda x, positions: (generator(x, **given), {"evaluations": 1})


def _untrained(model, folder, device) -> Translate:
    """The generator before its first update: the teacher's denoiser at σ̃ = generator_sigma, given x as it is."""
    from rdmd_fast.model_files.export_format import ExportConfig
    from rdmd_fast.model_files.models import Generator, load_denoiser

    teacher = load_denoiser(referred(model["teacher"], folder)).to(device)
    config = ExportConfig.model_validate(
        teacher.config.model_dump()
        | {"role": "generator", "reading": "teacher", "generator_sigma": model["generator_sigma"]}
    )
    generator = Generator(teacher.model, config)
    return lambda x, positions: (generator(x), {"evaluations": 1})


def _baseline(model, folder, device) -> Translate:
    from rdmd_fast.baselines import Models, parse_options, translate
    from rdmd_fast.model_files.models import load_denoiser
    from rdmd_fast.randomness import Philox

    options = parse_options(model["options"])
    networks = {
        name: load_denoiser(referred(model[name], folder)).to(device) for name in ("target", "source") if name in model
    }
    if "energy" in model:
        from rdmd_fast.baselines.energy import load_energy

        networks["energy"] = load_energy(referred(model["energy"], folder)).to(device)
    models, philox = Models(**networks), Philox(model["seed"])

    def run(x: torch.Tensor, positions: torch.Tensor):
        outputs, evaluations, energy = translate(options, models, x, philox, positions.to(x.device))
        return outputs, {"evaluations": evaluations, "energy_evaluations": energy}

    return run


TRANSLATORS = {"identity": _identity, "generator": _generator, "untrained": _untrained, "baseline": _baseline}
