"""NVIDIA EDM's network pickles (arXiv 2206.00364), read as data: nothing in them is executed.

A file is a dict with the network under "ema". Each network object carries its source text (ignored here), the name of
its class, its constructor's arguments and its state, as torch.nn.Module keeps it.
"""

import mmap
import re
from pathlib import Path

import torch
from pydantic import ValidationError

from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.errors import InputError
from rdmd_fast.files import check_readable
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.model_files.safe_pickle import (
    Record,
    Refused,
    numpy_dtype,
    numpy_scalar,
    ordered_dict,
    parameter,
    read_pickle,
    read_storage,
    set_of,
    tensor,
)
from rdmd_fast.model_files.weights import check_weights, expected_weights
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions
from rdmd_fast.options import explain


def persistent_object(meta: dict) -> Record:
    """A network, layer, loss or augmentation: its class name and state; its source text is dropped unread."""
    if not (isinstance(meta, dict) and isinstance(meta.get("class_name"), str) and isinstance(meta.get("state"), dict)):
        raise TypeError("an object without class and state")
    return Record(meta["class_name"], meta["state"])


def module_dict() -> Record:
    return Record("ModuleDict")


GLOBALS = {
    "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
    "torch.nn.modules.container.ModuleDict": module_dict,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch.storage._load_from_bytes": read_storage,
    "collections.OrderedDict": ordered_dict,
    "builtins.set": set_of,
    "__builtin__.set": set_of,  # as Python 2's protocols name it
    "numpy.core.multiarray.scalar": numpy_scalar,  # NumPy 1
    "numpy._core.multiarray.scalar": numpy_scalar,  # NumPy 2
    "numpy.dtype": numpy_dtype,
}

# Constructor arguments of EDMPrecond, in order, with their defaults; further ones go to the network inside.
PRECONDITIONING = {
    "img_resolution": None,
    "img_channels": None,
    "label_dim": 0,
    "use_fp16": False,  # what EDM computes in; here the caller's choice
    "sigma_min": 0,  # EDM's sampler reads these two
    "sigma_max": float("inf"),
    "sigma_data": 0.5,
    "model_type": "DhariwalUNet",
}
# Each class of network: its options, and EDM's defaults where ours differ.
NETWORKS = {
    "SongUNet": (SongUNetOptions, {"kind": "song_unet", "channel_mult": [1, 2, 2, 2]}),
    "DhariwalUNet": (DhariwalUNetOptions, {"kind": "dhariwal_unet"}),
}


def read_edm_pickle(path: str | Path) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of an EDM network, such as edm-afhqv2-64x64-uncond-vp.pkl.

    Returns:
        The teacher's configuration (parameterisation edm), and the state dict of the network inside EDMPrecond: EDM's
        keys without the leading "model.", float32 on the CPU.

    Raises:
        InputError: no such file, no EDM pickle, one that asks for anything else than data, a network that is not
            EDMPrecond around SongUNet or DhariwalUNet, or weights that do not fit it.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise Refused("is not a file")
        check_readable(path)
        contents = _read(path)
        preconditioning = _network_of(contents)
        config = _config_of(preconditioning)
        weights = _weights_of(preconditioning.state["_modules"]["model"], path.stat().st_size)
    except Refused as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    check_weights(expected_weights(config, len(weights), str(path)), weights, str(path))
    weights = {name: value.to(torch.float32).contiguous() for name, value in weights.items()}
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: weight {name} holds values that are not finite, get the file again")
    return config, weights


def _read(path: Path) -> object:
    with path.open("rb") as file:
        head = file.read(512).lstrip()
        if not head:
            raise Refused("is empty, get it again")
        if head.startswith(b"<"):
            raise Refused("is a web page and not an EDM pickle, get the file itself")
        if head.startswith(b"PK"):
            raise Refused("is a zip file (torch.save writes those) and not an EDM pickle")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            return read_pickle(stream, GLOBALS)


def _network_of(contents: object) -> Record:
    """The EDMPrecond object."""
    if not isinstance(contents, dict) or "ema" not in contents:
        names = [name[:30] for name in contents if isinstance(name, str)] if isinstance(contents, dict) else []
        raise Refused(f"holds no network under 'ema' (it holds {names[:5]}), it is not an EDM pickle")
    outer = contents["ema"]
    if not isinstance(outer, Record) or not isinstance(outer.state, dict):
        raise Refused("holds no network under 'ema', it is not an EDM pickle")
    modules = outer.state.get("_modules")
    inner = modules.get("model") if isinstance(modules, dict) else None
    found = f"{outer.name[:50]!r} around {inner.name[:50]!r}" if isinstance(inner, Record) else repr(outer.name[:50])
    if outer.name != "EDMPrecond" or not isinstance(inner, Record) or inner.name not in NETWORKS:
        raise Refused(f"holds {found}, supported is EDMPrecond around {' or '.join(NETWORKS)}")
    return outer


def _config_of(outer: Record) -> ExportConfig:
    """Configuration by the arguments that EDMPrecond was constructed with."""
    arguments, named = outer.state.get("_init_args"), outer.state.get("_init_kwargs")
    if not isinstance(arguments, tuple) or not isinstance(named, dict) or len(arguments) > len(PRECONDITIONING):
        raise Refused("does not say how EDMPrecond was constructed")
    values = PRECONDITIONING | dict(zip(PRECONDITIONING, arguments, strict=False)) | named
    outer_values = {name: values.pop(name) for name in PRECONDITIONING}
    kind, inner = outer_values["model_type"], outer.state["_modules"]["model"].name
    if kind != inner:
        raise Refused(f"says it holds another network than the {inner} it does")
    options, defaults = NETWORKS[kind]
    network = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    channels, resolution = outer_values["img_channels"], outer_values["img_resolution"]
    if not all(type(size) is int and 0 < size < 2**16 for size in (channels, resolution)):
        raise Refused("does not say its resolution and channels")
    try:
        return ExportConfig(
            role="teacher",
            network=options(**defaults | {"label_dim": outer_values["label_dim"]} | network),
            sample_shape=[channels, resolution, resolution],
            diffusion=DiffusionOptions(parameterization="edm", sigma_data=outer_values["sigma_data"]),
        )
    except ValidationError as error:
        raise Refused(f"its network's arguments: {explain(error)}") from None
    except (TypeError, OverflowError):
        raise Refused("its network's arguments are no names and numbers") from None


def _weights_of(model: Record, limit: int) -> dict[str, torch.Tensor]:
    """State dict of a module tree; ``limit`` is the number of bytes that it may take."""
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def walk(module: object, prefix: str) -> None:
        if not isinstance(module, Record) or not isinstance(module.state, dict) or id(module) in seen:
            raise Refused(f"holds no proper module at {prefix}")
        seen.add(id(module))
        state = module.state
        hidden = state.get("_non_persistent_buffers_set") or ()
        children, *tensors = (state.get(key) or {} for key in ("_modules", "_parameters", "_buffers"))
        for name, value in (item for table in tensors for item in table.items()):
            key = prefix + _word(name)
            if value is None or name in hidden:
                continue
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise Refused(f"holds no numbers at {key}")
            weights[key] = value
        for name, child in children.items():
            if child is not None:
                walk(child, f"{prefix}{_word(name)}.")

    try:
        walk(model, "")
    except (AttributeError, TypeError, RecursionError):
        raise Refused("holds modules that are no tree of tensors") from None
    # Tensors are views so far; thousands of one storage would take any amount of memory.
    if sum(value.numel() * value.element_size() for value in weights.values()) > limit:
        raise Refused("holds weights that are larger than the file")
    return weights


def _word(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,100}", name, re.ASCII):
        raise Refused("holds a module or a weight without a proper name")
    return name
