"""The whole configuration: composes the options that live beside their components, reads YAML and overrides."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from itertools import chain
from typing import Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .checkpoint import CheckpointOptions
from .data.options import DataOptions
from .data.toys import ToyDistribution
from .diffusion import DiffusionOptions
from .distributed import TrainOptions, zero_stage
from .errors import InputError, is_plain
from .networks import GeneratorOptions, NetworkOptions, TeacherCopyOptions
from .options import Options
from .rdmd import RDMDOptions
from .runtime import read_text
from .teacher import TeacherStageOptions
from .telemetry import TelemetryOptions
from .transport_weight import LogUniformWeight
from .validation import ValidationOptions


class Config(Options):
    """One runnable experiment. Each section is documented where it is defined."""

    stage: Literal["teacher", "rdmd"] = Field(description="teacher: score of the target domain; rdmd: distillation")
    run_dir: str = Field(description="folder of the run: config, metrics, pictures, checkpoints, export")
    license: str | None = Field(
        None,
        max_length=100,
        description="licence of the exports, for their model card, as mit or cc-by-nc-sa-4.0; unset: the teacher's, "
        "where that is known (ours)",
    )
    any_size = frozenset(["seed"])

    seed: int = Field(0, ge=0, lt=2**64, description="key of all counter-based randomness, 64 bits (ours)")
    data: DataOptions = Field(default_factory=DataOptions)
    teacher: str | None = Field(
        None,
        description="rdmd: a teacher's export folder, an NVIDIA EDM .pkl, a diffusers folder, `analytic` for the toys; "
        "teacher: the same, where to start from (fine-tuning)",
    )
    network: NetworkOptions | None = Field(
        None, description="network of teacher and fake score; with an export as teacher it comes from there"
    )
    generator: GeneratorOptions = Field(
        default_factory=TeacherCopyOptions,
        description="the generator; `teacher` copies the teacher's network (paper)",
    )
    diffusion: DiffusionOptions | None = Field(
        None,
        description="parameterisation of `network`; with an export as teacher it comes from there (EDM's if unset)",
    )
    rdmd: RDMDOptions = Field(default_factory=RDMDOptions)
    teacher_stage: TeacherStageOptions = Field(default_factory=TeacherStageOptions)
    train: TrainOptions = Field(default_factory=TrainOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    telemetry: TelemetryOptions = Field(default_factory=TelemetryOptions)
    validation: ValidationOptions = Field(default_factory=ValidationOptions)
    deepspeed: dict = Field(
        default_factory=dict,
        description="a DeepSpeed section merged over ours for the trained engines, as {zero_optimization: {stage: 2}}",
    )

    @model_validator(mode="after")
    def _consistent(self):
        problems = chain(_stage_problems(self), _deepspeed_problems(self.deepspeed), _precision_problems(self))
        problem = next(problems, None)
        if problem:
            raise ValueError(problem)
        return self


def _stage_problems(config: Config):
    if config.stage == "teacher":
        if config.data.target is None:
            yield "data.target: missing, the teacher stage trains on it"
        if config.network is None and config.teacher is None:
            yield "network: missing, name a kind (`network: {kind: song_unet, …}`) or a teacher to start from"
        if config.teacher == "analytic":
            yield "teacher: 'analytic' needs no training, use stage rdmd"
        return
    if config.data.source is None:
        yield "data.source: missing, the rdmd stage translates from it"
    if config.teacher is None:
        yield "teacher: missing, name a teacher's export folder, an EDM .pkl, or `analytic` for a toy target"
    if config.teacher == "analytic":
        if not isinstance(config.data.target, ToyDistribution):
            yield "data.target: must be a toy such as {toy: 8gaussians} when teacher is 'analytic'"
        if config.generator.kind == "teacher":
            yield "generator.kind: an analytic teacher has no network to copy, use mlp or affine"
        if config.network is None and config.rdmd.fake_score == "learned":
            yield "network: missing, an analytic teacher lends the fake score no network (`network: {kind: mlp}`)"
    elif config.network is not None:
        yield "network: comes from the teacher's export, remove the section"
    elif config.diffusion is not None:
        yield "diffusion: comes from the teacher's export, remove the section"
    if isinstance(config.rdmd.transport_weight, LogUniformWeight) and config.generator.kind == "affine":
        yield "rdmd.transport_weight: an affine generator is of one λ only, give a number or use generator.kind mlp"
    if config.rdmd.fake_score == "closed_form":
        if config.generator.kind != "affine" or config.teacher != "analytic":
            yield "rdmd.fake_score: 'closed_form' needs generator.kind affine and teacher analytic"
        if not (isinstance(config.data.source, ToyDistribution) and config.data.source.toy == "gaussian"):
            yield "rdmd.fake_score: 'closed_form' needs data.source {toy: gaussian}"


def _deepspeed_problems(section: dict):
    ours = {
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.micro_batch_size",
        "gradient_clipping": "rdmd.*_optimizer.grad_clip or teacher_stage.optimizer.grad_clip",
        "optimizer": "rdmd.*_optimizer or teacher_stage.optimizer",
        "scheduler": "rdmd.*_optimizer or teacher_stage.optimizer",
        "bf16": "train.dtype",
        "fp16": "train.dtype",
    }
    for key, replacement in ours.items():
        if key in section:
            yield f"deepspeed.{key}: set {replacement} instead"
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict) or type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in (0, 1, 2, 3):
        yield "deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3"
        return
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


def _precision_problems(config: Config):
    stage = zero_stage(config.deepspeed)
    if config.train.compile and stage == 3:
        yield "train.compile: ZeRO 3 gathers weights inside networks, use a lower stage or remove the key"
    types_given = config.deepspeed.get("data_types") or {}
    accumulates = (isinstance(types_given, dict) and types_given.get("grad_accum_dtype")) or "bf16"
    if config.train.dtype == "bf16" and not stage and accumulates not in ("bf16", "bfloat16"):
        yield (
            "deepspeed.data_types.grad_accum_dtype: bf16 without ZeRO accumulates bf16 gradients, remove the key or "
            "use zero_optimization.stage 1"
        )


MOST_BYTES, MOST_VALUES, MOST_LEVELS = 1 << 19, 10_000, 32
"""Of a configuration: bytes of its file, values and levels once aliases are followed. The longest preset has 60."""

_SHORTER = "write a long list of shards as a pattern such as shards/{0000..0999}.tar"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; people who write configs mean a number."""

    merged = composed = 0

    def compose_node(self, parent, index):
        """Keys and values are counted as they are read: half a megabyte of them would take seconds."""
        self.composed += 1
        if self.composed > 2 * MOST_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"too many values: {_SHORTER}", mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node) -> None:
        """Merge keys (<<), which can double a mapping again and again, are counted."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


# What PyYAML raises for values that do not fit their tags, beside its own errors.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def _check_plain(values: dict, where: str) -> None:
    """Refuse what no configuration is, ahead of checks that would take for ever: aliases can make 10^9 values of ten.

    Raises:
        InputError: too many values, too deeply nested, a key that is no name, control characters.
    """
    count, level = 0, [("", values)]
    for _ in range(MOST_LEVELS):
        below = []
        for key, value in level:
            if isinstance(value, dict):
                below += [(f"{key}.{name}" if key else name, each) for name, each in value.items()]
                strange = next((name for name in value if not isinstance(name, str) or not is_plain(name)), None)
                if strange is not None or None in value:
                    raise InputError(f"{where}: {key or 'top'}: key {str(strange)[:60]!r} is no name")
            elif isinstance(value, list):
                below += [(key, each) for each in value]
            elif isinstance(value, str) and not is_plain(value, besides="\n\t"):  # as in commands of several lines
                raise InputError(f"{where}: {key}: holds control characters ({value[:60]!r})")
            elif isinstance(value, int | float) and not abs(value) < 2**64:
                raise InputError(f"{where}: {key}: is {_brief(value)}, must be a finite number of a size that is meant")
            elif not isinstance(value, str | int | float | None):
                raise InputError(f"{where}: {key}: is a {type(value).__name__}, write a number, a text or a list")
            count += 1
            if count + len(below) > MOST_VALUES:
                raise InputError(f"{where}: more than {MOST_VALUES} values: remove aliases, {_SHORTER}")
        level = below
        if not level:
            return
    raise InputError(f"{where}: {level[0][0][:60]}: nested deeper than {MOST_LEVELS} levels")


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys, YAML values), validate.

    Raises:
        InputError: one line that names the file or key, what is wrong and the nearest right key.
    """
    return validate_config(read_values(path, overrides), path)


def read_values(path: str, overrides: list[str] = (), what: str = "config") -> dict:
    """Plain values of a YAML file (``what`` it is called in errors) with ``key=value`` overrides; errors as above."""
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        remedy = f"; {_SHORTER}" if os.path.isfile(path) and os.path.getsize(path) > MOST_BYTES else ""
        raise InputError(f"{what} {path}: cannot be read ({_reason(error)}){remedy}") from None
    values = _parse_yaml(text, f"{what} {path}")
    if not isinstance(values, dict):
        raise InputError(f"{what} {path}: must be a mapping of keys to values, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    _check_plain(values, f"{what} {path}")
    return values


def validate_config(values: dict, origin: str) -> Config:
    """Check plain values (from YAML) against the typed options; ``origin`` names them in the error."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"config {origin}: {_explain(error.errors()[0])}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _parse_yaml(text: str, where: str):
    try:
        return yaml.load(text, _Loader)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{where}: not valid YAML{line} ({problem})") from None


def apply_override(values: dict, override: str) -> None:
    """Put ``key=value`` (dotted key, YAML value) into nested ``values``; InputError for what is none."""
    key, separator, value = override.partition("=")
    if not separator or not all(part for part in key.split(".")):
        raise InputError(f"override {override!r}: write it as key=value, for example train.steps=1000")
    *parents, leaf = key.split(".")
    if len(parents) >= MOST_LEVELS:
        raise InputError(f"override {override!r}: no key has so many parts")
    section = values
    for depth, part in enumerate(parents):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise InputError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    section[leaf] = _parse_yaml(value, f"override {override!r}")


def _explain(error: dict) -> str:
    keys = [name for name, _, _ in option_table()]
    # Members of a union put their own name into the location; keys that exist nowhere in the table are those.
    parts = [str(part) for part in error["loc"]]
    tags = {
        "mlp",
        "affine",
        "song_unet",
        "dhariwal_unet",
        "teacher",
        "lognormal",
        "karras_uniform",
        "log_uniform",
        "ToyDistribution",
        "str",
        "number",
        "range",
    }
    kept: list[str] = []
    for part in parts:
        if not kept or part not in tags or ".".join([*kept, part]) in keys:  # a member's name can be a key elsewhere
            kept.append(part)
    located = ".".join(kept)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(located, keys, n=1, cutoff=0.5)
        leaf = located.rsplit(".", 1)[-1]
        near = near or [key for key in keys if key.rsplit(".", 1)[-1] == leaf][:1]
        return f"unknown key {located}" + (f", did you mean {near[0]}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{located}: missing" if located else message
    if error["type"] == "value_error" and not located:
        return message
    found = f", found {_brief(error['input'])}" if not isinstance(error["input"], dict | BaseModel) else ""
    return f"{located}: {message[0].lower() + message[1:]}{found}"


def _brief(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a huge number"
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"


def option_table() -> list[tuple[str, str, str]]:
    """Every option as (dotted key, default, description with unit and origin)."""
    return list(options_of(Config, ""))


def options_of(model: type[BaseModel], prefix: str):
    """(dotted key, default, description) of every option of a section; ``prefix`` goes before each key."""
    seen = set()
    for name, field in model.model_fields.items():
        sections = [kind for kind in _members(field.annotation) if _is_section(kind)]
        default = "" if field.is_required() else repr(field.get_default(call_default_factory=True))
        if not sections or field.description:
            plain = not sections or isinstance(field.default, int | float)
            yield f"{prefix}{name}", default if plain else "", field.description or ""
        for section in sections:
            for key, value, description in options_of(section, f"{prefix}{name}."):
                if key not in seen:
                    seen.add(key)
                    yield key, value, description


def _is_section(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _members(annotation):
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
