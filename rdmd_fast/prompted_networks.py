"""The networks of a run whose teacher is a text-to-image pipeline, told its prompts.

With ``lora`` all are over the very parameters of one base: the teacher is the base, generator and fake score have an
adapter each. Without, each is a whole copy.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from rdmd_fast.config import Config
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.adapted import exported, whole
from rdmd_fast.model_files.export_format import ExportConfig
from rdmd_fast.model_files.prompts import FILE as PROMPTS
from rdmd_fast.model_files.prompts import store_prompts, stored_prompts
from rdmd_fast.model_files.text_pipeline import FAKE, GUIDANCE_EMBEDDING, PROMPT, with_prompts
from rdmd_fast.model_files.weights import check_weights, expected_weights, load_weights
from rdmd_fast.networks import build_network
from rdmd_fast.networks.adapters import adapter_of
from rdmd_fast.networks.diffusers_unet import nearest_level
from rdmd_fast.networks.text_network import TextNetwork
from rdmd_fast.processes.world import World, on_main
from rdmd_fast.rdmd import Networks
from rdmd_fast.transport_weight import bounds_of


class PromptedPipeline:
    """A pipeline, or an export that comes from one, and what a run tells its networks.

    The main rank embeds the prompts into RUN/prompts.safetensors, where all ranks read them.

    Attributes:
        exported: weights of an export from the state dict of a network in training.

    Args:
        start, weights, sha256: of ``read_teacher``, and their ``network_sha256``.
        shape: (C, h, w) of the data.
        say: is told of a prompt that is cut.

    Raises:
        InputError: a key that is missing or makes no sense here, or a pipeline that cannot be read.
    """

    def __init__(
        self,
        config: Config,
        start: ExportConfig,
        weights: dict[str, Tensor],
        sha256: str,
        shape: tuple[int, ...],
        world: World,
        say: Callable[[str], object],
    ):
        if config.teacher_prompt is None:
            raise InputError(f"teacher_prompt: missing, teacher {config.teacher} is a text-to-image pipeline")
        if config.data.target_class is not None:
            raise InputError("data.target_class: the network has no classes, remove the key")
        if start.pipeline is None:
            raise InputError(
                f"teacher {config.teacher}: write the folder of its pipeline into `pipeline` of config.json"
            )
        for key in ("guidance_embedding", "student_guidance_embedding"):
            if getattr(config, key) is not None and not start.network.embeds_guidance:
                raise InputError(f"{key}: the network of {config.teacher} is not told its guidance, remove the key")
        self.config, self.shape = config, shape
        self.exported = partial(exported, lora=config.lora, beneath=adapter_of(weights))
        self.folder = Path(start.pipeline)
        self.base_sha256 = None
        if config.lora:
            self.base_sha256 = start.base_sha256 or sha256
            if start.base_sha256 is None and f"{PROMPT}embeds" in weights:
                raise InputError(f"lora: teacher {config.teacher} is an export of whole weights, name a pipeline")
        self.start, self.weights = whole(start, weights, config.teacher)
        texts = {PROMPT: config.teacher_prompt, **({FAKE: config.fake_prompt} if config.fake_prompt else {})}
        path, tokens = Path(config.run_dir) / PROMPTS, start.network.tokens
        on_main(world, lambda: store_prompts(path, self.folder, texts, config.teacher_negative_prompt, tokens, say))
        self.prompts = stored_prompts(path)

    def network(self, guidance: float = 1.0, role: str = PROMPT, student: bool = False) -> TextNetwork:
        """A whole copy, told the prompt of ``role``; that of a ``student`` is told its own guidance embedding."""
        conditioned = bounds_of(self.config.rdmd.transport_weight) is not None and self.config.stage == "rdmd"
        told, weights = self._told(guidance, role, student)
        check_weights(expected_weights(told, len(weights), self.config.teacher), weights, self.config.teacher)
        network = build_network(told.network, self.shape, dropout=False, conditioned=conditioned)
        load_weights(network, weights, self.config.teacher)
        return network

    def adapted(self, base: TextNetwork, role: str = PROMPT) -> TextNetwork:
        """An adapter over the parameters of ``base``, or without lora a whole copy; told the prompt of ``role``."""
        if self.config.lora is None:
            return self.network(role=role, student=True)
        told, weights = self._told(1.0, role, True)
        network = TextNetwork(told.network.model_copy(update={"lora": self.config.lora}), base)
        network.load_state_dict({name: weights[name] for name in network.prompt_names()}, strict=False)
        return network

    def export(self, role: str, **options) -> ExportConfig:
        """config.json of what a run exports."""
        return ExportConfig(
            role=role, network=self.start.network, sample_shape=list(self.shape), diffusion=self.start.diffusion,
            pipeline=str(self.folder.absolute()), base_sha256=self.base_sha256, **options,
        )  # fmt: skip

    def _told(self, guidance: float, role: str, student: bool) -> tuple[ExportConfig, dict[str, Tensor]]:
        embeddings = (self.config.student_guidance_embedding if student else None, self.config.guidance_embedding)
        embedding = next((each for each in embeddings if each is not None), GUIDANCE_EMBEDDING)
        return with_prompts(self.start, self.weights, self.prompts, self.shape, self.folder, guidance, role, embedding)


def distilled_networks(pipeline: PromptedPipeline) -> tuple[Networks, ExportConfig]:
    """The three of the rdmd stage: the teacher guided, generator and fake score as the unguided one at first."""
    config = pipeline.config
    if config.generator.kind != "teacher":
        raise InputError("generator.kind: a text-to-image pipeline's generator is its copy, use teacher")
    teacher = pipeline.network(config.guidance_of(pipeline.start.network))
    generator = pipeline.adapted(teacher)
    fake = pipeline.adapted(teacher, FAKE if config.fake_prompt else PROMPT)
    sigma = nearest_level(pipeline.start.network.schedule, config.rdmd.generator_sigma)
    return Networks(generator, fake, teacher), pipeline.export("generator", reading="teacher", generator_sigma=sigma)


def trained_teacher(pipeline: PromptedPipeline) -> tuple[nn.Module, ExportConfig]:
    """The network of the teacher stage, an adapter over the pipeline."""
    if pipeline.config.lora is None:
        raise InputError(
            f"lora: missing, the teacher stage trains an adapter of text-to-image pipeline {pipeline.config.teacher}"
        )
    return pipeline.adapted(pipeline.network()), pipeline.export("teacher")
