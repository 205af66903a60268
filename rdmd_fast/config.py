"""The whole configuration: composes the options that live beside their components, reads YAML and overrides."""

from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rdmd_fast.checkpoints.options import CheckpointOptions
from rdmd_fast.data.options import DataOptions
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.engine.deepspeed_section import section_problems
from rdmd_fast.engine.options import TrainOptions, zero_stage
from rdmd_fast.engine.update_guard import GuardOptions
from rdmd_fast.errors import InputError
from rdmd_fast.monitoring.telemetry import TelemetryOptions
from rdmd_fast.monitoring.validation import ValidationOptions
from rdmd_fast.networks.options import GeneratorOptions, NetworkOptions, TeacherCopyOptions
from rdmd_fast.networks.text_options import LoRAOptions
from rdmd_fast.options import Options, options_of
from rdmd_fast.paths import data_path, path_to_read, path_to_write, with_paths
from rdmd_fast.rdmd import RDMDOptions
from rdmd_fast.teacher import TeacherStageOptions
from rdmd_fast.transport_weight import LogUniformWeight
from rdmd_fast.yaml_values import dump_values, read_values

_PATHS = {
    "run_dir": path_to_read,  # a run may be there, to go on from
    "teacher": path_to_read,
    **{f"data.{role}": data_path for role in ("source", "target", "source_holdout", "target_holdout")},
    "data.cache_dir": path_to_write,
    "rdmd.cost.features": path_to_read,
    "telemetry.decoder": path_to_read,
    "validation.judge": data_path,
}


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
        description="rdmd: a teacher's export folder, an NVIDIA EDM .pkl, a diffusers folder or text-to-image "
        "pipeline, `analytic` for the toys; teacher: the same, where to start from (fine-tuning)",
    )
    teacher_prompt: str | None = Field(
        None,
        max_length=10_000,
        description="with a text-to-image pipeline as teacher: what the target domain shows, as "
        "'a photo of a lion' (ours)",
    )
    teacher_negative_prompt: str | None = Field(
        None,
        max_length=10_000,
        description="what guidance leads away from; unset: what the pipeline takes without one, an empty text or zeros",
    )
    teacher_guidance: float | None = Field(
        None,
        ge=0,
        le=100,
        description="s of the teacher's F_negative + s (F_prompt - F_negative), w = s - 1 in other texts: 1 is off, "
        "more moves the target distribution, which is outside the theorem; unset: 1.5 (near DMD2's 1.75), for FLUX.1 1",
    )
    guidance_embedding: float | None = Field(
        None,
        ge=0,
        le=100,
        description="what a network is told that is told its guidance (FLUX.1 [dev]); unset: 3.5, its pipeline's",
    )
    student_guidance_embedding: float | None = Field(
        None,
        ge=0,
        le=100,
        description="what generator and fake score are told instead, as 1 for none (ours); unset: what the teacher is",
    )
    fake_prompt: str | None = Field(
        None,
        max_length=10_000,
        description="what the fake score is told in place of teacher_prompt, as what the sources show (ours)",
    )
    lora: LoRAOptions | None = Field(
        None,
        description="with a text-to-image pipeline: train adapters over its weights, which are in memory once; unset: "
        "all weights of whole copies",
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

    @model_validator(mode="before")
    @classmethod
    def _on_this_machine(cls, values):
        return with_paths(values, _PATHS)

    @model_validator(mode="after")
    def _consistent(self):
        problems = chain(_stage_problems(self), section_problems(self.deepspeed), _precision_problems(self))
        problem = next(problems, None)
        if problem:
            raise ValueError(problem)
        return self

    def guidance_of(self, network: Options) -> float:
        """s of ``teacher_guidance`` for a teacher's network; 1 for one that takes no prompt."""
        usual = getattr(network, "usual_guidance", 1.0)
        return usual if self.teacher_guidance is None else self.teacher_guidance


def _stage_problems(config: Config):
    prompted = ("teacher_negative_prompt", "teacher_guidance", "student_guidance_embedding", "fake_prompt")
    if config.teacher_prompt is None:
        for key in (*prompted, "guidance_embedding", "lora"):
            if getattr(config, key) is not None:
                yield f"{key}: belongs to a teacher_prompt, name one or remove the key"
    elif config.teacher in (None, "analytic"):
        yield "teacher_prompt: is for a text-to-image pipeline as teacher, remove the key"
    elif config.stage == "teacher":
        for key in prompted:
            if getattr(config, key) is not None:
                yield f"{key}: is for stage rdmd, remove the key"
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


def _precision_problems(config: Config):
    stage = zero_stage(config.deepspeed)
    if config.train.compile and stage == 3:
        yield "train.compile: ZeRO 3 gathers weights inside networks, use a lower stage or remove the key"
    if config.train.cuda_graphs:
        yield from _cuda_graph_problems(config.train, config.deepspeed)
    if config.train.deterministic and config.train.cudnn_benchmark:
        yield "train.cudnn_benchmark: chooses convolutions by timing, remove it or train.deterministic"
    types_given = config.deepspeed.get("data_types") or {}
    accumulates = (isinstance(types_given, dict) and types_given.get("grad_accum_dtype")) or "bf16"
    if config.train.dtype == "bf16" and not stage and accumulates not in ("bf16", "bfloat16"):
        yield (
            "deepspeed.data_types.grad_accum_dtype: bf16 without ZeRO accumulates bf16 gradients, remove the key or "
            "use zero_optimization.stage 1"
        )


def _cuda_graph_problems(train: TrainOptions, deepspeed_section: dict):
    if train.compile:
        yield "train.cuda_graphs: train.compile=reduce-overhead records its own graphs, remove one of the two keys"
    if zero_stage(deepspeed_section) == 3:
        yield "train.cuda_graphs: ZeRO 3 gathers weights inside networks, use a lower stage or remove the key"
    if train.activation_checkpointing:
        yield (
            "train.cuda_graphs: train.activation_checkpointing reads random numbers' state within passes, which no "
            "graph can, remove one of the two keys"
        )
    offload = deepspeed_section.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        yield (
            "train.cuda_graphs: deepspeed.zero_optimization.offload_optimizer copies gradients to the host while "
            "passes run, remove one of the two keys"
        )


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys; values as ``yaml_values`` reads them), validate.

    Raises:
        InputError: one line that names the file or key, what is wrong and the nearest right key.
    """
    return validate_config(read_values(path, overrides, model=Config), path)


def validate_config(values: dict, origin: str) -> Config:
    """Check plain values (from YAML) against the typed options; ``origin`` names them in the error."""
    return Config.parse(values, f"config {origin}")


def option_table() -> list[tuple[str, str, str]]:
    """Every option as (dotted key, default, description with unit and origin)."""
    return list(options_of(Config))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return dump_values(config.model_dump(mode="json"))


# Sections and keys that may change between a stop and its continuation without making it another experiment.
_FREE = {"run_dir", "license", "telemetry", "checkpoint", "validation", "deepspeed"}


# How data come, not which; how a batch is split; how long; and what a run that broke off wants changed.
_FREE_KEYS = {
    *(f"train.{key}" for key in ("steps", "micro_batch_size", "collective_timeout")),
    *(f"train.{key}" for key in ("activation_checkpointing", "compile", "cuda_graphs")),
    *(f"train.{key}" for key in ("cudnn_benchmark", "deterministic")),
    *(f"train.guard.{key}" for key in GuardOptions.model_fields),
    *(f"data.{key}" for key in ("cache_gib", "cache_dir", "workers", "prefetch", "max_dropped")),
    *(f"data.{key}" for key in ("source_holdout", "target_holdout")),
}


def check_compatible(path: Path, manifest: dict, config: dict, made_of: dict[str, list]) -> None:
    """Whether a checkpoint is one that a run of the plain configuration ``config`` may go on from.

    Args:
        manifest: of the checkpoint; its ``config`` and ``made_of`` are those of the run that saved it.
        made_of: hashes of data and teacher, by config key: what these keys name may have another name by now.

    Raises:
        InputError: names the first key that makes it another experiment.
    """
    saved, known = _with_defaults(manifest["config"], config), manifest.get("made_of", {})
    for key in known.keys() & made_of.keys():
        if not _are_alike(known[key], made_of[key]):
            raise InputError(
                f"checkpoint {path}: was trained with another {key} than what the config names so now (their hashes "
                "differ); name the same again, or choose another run_dir"
            )
    free = {*_FREE, *_FREE_KEYS, *(known.keys() & made_of.keys())}
    if config["stage"] == "rdmd" and config["teacher"] != "analytic":
        free |= {"data.target"}  # of validation alone
    for section in config:
        key = next(_differences(saved.get(section), config[section], section, free), None)
        if key:
            raise InputError(
                f"checkpoint {path}: was trained with {key[0]} = {key[1]!r}, the config says {key[2]!r}; "
                "set it back, or choose another run_dir"
            )


def _are_alike(saved: list[str | None], now: list[str | None]) -> bool:
    """Whether shards are the same as far as both are known: one may be damaged by now."""
    return len(saved) == len(now) and all(None in pair or pair[0] == pair[1] for pair in zip(saved, now, strict=True))


def _with_defaults(saved: dict, now: dict) -> dict:
    """A config that another version saved: what that did not know stands at its default of now."""

    def known(saved, now):
        if not (isinstance(saved, dict) and isinstance(now, dict)):
            return now
        return {key: known(saved[key], value) for key, value in now.items() if key in saved}

    def filled(saved, defaults):
        if not (isinstance(saved, dict) and isinstance(defaults, dict)):
            return saved
        return {key: filled(saved[key], value) if key in saved else value for key, value in defaults.items()}

    try:
        free = {key: now[key] for key in _FREE & now.keys()}  # of then they may be refused today
        defaults = Config.model_validate(known(saved, now) | free, strict=False).model_dump(mode="json")
    except ValueError:  # what was added has no default
        return saved
    return {**saved, **filled(saved, defaults)}


def _differences(saved, now, key: str, free: Collection[str]) -> Iterator[tuple[str, object, object]]:
    """(key, saved value, value of now) where they differ, keys of ``free`` and what is below them aside."""
    if key in free or saved == now:
        return
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in {**saved, **now}:
            yield from _differences(saved.get(name), now.get(name), f"{key}.{name}", free)
    else:
        yield key, saved, now
