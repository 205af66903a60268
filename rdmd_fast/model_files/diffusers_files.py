"""The files of a folder that diffusers has saved: JSON and safetensors, nothing that could run."""

import json
import re
from pathlib import Path

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text
from rdmd_fast.model_files.export_format import read_tensors

MOST_BYTES = 1 << 25  # of a JSON file; an index of weights lists thousands
WEIGHTS = "diffusion_pytorch_model.safetensors"
# save_pretrained(variant="fp16") names one file so, and the index of several; earlier versions as in the last line.
_VARIANTS = tuple(
    re.compile(rf"diffusion_pytorch_model\.{pattern}")
    for pattern in (
        r"(?P<variant>(?![^.]*-\d+-of-\d+\.)[^.]+)\.safetensors",
        r"safetensors\.index\.(?P<variant>[^.]+)\.json",
        r"safetensors\.(?P<variant>[^.]+)\.index\.json",
    )
)
# Names that attention layers had before diffusers 0.16.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_json(path: Path) -> dict:
    """The mapping in a JSON file.

    Raises:
        InputError: not readable, or no mapping.
    """
    try:
        values = json.loads(read_text(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path}: not readable as JSON, copy the folder again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a mapping of keys to values, copy the folder again")
    return values


def check_class(path: Path, values: dict, *known: str) -> None:
    """Raise InputError unless ``_class_name`` of a config file is one of ``known``."""
    name = values.get("_class_name")
    if name not in known:
        raise InputError(f"{path}: _class_name is {name!r}, supported: {', '.join(known)}")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder, float32, under diffusers' present names.

    Raises:
        InputError: none there, damaged, or pickled; or several variants and no plain weights.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        part = read_tensors(path, "copy it again")
        weights |= {_present_name(name): tensor for name, tensor in part.items()}
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors file, or those that its index lists: the plain ones, else those of the one variant there."""
    for path in (folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"):
        if path.is_file():
            return _listed(path)
    variants = _variants(folder)
    if len(variants) > 1:
        raise InputError(f"{folder}: has weights of variants {', '.join(variants)}, keep one and move the others away")
    if variants:
        return _listed(*variants.values())
    if pickled := next(folder.glob("diffusion_pytorch_model*.bin"), None):
        raise InputError(
            f"{pickled}: a pickle, which is not loaded: save the model as safetensors (in Python, for a pipeline: "
            "diffusers.DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER))"
        )
    raise InputError(f"{folder / WEIGHTS}: missing, copy the model's weights there")


def _listed(path: Path) -> list[Path]:
    """The files that an index of weights lists; the file itself if it is none."""
    if path.suffix != ".json":
        return [path]
    weight_map = read_json(path).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or not all(Path(name).name == name for name in names):
        raise InputError(f"{path}: weight_map: does not list files of this folder, copy it again")
    return [path.with_name(name) for name in sorted(names)]


def _variants(folder: Path) -> dict[str, Path]:
    """The file of weights, or else the index, of each variant."""
    found: dict[str, Path] = {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for match in (pattern.fullmatch(name) for pattern in _VARIANTS for name in names):
        if match:
            found.setdefault(match["variant"], folder / match[0])
    return found


def _present_name(name: str) -> str:
    return ".".join(OLD_NAMES.get(part, part) for part in name.split(".")) if ".attentions." in name else name
