"""The networks that a configuration holds, built on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rdmd_fast.config import Config
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.data.stream import channels_first
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.model_files.teachers import read_teacher_config
from rdmd_fast.model_files.text_pipeline import guided
from rdmd_fast.networks import build_network
from rdmd_fast.options import Options
from rdmd_fast.transport_weight import WeightRange


@dataclass(frozen=True)
class PlannedNetwork:
    """One network of a run.

    Attributes:
        options: what it is built from.
        shape: of a sample, (D,) or (C, H, W).
        dropout: whether the options' dropout is in it.
        conditioned: whether it is told each sample's λ.
        sizes: elements of each trained parameter, or of a frozen network's own, in order.
        base: elements of each parameter that it shares with the teacher, frozen.
        buffers: bytes of the buffers that exports and checkpoints hold, fp32.
        gathered_again: elements of parameters that activation checkpointing makes ZeRO-3 gather once more: those of
            the blocks, without the last layer of each, where the second computation stops and the backward pass begins,
            and without its modulation, which is computed outside of it.
    """

    options: Options
    shape: tuple[int, ...]
    dropout: bool
    sizes: tuple[int, ...]
    buffers: int
    gathered_again: int
    conditioned: bool = False
    base: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: Options, shape: tuple[int, ...], dropout: bool, conditioned: bool = False) -> PlannedNetwork:
        with torch.device("meta"):
            network = build_network(options, shape, dropout=dropout, conditioned=conditioned)
        persistent = {name for name in network.state_dict() if name not in dict(network.named_parameters())}
        buffers = sum(4 * buffer.numel() for name, buffer in network.named_buffers() if name in persistent)
        trained, base = (
            tuple(parameter.numel() for parameter in network.parameters() if parameter.requires_grad is wanted)
            for wanted in (True, False)
        )
        return cls(options, shape, dropout, trained, buffers, _gathered_again(network), conditioned, base)

    @property
    def parameters(self) -> int:
        """Elements of its own."""
        return sum(self.sizes)

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """``sizes`` and ``base``: what a pass needs."""
        return self.sizes + self.base

    def build(self, device: str = "meta") -> nn.Module:
        """The network as initialised, fp32; on the meta device shapes alone."""
        with torch.device(device):
            return build_network(self.options, self.shape, dropout=self.dropout, conditioned=self.conditioned)


@dataclass(frozen=True)
class PlannedNetworks:
    """All networks of a stage by role.

    ``frozen`` is the teacher of the rdmd stage, None where it is analytic, or the base that others have adapters over.
    """

    trained: dict[str, PlannedNetwork]
    frozen: PlannedNetwork | None
    averaged: str

    def named(self) -> dict[str, PlannedNetwork]:
        return self.trained | ({"base" if "teacher" in self.trained else "teacher": self.frozen} if self.frozen else {})


def planned_networks(config: Config) -> PlannedNetworks:
    """What ``experiment.build_experiment`` would build; reads headers of data and teacher, no weights of an export.

    Raises:
        InputError: data or teacher are not there, or do not fit.
    """
    shape = sample_shape(config)
    options = config.network
    if config.teacher not in (None, "analytic"):
        options = read_teacher_config(config.teacher).network
    if config.stage == "teacher":
        if config.teacher_stage.dropout is not None and hasattr(options, "dropout"):
            options = options.model_copy(update={"dropout": config.teacher_stage.dropout})
        trained = {"teacher": PlannedNetwork.of(_adapted(options, config), shape, True)}
        # Nothing but adapters is trained there: the base is counted as a teacher that makes no pass of its own.
        return PlannedNetworks(trained, PlannedNetwork.of(options, shape, True) if config.lora else None, "teacher")
    conditioned = WeightRange.of(config.rdmd.transport_weight) is not None
    score = PlannedNetwork.of(_adapted(options, config), shape, False, conditioned) if options else None
    copied = config.generator.kind == "teacher"
    trained = {"generator": score if copied else PlannedNetwork.of(config.generator, shape, False, conditioned)}
    if config.rdmd.fake_score == "learned":
        trained["fake_score"] = score
    teacher = None
    if config.teacher != "analytic":
        teacher = PlannedNetwork.of(guided(options, config.guidance_of(options)), shape, False)
    return PlannedNetworks(trained, teacher, "generator")


def _adapted(options: Options, config: Config) -> Options:
    return options.model_copy(update={"lora": config.lora}) if config.lora else options


def sample_shape(config: Config) -> tuple[int, ...]:
    domain = config.data.target if config.stage == "teacher" else config.data.source
    if isinstance(domain, ToyDistribution):
        return (2,)
    return tuple(channels_first(ShardSet(domain, tolerant=True, cache_dir=config.data.cache_dir)))


def _gathered_again(network: nn.Module) -> int:
    from rdmd_fast.networks.diffusers_unet import Level, MidBlock
    from rdmd_fast.networks.unet_layers import UNetBlock

    def elements(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    def spared(block: UNetBlock | Level | MidBlock) -> int:
        if not isinstance(block, UNetBlock):
            return 0
        projects = block.skip is not None and block.skip.weight is not None
        last = block.proj if block.heads else block.skip if projects else block.conv1
        return elements(last) + elements(block.affine)

    blocks = [module for module in network.modules() if isinstance(module, UNetBlock | Level | MidBlock)]
    return sum(elements(block) - spared(block) for block in blocks)
