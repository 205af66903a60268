"""Exports: safetensors + config.json, enough to rebuild a network with no other file.

DIR/config.json                                network, data shape, parameterisation, how to read it
DIR/generator.safetensors or teacher.safetensors   EMA weights, fp32, keys as the raw network names them
DIR/README.md                                  model card
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..diffusion import DiffusionOptions, Reading, denoise
from ..errors import InputError
from ..options import Options
from ..runtime import fsync_path, read_text, replace_folder, write_atomically
from ..transport_weight import WeightRange, told
from . import ExportedNetworkOptions, build_network
from .condition import conditioning_weights

FORMAT = 1
MOST_BYTES = 1 << 20  # of a config.json
FILES = re.compile(r"README\.md|config\.json|(teacher|generator)\.safetensors|generator\.(pt2|onnx.*)")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ExportConfig(Options):
    """config.json of an export."""

    format: int = FORMAT
    role: Literal["teacher", "generator"]
    network: ExportedNetworkOptions
    sample_shape: list[Annotated[int, Field(ge=1, le=2**16)]]
    diffusion: DiffusionOptions
    reading: Literal["teacher", "mlp", "affine"] | None = None
    generator_sigma: float | None = Field(None, ge=1e-6, le=1e6)
    target_class: int | None = Field(None, ge=0)
    transport_weights: list[Annotated[float, Field(ge=1e-6, le=1e6)]] | None = Field(None, min_length=2, max_length=2)
    step: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _consistent(self):
        if len(self.sample_shape) not in (1, 3):
            raise ValueError("sample_shape: give [D] or [C, H, W]")
        if self.role == "generator" and (self.reading is None or self.generator_sigma is None):
            raise ValueError("reading and generator_sigma: missing, a generator is read by them")
        classes = getattr(self.network, "label_dim", 0)
        if classes and self.target_class is not None and self.target_class >= classes:
            raise ValueError("target_class: the network has no such class")
        if self.transport_weights and self.transport_weights[0] >= self.transport_weights[1]:
            raise ValueError("transport_weights: give [low, high] with low below high")
        return self

    @property
    def weight_range(self) -> WeightRange | None:
        """The λ that the network is conditioned on; None for one that is not."""
        return WeightRange(*self.transport_weights) if self.transport_weights else None


def write_export(folder: Path, config: ExportConfig, weights: dict[str, torch.Tensor], card: str | None = None) -> None:
    """Write an export so that ``folder`` always holds a whole one: the old until the new is complete.

    Args:
        card: its README.md.
    """

    def fill(partial: Path) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            partial / f"{config.role}.safetensors",
        )
        fsync_path(partial / f"{config.role}.safetensors")

    write_folder(folder, config, fill, card)


def write_folder(folder: Path, config: ExportConfig, fill: Callable[[Path], None], card: str | None = None) -> None:
    """A folder with config.json, a README.md and what ``fill`` writes into it, whole or not at all."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        if card is not None:
            write_atomically(partial / "README.md", card)
        write_atomically(partial / "config.json", json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace_folder(partial, folder)


def check_replaceable(folder: Path, flag: str = "--out") -> None:
    """Whether ``write_folder`` may put its own in the place of what is there: nothing, or an export and no more.

    Raises:
        InputError: a file, or a folder with anything that is not an export's.
    """
    if not folder.exists():
        return
    try:
        read_export_config(folder, None)
    except InputError:
        raise InputError(f"{flag} {folder}: exists and is no export, choose another folder") from None
    foreign = sorted(path.name for path in folder.iterdir() if not FILES.fullmatch(path.name) or not path.is_file())
    if foreign:
        raise InputError(f"{flag} {folder}: holds more than an export ({foreign[0]}), choose another folder")


def read_export(folder: str | Path, role: str) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of an export.

    Raises:
        InputError: no export there, one of another role, or a damaged file.
    """
    config = read_export_config(folder, role)
    path = Path(folder) / f"{role}.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: missing, export the run again")
    return config, read_tensors(path, "export the run again")


def read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, float32; ``remedy`` ends the message if it is none.

    Raises:
        InputError: damaged, or something in it is no finite number of floating point.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("not a regular file")
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a whole safetensors file ({reason}), {remedy}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{path}: weight {name} is of {tensor.dtype}, not of floating point, {remedy}")
        tensors[name] = tensor.float()
        if not torch.isfinite(tensors[name]).all():
            raise InputError(f"{path}: weight {name} holds values that are not finite, {remedy}")
    return tensors


def read_export_config(folder: str | Path, role: str | None) -> ExportConfig:
    """config.json of an export, of any role if that is None; errors as ``read_export``."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no export there (no config.json), name a RUN/export folder")
    try:
        values = json.loads(read_text(folder / "config.json", MOST_BYTES))
        config = TypeAdapter(ExportConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{folder}/config.json: {where}{message.lower()}, export the run again") from None
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{folder}/config.json: not readable as JSON, export the run again") from None
    if config.format != FORMAT:
        raise InputError(f"{folder}/config.json: format {config.format} is not the {FORMAT} of this version")
    if role is not None and config.role != role:
        raise InputError(f"{folder}: holds a {config.role}, a {role} is needed")
    return config


def load_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict one to one; InputError as ``check_weights``."""
    check_weights(network.state_dict(), weights, origin)
    network.load_state_dict(weights)


def load_teacher_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """``load_weights`` into a network that may be told a condition: those layers, and no others, stay as they are."""
    load_weights(network, weights | conditioning_weights(network), origin)


def check_weights(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], origin: str) -> None:
    """Whether ``weights`` have the keys and shapes of a network's own state dict.

    Raises:
        InputError: names the first key or shape that differs.
    """
    for name, tensor in own.items():
        if name not in weights:
            raise InputError(f"{origin}: has no weight {name}, it is of another network")
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"{origin}: weight {name} has shape {list(weights[name].shape)}, the network needs {list(tensor.shape)}"
            )
    surplus = next((name for name in weights if name not in own), None)
    if surplus:
        raise InputError(f"{origin}: weight {surplus} has no place in the network, it is of another one")


def expected_weights(config: ExportConfig, count: int, origin: str) -> dict[str, torch.Tensor]:
    """State dict, on the meta device, of the network that a configuration describes.

    Args:
        count: weights that are there: a network of many more layers is not even described.

    Raises:
        InputError: there can be no such network.
    """
    options = config.network
    layers = getattr(options, "depth", 0) + len(getattr(options, "channel_mult", ())) * getattr(
        options, "num_blocks", 0
    )
    if options.kind == "diffusers_unet":
        layers = len(options.unet.block_out_channels) * options.unet.layers_per_block
    if layers > count:
        raise InputError(f"{origin}: has {count} weights, too few for the layers that its configuration names")
    try:
        with torch.device("meta"):
            return _network_of(config).state_dict()
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    except (RuntimeError, OverflowError, TypeError, ValueError):
        raise InputError(f"{origin}: asks for a network of impossible size") from None


def rebuild(config: ExportConfig, weights: dict[str, torch.Tensor], origin: str) -> torch.nn.Module:
    """The raw network of an export, in evaluation mode, on the CPU; InputError where the weights are not its own."""
    check_weights(expected_weights(config, len(weights), origin), weights, origin)  # before it takes any memory
    network = _network_of(config)
    network.load_state_dict(weights)
    # As activations are: each convolution would else copy its weight into that layout, at every call.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _network_of(config: ExportConfig) -> torch.nn.Module:
    condition = config.transport_weights is not None
    return build_network(config.network, tuple(config.sample_shape), dropout=False, condition=condition)


def conditions(
    config: ExportConfig, weight: float | torch.Tensor | None, count: int, device="cpu"
) -> dict[str, torch.Tensor]:
    """What a network is given for λ, by keyword: a number, [N], or None for the middle of its range.

    Raises:
        InputError: λ lies outside the range, or the network is of one λ only.
    """
    bounds = config.weight_range
    if bounds is None:
        if weight is not None:
            raise InputError(
                "transport_weight: the network was trained for a single one and takes none; train with "
                "rdmd.transport_weight={log_uniform: [low, high]} to choose it afterwards"
            )
        return {}
    condition = bounds.condition(bounds.middle if weight is None else weight, count)
    return {"condition": condition.to(device)}


def one_hot(config: ExportConfig, class_labels: torch.Tensor | None, count: int, device) -> torch.Tensor | None:
    """Class indices [N] (or rows [N, classes], kept) as float32 [N, classes]; None for a network without classes.

    Without labels it is the configuration's target class; without that, too, zeros: EDM's unconditional input.

    Raises:
        InputError: a class that the network does not have, or labels of another shape.
    """
    classes = getattr(config.network, "label_dim", 0)
    if not classes:
        return None
    if class_labels is None:
        if config.target_class is None:
            return torch.zeros(count, classes, device=device)
        class_labels = torch.full((count,), config.target_class)
    labels = torch.as_tensor(class_labels)  # checked where it is: on the CPU that stops no GPU
    if labels.shape == (count, classes):
        return labels.to(device).float()
    if labels.shape != (count,):
        raise InputError(f"class_labels: shape {list(labels.shape)}, give [{count}] or one-hot [{count}, {classes}]")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(f"class_labels: the network has {classes} classes, name them from 0 to {classes - 1}")
    return torch.nn.functional.one_hot(labels.long(), classes).to(device).float()


class Generator(torch.nn.Module):
    """One-step translator: ``generator(x)`` maps [N, C, H, W] (or points [N, D]) in data units to the target domain.

    One that was trained for a range of λ takes ``transport_weight``, a number or a tensor [N], for every call: more
    keeps more of x, less follows the target domain closer. Without it λ is the range's geometric mean.
    """

    def __init__(self, network: torch.nn.Module, config: ExportConfig):
        super().__init__()
        self.model, self.config = network, config
        self.reading = Reading.of(config.reading, config.diffusion, config.generator_sigma)

    @property
    def transport_weights(self) -> tuple[float, float] | None:
        """(lowest, highest) λ that it takes; None for a generator of a single one."""
        return tuple(self.config.transport_weights) if self.config.transport_weights else None

    def forward(self, x: torch.Tensor, transport_weight: float | torch.Tensor | None = None) -> torch.Tensor:
        """InputError for a λ outside ``transport_weights``, or for any if that is None."""
        dtype = next(self.model.parameters()).dtype
        network = told(self.model, conditions(self.config, transport_weight, len(x), x.device))
        return self.reading(network, x.float(), one_hot(self.config, None, len(x), x.device), dtype)


def translator(
    weights: dict[str, torch.Tensor], export: ExportConfig, device, transport_weight: float | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """One-step translation of samples [N, …] on the CPU by a run's averaged weights, some at a time; CPU again."""
    generator = Generator(rebuild(export, weights, "EMA"), export).to(device)

    @torch.no_grad()
    def translate(x: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        return torch.cat([generator(part.to(device), transport_weight).cpu() for part in x.split(chunk)])

    return translate


class Denoiser(torch.nn.Module):
    """``denoiser(x_noisy, sigma, class_labels=None)``: E[y | y + σ ε] of [N, …] at σ a number or [N], data units.

    A fake score of a range of λ takes ``transport_weight`` as a ``Generator`` does.
    """

    def __init__(self, network: torch.nn.Module, config: ExportConfig):
        super().__init__()
        self.model, self.config = network, config

    def forward(
        self,
        x_noisy: torch.Tensor,
        sigma,
        class_labels: torch.Tensor | None = None,
        transport_weight: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        labels = one_hot(self.config, class_labels, len(x_noisy), x_noisy.device)
        dtype = next(self.model.parameters()).dtype
        network = told(self.model, conditions(self.config, transport_weight, len(x_noisy), x_noisy.device))
        return denoise(network, x_noisy, sigma, self.config.diffusion, labels, dtype)


def load_generator(folder: str | Path) -> Generator:
    """The generator of a RUN/export folder, on the CPU, in evaluation mode; InputError if there is none."""
    config, weights = read_export(folder, "generator")
    return Generator(rebuild(config, weights, str(folder)), config).eval()


def load_denoiser(source: str | Path) -> Denoiser:
    """A teacher as a denoiser, on the CPU, in evaluation mode.

    Args:
        source: a RUN/export folder of the teacher stage, an NVIDIA EDM pickle, or a diffusers folder.

    Raises:
        InputError: there is none.
    """
    from .teachers import read_teacher

    config, weights = read_teacher(str(source))
    return Denoiser(rebuild(config, weights, str(source)), config).eval()
