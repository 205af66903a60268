"""``rdmd baseline``: translate a folder by SDEdit, ILVR, EGSDE, DDIB or CycleDiffusion, and train EGSDE's network."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..options import Options
from .options import METHODS, NEEDS_SOURCE_TEACHER, checked, parse_options

EPILOG = """examples:
  rdmd baseline sdedit --teacher runs/digits_teacher_3/export --input shards/digits/2/test --output out/sdedit \\
      sigma0=0.6
  rdmd baseline ddib --teacher runs/digits_teacher_3/export --source-teacher runs/digits_teacher_2/export \\
      --input shards/digits/2/test --output out/ddib
  rdmd baseline train-energy --source shards/digits/2/train --target shards/digits/3/train --out runs/digits_energy
  rdmd baseline egsde --teacher runs/digits_teacher_3/export --energy runs/digits_energy \\
      --input shards/digits/2/test --output out/egsde lambda_s=20

docs/baselines.md tells what each method does. `rdmd figures --only tradeoff` sweeps all of them.
"""
SUMMARIES = {
    "sdedit": "noise the source and denoise it by the target teacher (arXiv 2108.01073)",
    "ilvr": "sample the target teacher with the source's low frequencies (arXiv 2108.02938)",
    "egsde": "SDEdit guided by a domain classifier and by low frequencies (arXiv 2207.06635)",
    "ddib": "encode by the source teacher's ODE, decode by the target's (arXiv 2203.08382)",
    "cyclediffusion": "replay the source teacher's noise in the target teacher (arXiv 2210.05559)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for method, summary in SUMMARIES.items():
        _add_method(methods, method, summary)
    train = _subparser(methods, "train-energy", "train EGSDE's domain classifier on the two domains")
    train.add_argument("--source", required=True, metavar="SHARDS", help="training images of the source domain")
    train.add_argument("--target", required=True, metavar="SHARDS", help="training images of the target domain")
    train.add_argument("--out", required=True, metavar="DIR", help="where config.json and energy.safetensors go")
    train.add_argument("--seed", type=int, default=0, help="of weights and all draws (0)")
    _add_device_and_options(train, _training_options())


def _subparser(methods, name: str, summary: str) -> argparse.ArgumentParser:
    return methods.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_method(methods, method: str, summary: str) -> None:
    parser = _subparser(methods, method, summary)
    teacher = "RUN/export of the teacher stage, an EDM .pkl or diffusers folder"
    parser.add_argument("--teacher", required=True, metavar="MODEL", help=f"target domain: {teacher}")
    if method in NEEDS_SOURCE_TEACHER:
        parser.add_argument("--source-teacher", required=True, metavar="MODEL", help="source domain: the same")
    if method == "egsde":
        parser.add_argument(
            "--energy", metavar="DIR", help="folder of `rdmd baseline train-energy` (not needed for lambda_s=0)"
        )
    parser.add_argument("--input", required=True, metavar="FOLDER", help="a folder of images or latents, or of shards")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where files of the same names go")
    parser.add_argument("--seed", type=int, default=0, help="key of the noise (0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time (64)")
    _add_device_and_options(parser, METHODS[method])


def _add_device_and_options(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("options", nargs="*", metavar="key=value", help="see below")
    from ..config import options_of

    lines = [f"  {key}={value}  {text}" for key, value, text in options_of(kind, "") if key != "method"]
    parser.epilog = "\n".join(["options (key=default):", *lines])


def _training_options() -> type[Options]:
    from .energy import EnergyTrainingOptions

    return EnergyTrainingOptions


def run(arguments: argparse.Namespace) -> int:
    """Translate every sample, or train.

    Raises:
        InputError: options, models or samples that are not there or do not fit, or an output that cannot be written.
    """
    from ..config import apply_override

    values: dict = {}
    for override in arguments.options:
        apply_override(values, override)
    return _train(arguments, values) if arguments.method == "train-energy" else _translate(arguments, values)


# -- translate ---------------------------------------------------------------------------------------------------------


def _translate(arguments: argparse.Namespace, values: dict) -> int:
    from tqdm import tqdm

    from ..randomness import Philox
    from ..translate import pick_device
    from ..translation.inputs import open_inputs
    from ..translation.outputs import Outputs
    from ..translation.sizes import make_size
    from . import translate
    from .energy import in_data_units

    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: must be at least 1")
    options = parse_options({**values, "method": arguments.method})
    device, philox = pick_device(arguments.device), Philox(arguments.seed)
    models = _load_models(arguments, device)
    shape = tuple(models.target.config.sample_shape)
    if len(shape) != 3:
        raise InputError(f"--teacher {arguments.teacher}: is for points of shape {shape}, images are translated here")
    samples = open_inputs(arguments.input, shape, shape, output=arguments.output)
    outputs = Outputs(Path(arguments.output), None if samples.latents else "png", samples.latents)
    crop = make_size("crop", *shape[1:])
    with tqdm(total=len(samples.names), unit="img", disable=None) as bar:
        for numbers in torch.arange(len(samples.names)).split(arguments.batch_size):
            read = [samples.read(number) for number in numbers.tolist()]
            x = np.stack([each if samples.latents else crop.split(each)[0] for each in read])
            x = torch.from_numpy(x).to(device)
            x = in_data_units(x if samples.latents else x.permute(0, 3, 1, 2))
            translation = translate(options, models, x, philox, numbers)
            if not translation.outputs.isfinite().all():  # a picture would hide it
                raise InputError(f"{options.method}: gives outputs that are not finite at these options")
            _write(outputs, [samples.names[number] for number in numbers.tolist()], translation.outputs)
            bar.update(len(numbers))
    kind = "latents" if samples.latents else "images"
    energy = translation.energy_evaluations
    print(
        f"{arguments.output}: {len(samples.names)} {kind}, {translation.evaluations:g} network evaluations each"
        + (f" and {energy:g} of the energy network" if energy else "")
    )
    return 0


def _write(outputs, names: list[str], translated: torch.Tensor) -> None:
    from ..drawing import to_uint8

    if outputs.arrays:
        for name, array in zip(names, translated.cpu().numpy(), strict=True):
            outputs.write(name, array, None)
        return
    for name, image in zip(names, to_uint8(translated).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        outputs.write(name, None, image)


def _load_models(arguments: argparse.Namespace, device: torch.device):
    from ..networks.exported import load_denoiser
    from . import Models
    from .energy import load_energy

    source, energy = getattr(arguments, "source_teacher", None), getattr(arguments, "energy", None)
    models = load_denoiser(arguments.teacher), source and load_denoiser(source), energy and load_energy(energy)
    return Models(*(model and model.to(device) for model in models))


# -- train -------------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, values: dict) -> int:
    from tqdm import tqdm

    from ..networks.exported import write_export
    from ..translate import pick_device
    from .energy import load_energy, train_on_shards

    options = checked(_training_options(), values, "train-energy")
    device, out = pick_device(arguments.device), Path(arguments.out)
    if out.exists():
        try:
            load_energy(out)  # what is replaced must be one
        except InputError:
            raise InputError(f"--out {out}: exists and is no energy network, choose another folder") from None
        foreign = sorted(path.name for path in out.iterdir() if path.name not in ("config.json", "energy.safetensors"))
        if foreign:
            raise InputError(f"--out {out}: holds more than an energy network ({foreign[0]}), choose another folder")
    with tqdm(total=options.steps, unit="step", disable=None) as bar:
        energy, accuracy = train_on_shards(
            options, arguments.source, arguments.target, arguments.seed, device, bar.update
        )
    try:
        write_export(out, energy.config, energy.model.state_dict())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    print(f"{out}: tells the domains apart in {accuracy:.1%} of the last training samples, at the noise levels drawn")
    return 0
