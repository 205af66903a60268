"""Exports: safetensors + config.json, enough to rebuild a network with no other file.

DIR/config.json                                network, data shape, parameterisation, how to read it
DIR/generator.safetensors or teacher.safetensors   EMA weights, fp32, keys as the raw network names them
DIR/pytorch_lora_weights.safetensors           of an adapter over a pipeline: itself, as diffusers loads it; the file
                                               above has the rest, and the pipeline is named in config.json
DIR/README.md                                  model card
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.errors import InputError
from rdmd_fast.files import check_readable, encoded, is_file, is_utf8, new_folder, open_to_read, read_text, save_by_name
from rdmd_fast.networks.adapters import adapter_of
from rdmd_fast.networks.class_labels import label_rows
from rdmd_fast.networks.options import ExportedNetworkOptions
from rdmd_fast.options import Options
from rdmd_fast.transport_weight import WeightRange

FORMAT = 1
MOST_BYTES = 1 << 20  # of a config.json
ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' name
FILES = re.compile(
    rf"README\.md|config\.json|(teacher|generator)\.safetensors|{re.escape(ADAPTER)}|generator\.(pt2|onnx.*)"
)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _is_none(value: object) -> bool:
    return value is None


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
    pipeline: str | None = Field(
        None, exclude_if=_is_none, description="folder of the text-to-image pipeline that it comes from"
    )
    base_sha256: str | None = Field(
        None,
        exclude_if=_is_none,
        pattern="[0-9a-f]{64}$",
        description="weights are an adapter over the pipeline's, whose hash this is",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if len(self.sample_shape) not in (1, 3):
            raise ValueError("sample_shape: give [D] or [C, H, W]")
        if self.role == "generator" and (self.reading is None or self.generator_sigma is None):
            raise ValueError("reading and generator_sigma: missing, a generator is read by them")
        if self.classes and self.target_class is not None and self.target_class >= self.classes:
            raise ValueError("target_class: the network has no such class")
        if self.base_sha256 and self.pipeline is None:
            raise ValueError("pipeline: missing, the weights are an adapter over one")
        if self.transport_weights and self.transport_weights[0] >= self.transport_weights[1]:
            raise ValueError("transport_weights: give [low, high] with low below high")
        return self

    @property
    def classes(self) -> int:
        """Of the network, 0 for none."""
        return getattr(self.network, "label_dim", 0)

    @property
    def autoencoder(self) -> str | None:
        """The pipeline's folder, where the weights of its autoencoder are there: what decodes and encodes samples."""
        found = self.pipeline and any((Path(self.pipeline) / "vae").glob("*.safetensors"))
        return self.pipeline if found else None

    def label_rows(self, class_labels: torch.Tensor | None, count: int, device) -> torch.Tensor | None:
        """What the network is given for ``class_labels``: see ``class_labels.label_rows``."""
        return label_rows(self.classes, self.target_class, class_labels, count, device)

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
        adapter = adapter_of(weights)
        files = {f"{config.role}.safetensors": weights.keys() - adapter.keys(), ADAPTER: adapter.keys()}
        for name, held in files.items():
            if held or name != ADAPTER:
                tensors = {key: weights[key].contiguous() for key in weights if key in held}
                save_by_name(partial / name, lambda path, tensors=tensors: save_file(tensors, path))

    write_folder(folder, config, fill, card)


def write_folder(folder: Path, config: ExportConfig, fill: Callable[[Path], None], card: str | None = None) -> None:
    """A folder with config.json, a README.md and what ``fill`` writes into it, whole or not at all."""
    with new_folder(folder) as partial:
        fill(partial)
        if card is not None:
            (partial / "README.md").write_bytes(encoded(card))
        (partial / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n", "utf-8")


def check_replaceable(folder: Path, flag: str = "--out") -> None:
    """Whether ``write_folder`` may put its own in the place of what is there: nothing, or an export and no more.

    Raises:
        InputError: a file, a folder with anything that is not an export's, or one that this account may not read.
    """
    if not folder.exists():
        return
    check_readable(folder / "config.json")
    try:
        read_export_config(folder, None)
    except InputError:
        raise InputError(f"{flag} {folder}: exists and is no export, choose another folder") from None
    foreign = sorted(path.name for path in folder.iterdir() if not FILES.fullmatch(path.name) or not path.is_file())
    if foreign:
        raise InputError(f"{flag} {folder}: holds more than an export ({foreign[0]}), choose another folder")


def read_export(folder: str | Path, role: str) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of an export; of an adapter over a pipeline its own (``adapted.whole`` adds the rest).

    Raises:
        InputError: no export there, one of another role, or a damaged file.
    """
    config = read_export_config(folder, role)
    weights = {}
    for name in (f"{role}.safetensors", *([ADAPTER] if config.base_sha256 else [])):
        path = Path(folder) / name
        if not is_file(path):
            raise InputError(f"{path}: missing, export the run again")
        weights |= read_tensors(path, "export the run again")
    return config, weights


def read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, float32; ``remedy`` ends the message if it is none.

    Raises:
        InputError: not readable by this account, damaged, or something in it is no finite number of floating point.
    """
    try:
        check_readable(path)
        if not path.is_file():  # a pipe would never end
            raise ValueError("not a regular file")
        with open_to_read(path) as file:
            tensors = load_file(path if is_utf8(path) else f"/proc/self/fd/{file.fileno()}")
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
    if not is_file(folder / "config.json"):
        raise InputError(f"{folder}: no export there (no config.json), name a RUN/export folder")
    try:
        values = json.loads(read_text(folder / "config.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{folder}/config.json: not readable as JSON, export the run again") from None
    config = ExportConfig.parse(values, f"{folder}/config.json", remedy=", export the run again")
    if config.format != FORMAT:
        raise InputError(f"{folder}/config.json: format {config.format} is not the {FORMAT} of this version")
    if role is not None and config.role != role:
        raise InputError(f"{folder}: holds a {config.role}, a {role} is needed")
    return config


def network_sha256(config: ExportConfig, weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of what a network computes, in hexadecimal: the same wherever it lies and in whatever file format."""
    said = config.model_dump(mode="json", include={"network", "sample_shape", "diffusion", "base_sha256"})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
