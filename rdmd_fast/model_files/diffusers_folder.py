"""Teachers from a folder that diffusers has saved: a UNet2DModel and its scheduler, as JSON and safetensors.

Nothing but JSON numbers and tensors is read: no pickled weights, no code, no network access.
"""

import json
from pathlib import Path

import torch

from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.errors import InputError
from rdmd_fast.files import read_text
from rdmd_fast.model_files.diffusers_files import MOST_BYTES, check_class, read_json, read_weights
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions, FlowSchedule, UNet2DOptions, VPSchedule
from rdmd_fast.options import Options

# Samplers of one and the same discrete VP process; they differ in how they walk it, not in what the network is told.
VP_SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep",
        "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "UniPCMultistep",
    )
)  # fmt: skip
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# EMAModel.save_pretrained notes its own state beside the network's keys (unet_ema/ of a training checkpoint).
EMA_STATE = frozenset(
    ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
)
PARAMETERIZATIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def read_diffusers(folder: str | Path) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """A UNet2DModel as teacher: how to build and read it, and its weights in float32 under diffusers' names.

    Args:
        folder: a pipeline with unet/ and scheduler/, or a model folder (config.json and
            diffusion_pytorch_model.safetensors) with scheduler_config.json in it, or a pipeline's unet/, or unet/ or
            unet_ema/ of a training checkpoint in it.

    Raises:
        InputError: a file is missing or damaged, the weights are pickled, or the network, the schedule or the
            prediction type is none that we can read; the line names the file and the key.
    """
    config = read_diffusers_config(folder)
    return config, read_weights(_model_folder(Path(folder)))


def read_diffusers_config(folder: str | Path) -> ExportConfig:
    """The first half of ``read_diffusers``, from the JSON files alone."""
    path = _model_folder(Path(folder)) / "config.json"
    values = read_json(path)
    check_class(path, values, "UNet2DModel")
    if "sample_size" not in values or values["sample_size"] is None:
        raise InputError(f"{path}: sample_size: missing, write the resolution that the network was trained at")
    unet = _validate(path, {key: value for key, value in values.items() if key not in EMA_STATE}, UNet2DOptions)
    schedule, diffusion = read_scheduler(_scheduler_file(path.parent))
    return ExportConfig(
        role="teacher",
        network=DiffusersUNetOptions(unet=unet, schedule=schedule),
        sample_shape=list(unet.sample_shape),
        diffusion=diffusion,
    )


def is_diffusers_folder(folder: str | Path) -> bool:
    """Whether ``folder`` holds a model or a pipeline of diffusers' (whatever its kind), not one of our exports."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file() or (folder / "unet" / "config.json").is_file():
        return True
    try:
        values = json.loads(read_text(folder / "config.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "_class_name" in values


# -- config files ------------------------------------------------------------------------------------------------------


def _model_folder(folder: Path) -> Path:
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(f"{folder}: no config.json or unet/config.json, name a folder that save_pretrained has written")


def _scheduler_file(model_folder: Path) -> Path:
    candidates = [
        model_folder / "scheduler_config.json",
        model_folder / "scheduler" / "scheduler_config.json",
        model_folder.parent / "scheduler" / "scheduler_config.json",
    ]
    checkpoint = model_folder.absolute().parent
    if checkpoint.name.startswith("checkpoint-"):  # of a training script, in the folder that gets its pipeline
        candidates.append(checkpoint.parent / "scheduler" / "scheduler_config.json")
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise InputError(
            f"{candidates[0]}: missing, the noise levels follow from the scheduler: put the scheduler_config.json of "
            "the pipeline there"
        )
    return found


def read_scheduler(path: Path) -> tuple[VPSchedule | FlowSchedule, DiffusionOptions]:
    """Noise levels and parameterisation that a scheduler_config.json tells; InputError as ``read_diffusers``."""
    values = read_json(path)
    name = values.get("_class_name")
    if name in FLOW_SCHEDULERS:
        if values.get("invert_sigmas"):
            raise InputError(f"{path}: invert_sigmas: not supported, only t = 1 for pure noise is")
        given = {key: values[key] for key in ("num_train_timesteps",) if key in values}
        return _validate(path, given, FlowSchedule), DiffusionOptions(parameterization="flow")
    check_class(path, values, *VP_SCHEDULERS, *FLOW_SCHEDULERS)
    prediction = values.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PARAMETERIZATIONS:
        raise InputError(f"{path}: prediction_type {prediction!r} is not one of {', '.join(PARAMETERIZATIONS)}")
    if values.get("timestep_type", "discrete") != "discrete":
        raise InputError(f"{path}: timestep_type {values['timestep_type']!r} is not supported, only 'discrete' is")
    for key in ("beta_schedule", "beta_start", "beta_end"):
        if key not in values and values.get("trained_betas") is None:
            raise InputError(f"{path}: {key}: missing, the noise levels follow from it")
    given = {key: values[key] for key in VPSchedule.model_fields if key in values and key != "kind"}
    schedule = _validate(path, given, VPSchedule)
    return schedule, DiffusionOptions(parameterization=PARAMETERIZATIONS[prediction])


def _validate(path: Path, values: dict, options: type[Options]):
    """Options from the keys that are not diffusers' own notes (_class_name, _diffusers_version, …)."""
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = "{}: is not a key that is known here, its effect on the network would be lost"
    return options.parse(given, str(path), unknown)
