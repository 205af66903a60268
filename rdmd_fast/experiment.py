"""Builds a stage from its configuration: data, networks, engines, EMA, pictures and validation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rdmd_fast.checkpoints.training_state import TrainingState
from rdmd_fast.config import Config
from rdmd_fast.costs import FeatureCost
from rdmd_fast.data.domain import open_domain
from rdmd_fast.data.stream import SampleStream
from rdmd_fast.data.stream_report import StreamReport
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.diffusion import DiffusionOptions, Reading
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.ema import ShardedEMA
from rdmd_fast.engine.engine import freeze_teacher, initialize_engine, set_learning_rate
from rdmd_fast.engine.gpu_arithmetic import set_arithmetic
from rdmd_fast.engine.options import DTYPES, OptimizerOptions
from rdmd_fast.engine.stage_context import StageContext
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import ExportConfig, network_sha256
from rdmd_fast.model_files.teachers import read_teacher, read_teacher_config
from rdmd_fast.model_files.text_pipeline import guided
from rdmd_fast.model_files.weights import check_weights, expected_weights, load_teacher_weights, load_weights
from rdmd_fast.monitoring.run_pictures import Picture, no_picture, rdmd_picture, teacher_picture
from rdmd_fast.monitoring.telemetry import Telemetry
from rdmd_fast.monitoring.validation import open_validation
from rdmd_fast.networks import build_network
from rdmd_fast.networks.analytic import GaussianMixtureDenoiser, gaussian_denoiser
from rdmd_fast.networks.analytic_score import AnalyticScore
from rdmd_fast.networks.class_labels import target_class_row, training_labels
from rdmd_fast.networks.flops import distillation_flops, forward_flops, training_passes
from rdmd_fast.networks.text_options import TextOptions
from rdmd_fast.processes.world import World, on_main
from rdmd_fast.prompted_networks import PromptedPipeline, distilled_networks, trained_teacher
from rdmd_fast.randomness import Philox
from rdmd_fast.rdmd import RDMD, Networks
from rdmd_fast.teacher import TeacherStage
from rdmd_fast.transport_weight import bounds_of

Exported = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def as_it_is(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state


@dataclass
class Experiment:
    """A stage ready to run.

    Attributes:
        stage: has ``iteration(step)``: one update of each network on fresh data, of the fake score several.
        state: engines and EMA, what a checkpoint holds.
        optimizers: options of each engine in ``state``, by name.
        export: config.json of the export; the EMA's weights go with it.
        picture: draws a picture from EMA weights; a collective call, the main rank writes.
        measure: validation metrics from EMA weights, on the main rank; None without held-out data.
        best_by: the metric whose lowest value is kept.
        made_of: hashes of each shard of the data and of the teacher, whatever their paths, by config key.
        exported: weights of an export from a state dict of its network.
    """

    stage: TeacherStage | RDMD
    state: TrainingState
    optimizers: dict[str, OptimizerOptions]
    export: ExportConfig
    picture: Picture
    measure: Callable[[dict[str, torch.Tensor]], dict[str, float]] | None = None
    best_by: str | None = None
    made_of: dict[str, list[str | None]] = field(default_factory=dict)
    exported: Exported = as_it_is

    def set_learning_rates(self, step: int, total: int) -> dict[str, float]:
        """Set each engine's rate for iteration ``step`` of ``total``; returns them as metrics."""
        return {
            f"lr/{name}": set_learning_rate(engine, self.optimizers[name], step, total)
            for name, engine in self.state.engines.items()
        }

    def update_networks(self, step: int) -> None:
        """Run the stage's iteration number ``step``."""
        self.stage.iteration(step)

    def update_ema(self, step: int) -> None:
        with self.stage.context.phase("ema"):
            self.state.ema.update(step)

    def averaged(self) -> dict[str, torch.Tensor]:
        """The EMA as ``export`` has it, on the CPU of every rank; a collective call."""
        return self.exported(self.state.ema.gather())

    def close(self) -> None:
        """End the workers that read data and give their memory back."""
        for role in ("source", "target"):
            if hasattr(self.stage, role):
                getattr(self.stage, role).close()


def build_experiment(config: Config, world: World, telemetry: Telemetry) -> Experiment:
    """Everything that a run needs, freshly initialised."""
    set_arithmetic(config.train)
    torch.manual_seed(config.seed)
    build = _build_teacher_stage if config.stage == "teacher" else _build_rdmd_stage
    layout, dtype = BatchLayout.of(config.train, world), DTYPES[config.train.dtype]
    compiled = config.train.compile is not None
    experiment = build(
        config, world, StageContext(Philox(config.seed), layout, world.device, dtype, telemetry, compiled)
    )
    # Dropout is the one use of torch's own generator; ranks must not drop the same units.
    torch.manual_seed((config.seed + 1 + world.rank) % 2**63)
    telemetry.flops_per_sample = _flops_per_sample(config, experiment)
    streams = _shard_streams(experiment.stage)
    hashes = on_main(world, lambda: {role: stream.shards.shard_hashes() for role, stream in streams.items()})
    experiment.made_of |= {f"data.{role}": of_role for role, of_role in hashes.items()}
    telemetry.at_log += _stream_reports(config, streams, world)
    if experiment.picture is no_picture and len(experiment.export.sample_shape) == 3:
        channels = experiment.export.sample_shape[0]
        telemetry.say(f"no pictures: samples of {channels} channels are drawn where telemetry.decoder names a decoder")
    return experiment


def _shard_streams(stage: TeacherStage | RDMD) -> dict[str, SampleStream]:
    """The stage's streams by role, those of toys aside."""
    streams = {role: getattr(stage, role).stream for role in ("source", "target") if hasattr(stage, role)}
    return {role: stream for role, stream in streams.items() if isinstance(stream, SampleStream)}


def _stream_reports(config: Config, streams: dict[str, SampleStream], world: World) -> list[StreamReport]:
    """What a line of metrics tells of the data; none of toys. Sets that are damaged too much end the run here."""
    if not streams:
        return []
    report = StreamReport(streams, config.data.max_dropped, world)
    report.check()
    return [report]


# -- teacher stage -----------------------------------------------------------------------------------------------------


def _build_teacher_stage(config: Config, world: World, context: StageContext) -> Experiment:
    target = open_domain(config.data, "target", context.philox, world.device)
    network, export, sha256, exported = _teacher_network(config, target.shape, context, world)
    labels = training_labels(export.classes, config.data.target_class, target.own_labels, target.labels, world.device)
    options = config.teacher_stage
    engine = _engine(network, options.optimizer, config, context)
    stage = TeacherStage(options, export.diffusion, engine, target, labels, context)
    ema = ShardedEMA(engine, options.ema, context.layout.global_batch)
    return Experiment(
        stage,
        TrainingState({"teacher": engine}, ema, export.model_dump(mode="json")),
        {"teacher": options.optimizer},
        export,
        teacher_picture(config, world, export, context.philox, target),
        made_of={"teacher": [sha256]} if sha256 else {},
        exported=exported,
    )


def _teacher_network(
    config: Config, shape: tuple[int, ...], context: StageContext, world: World
) -> tuple[torch.nn.Module, ExportConfig, str | None, Exported]:
    """What is trained, how it is exported, and the SHA-256 of what it starts from, None for nothing."""
    dropout, sha256 = config.teacher_stage.dropout, None
    if config.teacher is None:
        options, diffusion = _with_dropout(config.network, dropout), config.diffusion or DiffusionOptions()
        network = build_network(options, shape)
    else:
        start, weights = read_teacher(config.teacher)
        options, diffusion = _with_dropout(start.network, dropout), start.diffusion
        sha256 = network_sha256(start, weights)
        if _is_prompted(config, start):
            pipeline = PromptedPipeline(config, start, weights, sha256, shape, world, context.telemetry.say)
            return *trained_teacher(pipeline), sha256, pipeline.exported
        _check_teacher(config.teacher, start, shape, "data.target")
        check_weights(expected_weights(start, len(weights), config.teacher), weights, config.teacher)
        network = build_network(options, shape)
        load_weights(network, weights, config.teacher)
    if config.data.target_class is not None:
        target_class_row(getattr(options, "label_dim", 0), config.data.target_class, world.device)  # names the key
    export = ExportConfig(
        role="teacher", network=options, sample_shape=list(shape), diffusion=diffusion,
        target_class=config.data.target_class,
    )  # fmt: skip
    return network, export, sha256, as_it_is


def _with_dropout(network_options, dropout: float | None):
    """The options of a network with teacher_stage.dropout in place of its own; None keeps that."""
    if dropout is None:
        return network_options
    if not hasattr(network_options, "dropout"):
        raise InputError(f"teacher_stage.dropout: a network of kind {network_options.kind} has none, remove the key")
    return network_options.model_copy(update={"dropout": dropout})


# -- rdmd stage --------------------------------------------------------------------------------------------------------


def _build_rdmd_stage(config: Config, world: World, context: StageContext) -> Experiment:
    options = config.rdmd
    source = open_domain(config.data, "source", context.philox, world.device)
    feature_cost = FeatureCost.of(options.cost, source.shape, world.device)
    made_of, exported = {}, as_it_is
    if config.teacher == "analytic":
        networks, export = _analytic_networks(config, source, world)
    else:
        networks, export, sha256, exported = _distilled_networks(config, source, context, world)
        made_of["teacher"] = [sha256]
    generator = _engine(networks.generator, options.generator_optimizer, config, context)
    engines, optimizers = {"generator": generator}, {"generator": options.generator_optimizer}
    if options.fake_score == "learned":
        fake_score = _engine(networks.fake_score, options.fake_optimizer, config, context)
        engines["fake_score"], optimizers["fake_score"] = fake_score, options.fake_optimizer
    else:
        fake_score = _closed_form_fake_score(generator.module, config.data.source, export.diffusion)
    teacher = networks.teacher
    if config.teacher != "analytic":  # last: engines take no weights in a layout of their own, which it may share
        teacher = freeze_teacher(teacher, context.layout, config.train, config.deepspeed, world.device)
    class_label = target_class_row(export.classes, config.data.target_class, world.device)
    stage = RDMD(
        options, export.diffusion, Reading.of(export.reading, export.diffusion, export.generator_sigma),
        Networks(generator, fake_score, teacher), source, context,
        class_label=class_label, feature_cost=feature_cost,
    )  # fmt: skip
    ema = ShardedEMA(generator, options.ema, context.layout.global_batch)
    validation = open_validation(config, world, export, source)
    return Experiment(
        stage,
        TrainingState(engines, ema, export.model_dump(mode="json")),
        optimizers,
        export,
        rdmd_picture(config, world, export, context.philox, validation, teacher, fake_score, class_label),
        validation.measure,
        validation.best_by,
        made_of=made_of,
        exported=exported,
    )


def _analytic_networks(config: Config, source, world: World) -> tuple[Networks, ExportConfig]:
    """Exact teacher of a toy target; G and fake score start from their own initialisation (G near the identity)."""
    diffusion = config.diffusion or DiffusionOptions()
    if diffusion.parameterization != "edm":
        raise InputError("diffusion.parameterization: an analytic teacher is read in edm's, remove the key")
    means, covariances, weights = config.data.target.mixture()
    variances = covariances[:, 0, 0]
    if torch.equal(covariances, variances[:, None, None] * torch.eye(means.shape[1], dtype=covariances.dtype)):
        covariances = variances
    teacher = AnalyticScore(GaussianMixtureDenoiser(means, covariances, weights), diffusion).to(world.device)
    conditioned = bounds_of(config.rdmd.transport_weight) is not None
    generator = build_network(config.generator, source.shape, conditioned=conditioned)
    fake = None
    if config.rdmd.fake_score == "learned":
        fake = build_network(config.network, source.shape, conditioned=conditioned)
    export = ExportConfig(
        role="generator", network=config.generator, sample_shape=list(source.shape), diffusion=diffusion,
        reading=config.generator.kind, generator_sigma=config.rdmd.generator_sigma,
        transport_weights=bounds_of(config.rdmd.transport_weight),
    )  # fmt: skip
    return Networks(generator, fake, teacher), export


def _distilled_networks(
    config: Config, source, context: StageContext, world: World
) -> tuple[Networks, ExportConfig, str, Exported]:
    """Teacher from its export, whose SHA-256 comes third; G and fake score start from its weights."""
    start, weights = read_teacher(config.teacher)
    sha256 = network_sha256(start, weights)
    if _is_prompted(config, start):
        pipeline = PromptedPipeline(config, start, weights, sha256, source.shape, world, context.telemetry.say)
        return *distilled_networks(pipeline), sha256, pipeline.exported
    _check_teacher(config.teacher, start, source.shape, "data.source")
    network_options = start.network if config.generator.kind == "teacher" else config.generator
    target_class_row(getattr(network_options, "label_dim", 0), config.data.target_class, world.device)  # names the key
    check_weights(expected_weights(start, len(weights), config.teacher), weights, config.teacher)
    conditioned = bounds_of(config.rdmd.transport_weight) is not None
    teacher = build_network(start.network, source.shape, dropout=False)
    fake = build_network(start.network, source.shape, dropout=False, conditioned=conditioned)
    load_weights(teacher, weights, config.teacher)
    load_teacher_weights(fake, weights, config.teacher)
    generator = build_network(network_options, source.shape, dropout=False, conditioned=conditioned)
    if config.generator.kind == "teacher":
        load_teacher_weights(generator, weights, config.teacher)
    export = ExportConfig(
        role="generator", network=network_options, sample_shape=list(source.shape), diffusion=start.diffusion,
        reading=config.generator.kind, generator_sigma=config.rdmd.generator_sigma,
        target_class=config.data.target_class, transport_weights=bounds_of(config.rdmd.transport_weight),
    )  # fmt: skip
    return Networks(generator, fake, teacher), export, sha256, as_it_is


def _closed_form_fake_score(generator: torch.nn.Module, source: ToyDistribution, diffusion) -> AnalyticScore:
    """Exact score of y = A x + b for a Gaussian x ~ N(m, C): y ~ N(A m + b, A C Aᵀ)."""
    means, covariances, _ = source.mixture()

    def denoiser(state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        matrix, shift = generator.weight.detach().double(), generator.bias.detach().double()
        mean, covariance = means[0].to(matrix.device), covariances[0].to(matrix.device)
        return gaussian_denoiser(state, sigma, matrix @ mean + shift, matrix @ covariance @ matrix.t())

    return AnalyticScore(denoiser, diffusion)


# -- shared ------------------------------------------------------------------------------------------------------------


def _engine(network: torch.nn.Module, optimizer: OptimizerOptions, config: Config, context: StageContext):
    return initialize_engine(network.to(context.device), optimizer, context.layout, config.train, config.deepspeed)


def _is_prompted(config: Config, start: ExportConfig) -> bool:
    """Whether the teacher is a text-to-image pipeline; InputError for keys that belong to one where it is not."""
    if isinstance(start.network, TextOptions):
        return True
    for key in ("teacher_prompt", "lora"):
        if getattr(config, key) is not None:
            raise InputError(f"{key}: teacher {config.teacher} is no text-to-image pipeline, remove the key")
    return False


def _check_teacher(folder: str, export: ExportConfig, shape: tuple[int, ...], key: str) -> None:
    if export.transport_weights:
        raise InputError(
            f"teacher {folder}: is told a λ, a fake score of one generator for a range of them: name a teacher"
        )
    if tuple(export.sample_shape) != tuple(shape):
        raise InputError(
            f"teacher {folder}: is for samples of shape {tuple(export.sample_shape)}, {key} has {tuple(shape)}: "
            "pack the data at the teacher's resolution or train another teacher"
        )


def _flops_per_sample(config: Config, experiment: Experiment) -> float:
    """Matmul and convolution FLOPs of one iteration by sample."""
    shape, conditioned = tuple(experiment.export.sample_shape), experiment.export.transport_weights is not None
    main = forward_flops(experiment.export.network, shape, conditioned)
    if config.stage == "teacher":
        return training_passes(config.lora is not None) * main
    if config.teacher == "analytic":
        score = forward_flops(config.network, shape, conditioned) if config.rdmd.fake_score == "learned" else 0.0
        teacher = 0.0
    else:
        copied = config.generator.kind == "teacher"
        network = experiment.export.network if copied else read_teacher_config(config.teacher).network
        teacher = forward_flops(guided(network, config.guidance_of(network)), shape)
        score = forward_flops(network, shape, conditioned)
    updates = config.rdmd.fake_updates if config.rdmd.fake_score == "learned" else 0
    return distillation_flops(main, teacher, score, updates, config.lora is not None)
