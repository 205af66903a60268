"""The config's section ``deepspeed``: which of DeepSpeed's own keys our engines take, checked before anything runs."""

import functools
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rdmd_fast.errors import quoted
from rdmd_fast.options import explain, fields_called, plain_types, sections_of

_OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "rdmd.*_optimizer.grad_clip or teacher_stage.optimizer.grad_clip",
    "optimizer": "rdmd.*_optimizer or teacher_stage.optimizer",
    "scheduler": "rdmd.*_optimizer or teacher_stage.optimizer",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "fp16": "train.dtype",
    "torch_autocast": "train.dtype",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
}

# What DeepSpeed 0.19 reads by `dict.get` and our engines heed. The rest has models there.
_Dtype = Literal["fp32", "fp16", "bf16"]
_READ_BY_NAME = {
    "communication_data_type": _Dtype | None,
    "data_types": {"grad_accum_dtype": _Dtype | None, "buffer_dtype": _Dtype | None},
    "disable_python_gc": bool,
    "dump_state": bool,
    "flops_profiler": {
        "enabled": bool,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str | None,
        "recompute_fwd_factor": float,
    },
    "gradient_allreduce_op": Literal["mean", "sum"],
    "gradient_predivide_factor": float,
    "log_level": Literal["debug", "info", "warning", "error", "critical"] | None,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "steps_per_print": int | None,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}


def section_problems(section: dict) -> Iterator[str]:
    """Say in a line each what DeepSpeed would ignore or refuse, and what is set elsewhere."""
    for key, replacement in _OURS.items():
        if key in section:
            yield f"deepspeed.{key}: set {replacement} instead"
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict) or type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in (0, 1, 2, 3):
        yield "deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3"
        return
    yield from _zero_problems(zero)
    if section:
        yield from _spelling_problems(section, _section_model(), "deepspeed")
        try:
            _section_model().model_validate(section)
        except ValidationError as error:
            yield explain(error, _section_model(), prefix="deepspeed.")


def _zero_problems(zero: dict) -> Iterator[str]:
    if zero.get("round_robin_gradients"):
        yield (
            "deepspeed.zero_optimization.round_robin_gradients: must stay false, DeepSpeed 0.19 then maps shards "
            "to the wrong parameters"
        )
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            yield f"deepspeed.zero_optimization.{name}.device: checkpoints cannot hold what lies on nvme, use cpu"
    offload = zero.get("offload_optimizer") or {}
    if (isinstance(offload, dict) and offload.get("ratio", 1.0) != 1.0) or zero.get("zenflow"):
        yield (
            "deepspeed.zero_optimization: offload_optimizer.ratio must stay 1 and zenflow off, DeepSpeed would step "
            "some weights by an optimizer of its own, unguarded and in no checkpoint"
        )
    if zero.get("compute_grad_norm", True) is not True:
        yield "deepspeed.zero_optimization.compute_grad_norm: must stay true, updates are guarded by the norm"


def _spelling_problems(section: dict, model: type[BaseModel], where: str) -> Iterator[str]:
    """Name values that DeepSpeed takes for others than they are, by the annotations of its models."""
    for name, value in section.items():
        key = f"{where}.{name}"
        for field in fields_called(name, [model]):
            sections, types = list(sections_of(field.annotation)), set(plain_types(field.annotation))
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            takes_text = any(issubclass(each, str | os.PathLike) for each in types)
            if extra.get("deprecated"):
                yield f"{key}: DeepSpeed calls it deprecated, set {extra.get('new_param') or 'another key'} instead"
            elif value == "auto":
                yield f"{key}: 'auto' is filled in by transformers, not here: give a value, or remove the key"
            elif isinstance(value, dict) and sections:
                yield from _spelling_problems(value, sections[0], key)
            elif isinstance(value, str) and types and not takes_text:
                yield f"{key}: must be {'true or false' if bool in types else 'a number'}, found {quoted(value)}"
            elif isinstance(value, bool) and types & {int, float} and bool not in types:
                yield f"{key}: must be a number, found {value}"


@functools.cache
def _section_model() -> type[BaseModel]:
    """DeepSpeed's own models, by their keys, and what it has none for."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a search and a warning
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    return _model_of(
        "Section",
        {
            **_READ_BY_NAME,
            **monitors,
            "comms_logger": CommsLoggerConfig,
            "timers": {"throughput": DeepSpeedThroughputTimerConfig},
            "zero_optimization": DeepSpeedZeroConfig,
        },
    )


def _model_of(name: str, keys: dict[str, Any]) -> type[BaseModel]:
    """A model without required keys, whose nested ones are dicts."""
    types = {key: _model_of(key, kind) if isinstance(kind, dict) else kind for key, kind in keys.items()}
    fields = {key: (kind, Field(None, description="DeepSpeed's")) for key, kind in types.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
