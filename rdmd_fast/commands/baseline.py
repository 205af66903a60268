"""``rdmd baseline``: translate a folder by SDEdit, ILVR, EGSDE, DDIB or CycleDiffusion, and train EGSDE's network."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from rdmd_fast.baselines import Models, Translation, translate
from rdmd_fast.baselines.options import METHODS, NEEDS_SOURCE_TEACHER, BaselineOptions, checked, parse_options
from rdmd_fast.data.sample_names import refuse_inside
from rdmd_fast.errors import InputError
from rdmd_fast.options import Options, options_of
from rdmd_fast.paths import data_path, path_to_read, path_to_write
from rdmd_fast.processes.devices import pick_device
from rdmd_fast.randomness import Philox
from rdmd_fast.translation.folder import add_folder_arguments, translate_folder
from rdmd_fast.translation.methods import Translate

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
FOLDERS = """--size crop and resize, and names, are as `rdmd translate --help` tells. Tiles are
refused: noise is drawn for whole samples, and tiles of noises of their own would not meet.

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
    train.add_argument(
        "--source", type=data_path, required=True, metavar="SHARDS", help="training images of the source domain"
    )
    train.add_argument(
        "--target", type=data_path, required=True, metavar="SHARDS", help="training images of the target domain"
    )
    train.add_argument(
        "--out", type=path_to_write, required=True, metavar="DIR", help="where config.json and energy.safetensors go"
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and all draws (0)")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    _add_options(train, _training_options())


def _subparser(methods, name: str, summary: str) -> argparse.ArgumentParser:
    return methods.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_method(methods, method: str, summary: str) -> None:
    parser = _subparser(methods, method, summary)
    teacher = "RUN/export of the teacher stage, an EDM .pkl or diffusers folder"
    parser.add_argument(
        "--teacher", type=path_to_read, required=True, metavar="MODEL", help=f"target domain: {teacher}"
    )
    if method in NEEDS_SOURCE_TEACHER:
        parser.add_argument(
            "--source-teacher", type=path_to_read, required=True, metavar="MODEL", help="source domain: the same"
        )
    if method == "egsde":
        parser.add_argument(
            "--energy",
            type=path_to_read,
            metavar="DIR",
            help="folder of `rdmd baseline train-energy` (not needed for lambda_s=0)",
        )
    add_folder_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="key of the noise (0)")
    _add_options(parser, METHODS[method], FOLDERS)


def _add_options(parser: argparse.ArgumentParser, kind: type[Options], notes: str = "") -> None:
    parser.add_argument("options", nargs="*", metavar="key=value", help="see below")
    lines = [f"  {key}={value}  {text}" for key, value, text in options_of(kind) if key != "method"]
    parser.epilog = notes + "\n".join(["options (key=default):", *lines])


def _training_options() -> type[Options]:
    from rdmd_fast.baselines.energy import EnergyTrainingOptions

    return EnergyTrainingOptions


def run(arguments: argparse.Namespace) -> int:
    """Translate every sample, or train.

    Raises:
        InputError: options, models or samples that are not there or do not fit, or an output that cannot be written.
    """
    from rdmd_fast.yaml_values import apply_override

    values: dict = {}
    for override in arguments.options:
        apply_override(values, override)
    return _train(arguments, values) if arguments.method == "train-energy" else _translate(arguments, values)


# -- translate ---------------------------------------------------------------------------------------------------------


class Baseline(NamedTuple):
    """One of ``METHODS`` as a ``translation.methods.Method``.

    Attributes:
        philox: key of all noise.
        target, source: teachers, as ``load_denoiser`` takes them; the latter where the method needs it.
        energy: folder of an energy network, or None.
    """

    options: BaselineOptions
    philox: Philox
    target: str
    source: str | None
    energy: str | None

    def load(self, device: torch.device) -> Translate:
        from rdmd_fast.baselines.energy import load_energy
        from rdmd_fast.model_files.models import load_denoiser

        source, energy = self.source and load_denoiser(self.source), self.energy and load_energy(self.energy)
        networks = load_denoiser(self.target), source, energy
        models = Models(*(network and network.to(device) for network in networks))

        def translate_batch(x: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, str]:
            translation = translate(self.options, models, x, self.philox, numbers)
            return translation.outputs, cost(translation)

        return translate_batch

    def not_finite(self, name: str) -> str:
        return f"{self.options.method}: the translation of {name} is not finite at these options, choose others"


def cost(translation: Translation) -> str:
    """What a sample took, in words."""
    energy = translation.energy_evaluations
    return f"{translation.evaluations:g} network evaluations each" + (
        f" and {energy:g} of the energy network" if energy else ""
    )


def _translate(arguments: argparse.Namespace, values: dict) -> int:
    from rdmd_fast.model_files.teachers import read_teacher_config

    if arguments.size == "tiles":
        raise InputError(
            "--size tiles: is for `rdmd translate`, baselines draw their noise for whole samples; use crop or resize"
        )
    options = parse_options({**values, "method": arguments.method})
    models = arguments.teacher, getattr(arguments, "source_teacher", None), getattr(arguments, "energy", None)
    method = Baseline(options, Philox(arguments.seed), *models)
    shape = tuple(read_teacher_config(arguments.teacher).sample_shape)
    return translate_folder(arguments, method, f"--teacher {arguments.teacher}", shape)


# -- train -------------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, values: dict) -> int:
    from tqdm import tqdm

    from rdmd_fast.baselines.energy import load_energy, train_on_shards
    from rdmd_fast.model_files.export_format import write_export

    options = checked(_training_options(), values, "train-energy")
    device, out = pick_device(arguments.device), Path(arguments.out)
    refuse_inside(out, "--out", [("--source", arguments.source), ("--target", arguments.target)])
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
