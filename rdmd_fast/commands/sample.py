"""``rdmd sample``: draw from a teacher with EDM's Heun sampler, to look at it before distilling it."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.networks.class_labels import NO_CLASS, one_hot_rows
from rdmd_fast.paths import path_to_read, path_to_write

EPILOG = """examples:
  rdmd sample --model runs/digits_teacher_3/export --out threes.png --count 16
  rdmd sample --model downloads/sd15 --prompt "a photo of a lion" --guidance 1.5 --out lions.png --count 4
  rdmd sample --model edm-imagenet-64x64-cond-adm.pkl --out samples --class random --count 5000 \\
      --steps 256 --churn 40 --s-min 0.05 --s-max 50 --s-noise 1.003

With --out FILE.png the samples are one picture; otherwise numbered files in a folder: PNGs, or .npy arrays [C, H, W] of
a latent model without --autoencoder or a pipeline's own. Samples depend on seed and number alone, not on --batch-size.
"""
GRID_COLUMNS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--model",
        type=path_to_read,
        required=True,
        metavar="MODEL",
        help="RUN/export of the teacher stage, an EDM .pkl or diffusers folder",
    )
    parser.add_argument(
        "--out", type=path_to_write, required=True, metavar="FILE.png|FOLDER", help="picture grid, or folder of samples"
    )
    parser.add_argument(
        "--count", type=int, default=16, metavar="N", help="samples; of each class with --class all (16)"
    )
    parser.add_argument(
        "--class", dest="classes", metavar="K|all|random", help="class index; unset: the model's target"
    )
    parser.add_argument("--steps", type=int, default=18, metavar="N", help="Heun steps; 2 N - 1 evaluations (18)")
    parser.add_argument(
        "--sigma-min", type=float, metavar="S", help="lowest noise level, data units (EDM: 0.002, 0.004 σ_data)"
    )
    parser.add_argument(
        "--sigma-max", type=float, metavar="S", help="highest noise level, data units (EDM: 80, 160 σ_data)"
    )
    parser.add_argument("--rho", type=float, default=7.0, metavar="R", help="curvature of the levels (EDM: 7)")
    parser.add_argument(
        "--churn", type=float, default=0.0, metavar="S", help="S_churn, fresh noise; 0: deterministic (EDM: 0)"
    )
    parser.add_argument("--s-min", type=float, default=0.0, metavar="S", help="S_tmin, no fresh noise below (EDM: 0)")
    parser.add_argument(
        "--s-max", type=float, default=math.inf, metavar="S", help="S_tmax, no fresh noise above (EDM: inf)"
    )
    parser.add_argument(
        "--s-noise", type=float, default=1.0, metavar="S", help="S_noise, fresh noise's deviation (EDM: 1)"
    )
    parser.add_argument(
        "--autoencoder", type=path_to_read, metavar="DIR", help="diffusers AutoencoderKL folder that decodes latents"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="of a text-to-image pipeline: what to draw (empty)")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from (none)")
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="S", help="F_negative + S (F_prompt - F_negative) (1: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="key of the noise (0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time (64)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="the network's (fp32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def run(arguments: argparse.Namespace) -> int:
    """Write a grid or a folder of samples.

    Raises:
        InputError: no teacher there, options out of range, or samples that cannot be drawn as asked or written.
    """
    from rdmd_fast.engine.options import DTYPES
    from rdmd_fast.model_files.models import load_denoiser
    from rdmd_fast.processes.devices import pick_device

    _check(arguments)
    device = pick_device(arguments.device)
    prompts = arguments.prompt, arguments.negative_prompt, arguments.guidance
    denoiser = load_denoiser(arguments.model, *prompts).to(device=device, dtype=DTYPES[arguments.dtype])
    as_grid = _is_grid(arguments)
    decode = _decoder(arguments, denoiser.config, as_grid, device)
    classes = sample_classes(arguments, denoiser.config.classes, denoiser.config.target_class)
    batches = _with_progress(draw(denoiser, arguments, classes, decode, device), len(classes))
    try:
        write = _write_grid if as_grid else _write_folder
        write(arguments, classes, batches)
    except OSError as error:
        raise InputError(f"--out {arguments.out}: cannot be written ({error.strerror or error})") from None
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.count < 1 or arguments.steps < 2 or arguments.batch_size < 1:
        raise InputError("--count and --batch-size must be at least 1 and --steps at least 2")
    bounds = (1.0 if bound is None else bound for bound in (arguments.sigma_min, arguments.sigma_max, arguments.rho))
    # Written so that NaN fails too.
    if not all(0 < bound < math.inf for bound in bounds):
        raise InputError("--sigma-min, --sigma-max and --rho must be above 0")
    if not (0 <= arguments.churn < math.inf and 0 <= arguments.s_noise < math.inf):
        raise InputError("--churn and --s-noise must be numbers from 0 up")
    if not 0 <= arguments.s_min <= arguments.s_max:
        raise InputError("--s-min must be from 0 to --s-max")
    out = Path(arguments.out)
    if out.is_dir() if _is_grid(arguments) else out.is_file():
        raise InputError(f"--out {out}: is there as a {'folder' if out.is_dir() else 'file'}, choose another name")


def _is_grid(arguments: argparse.Namespace) -> bool:
    return arguments.out.lower().endswith(".png")


def _decoder(arguments, config: ExportConfig, as_grid: bool, device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns samples into what is written."""
    shape = tuple(config.sample_shape)
    if len(shape) != 3:
        raise InputError(f"--model {arguments.model}: is for points of shape {shape}, sample draws images and latents")
    if folder := arguments.autoencoder or config.autoencoder:
        from rdmd_fast.model_files.autoencoder import Autoencoder

        return Autoencoder(folder).to(device).decode
    if as_grid and shape[0] not in (1, 3):
        raise InputError(
            f"--out {arguments.out}: latents of {shape[0]} channels are no picture, name --autoencoder or a folder"
        )
    return lambda samples: samples


def sample_classes(arguments: argparse.Namespace, classes: int, target_class: int | None) -> torch.Tensor:
    """Class of each sample, int64 [N]; ``NO_CLASS`` where there is none.

    Args:
        classes: of the network, 0 for none.
        target_class: of its export.

    Raises:
        InputError: a class that the network does not have.
    """
    from rdmd_fast.randomness import Philox, Stream

    count, choice = arguments.count, arguments.classes
    if choice is not None and not classes:
        raise InputError(f"--class {choice}: the network has no classes, leave it out")
    if choice == "all":
        return torch.arange(classes).repeat_interleave(count)
    if choice == "random":
        drawn = Philox(arguments.seed).uniform(Stream.SAMPLER_CLASS, torch.arange(count))[:, 0]
        return (drawn * classes).long()
    if choice is None:
        if classes and target_class is None:
            note = f"sampling without a class: the network has {classes}, choose by --class K, all or random"
            print(note, file=sys.stderr)
        return torch.full((count,), NO_CLASS if target_class is None else target_class)
    if not choice.isdecimal() or int(choice) >= classes:
        raise InputError(f"--class {choice}: name one from 0 to {classes - 1}, all or random")
    return torch.full((count,), int(choice))


def draw(
    denoiser: torch.nn.Module,
    arguments: argparse.Namespace,
    classes: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Samples in batches, float32 [n, C, H, W] on the CPU; number i is a function of seed, class and i alone."""
    from rdmd_fast.randomness import Philox, Stream
    from rdmd_fast.samplers import Churn, churn_noise, heun_sample, sampling_levels

    philox, shape = Philox(arguments.seed), tuple(denoiser.config.sample_shape)
    bounds = arguments.sigma_min, arguments.sigma_max
    levels = sampling_levels(arguments.steps, denoiser.config.diffusion, *bounds, arguments.rho)
    if not levels[0] > levels[-2]:
        raise InputError(f"--sigma-min {levels[-2]:g} must be below --sigma-max {levels[0]:g}")
    churn = Churn(arguments.churn, arguments.s_min, arguments.s_max, arguments.s_noise)
    for positions in torch.arange(len(classes)).split(arguments.batch_size):
        labels = one_hot_rows(classes[positions], denoiser.config.classes, device)
        noise = philox.normal(Stream.SAMPLER, positions, shape, device)
        samples = heun_sample(
            lambda state, sigma, labels=labels: denoiser(state, sigma, labels),
            noise, levels, churn, churn_noise(philox, positions, shape, device),
        )  # fmt: skip
        with torch.no_grad():
            yield decode(samples).float().cpu()


def _with_progress(batches: Iterator[torch.Tensor], total: int) -> Iterator[torch.Tensor]:
    from tqdm import tqdm

    with tqdm(total=total, unit="img", disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _write_grid(arguments: argparse.Namespace, classes: torch.Tensor, batches: Iterator[torch.Tensor]) -> None:
    from rdmd_fast.monitoring.drawing import image_grid

    by_class = arguments.classes == "all"
    rows = torch.cat(list(batches)).split(arguments.count if by_class else GRID_COLUMNS)
    image_grid([(str(number) if by_class else "", row) for number, row in enumerate(rows)], arguments.out)
    print(arguments.out)


def _write_folder(arguments: argparse.Namespace, classes: torch.Tensor, batches: Iterator[torch.Tensor]) -> None:
    """Numbered files; in a folder for each class where there are several, as ``rdmd pack --labels`` reads them."""
    number, several = 0, arguments.classes in ("all", "random")
    for batch in batches:
        for sample in batch:
            folder = Path(arguments.out) / str(int(classes[number])) if several else Path(arguments.out)
            _write_sample(folder / f"{number:06d}", sample)
            number += 1
    print(f"{arguments.out}: {number} samples")


def _write_sample(path: Path, sample: torch.Tensor) -> None:
    """An image [1 or 3, H, W] as PNG, latents [C, H, W] as .npy, under its name only when complete."""
    from rdmd_fast.files import replace_file
    from rdmd_fast.pixels import to_uint8

    if sample.shape[0] not in (1, 3):
        replace_file(path.with_suffix(".npy"), lambda file: np.save(file, sample.numpy()))
        return
    pixels = to_uint8(sample).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.squeeze(-1) if len(sample) == 1 else pixels)
    replace_file(path.with_suffix(".png"), lambda file: image.save(file, format="PNG"))
