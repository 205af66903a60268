"""Networks and their options. Every raw network is called ``network(x, c_noise, class_labels=None)``."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ..errors import InputError
from ..options import Options
from .diffusers_options import DiffusersUNetOptions


class MLPOptions(Options):
    """Multi-layer perceptron for points. Its last layer starts at zero, so that F = 0 before training."""

    kind: Literal["mlp"]
    hidden: int = Field(256, ge=1, description="width of the hidden layers (ours)")
    depth: int = Field(3, ge=1, description="number of hidden layers (ours)")
    embedding: int = Field(64, ge=2, description="features of the noise level (ours)")


class AffineOptions(Options):
    """G(x) = A x + b with A = scale · rotation(angle) at first: the theory checks' generator."""

    kind: Literal["affine"]
    scale: float = Field(1.0, description="initial scale of A (ours)")
    angle: float = Field(0.0, description="initial rotation of A, degrees, 2-D only (ours)")


class SongUNetOptions(Options):
    """EDM's DDPM++ network. Resolution and channels follow from the data."""

    kind: Literal["song_unet"]
    model_channels: int = Field(128, ge=8, description="channels at full resolution (EDM)")
    channel_mult: list[int] = Field([2, 2, 2], min_length=1, description="channels by resolution, as multiples (EDM)")
    num_blocks: int = Field(4, ge=1, description="residual blocks by resolution (EDM)")
    attn_resolutions: list[int] = Field([16], description="resolutions with self-attention, pixels (EDM)")
    dropout: float = Field(0.10, ge=0, lt=1, description="dropout while the teacher trains; 0 in the rdmd stage (EDM)")
    label_dim: int = Field(0, ge=0, description="number of classes, 0 for none (EDM)")


NetworkOptions = Annotated[MLPOptions | SongUNetOptions, Field(discriminator="kind")]


class TeacherCopyOptions(Options):
    """G is the teacher's network, its weights at first, read at σ̃ = generator_sigma (paper)."""

    kind: Literal["teacher"] = "teacher"


GeneratorOptions = Annotated[TeacherCopyOptions | MLPOptions | AffineOptions, Field(discriminator="kind")]


def build_network(options: Options, sample_shape: tuple[int, ...], dropout: bool = True) -> torch.nn.Module:
    """A raw network for samples of ``sample_shape``, (D,) or (C, H, W), freshly initialised.

    ``dropout=False`` leaves it out whatever the options say: distillation wants scores without noise of their own.

    Raises:
        InputError: the network does not fit the samples.
    """
    points = len(sample_shape) == 1
    if options.kind in ("mlp", "affine") and not points:
        raise InputError(
            f"network kind {options.kind!r} is for points, the data has shape {sample_shape}: use song_unet"
        )
    if options.kind == "mlp":
        from .mlp import MLP

        return MLP(sample_shape[0], hidden=options.hidden, depth=options.depth, embedding=options.embedding)
    if options.kind == "affine":
        from .mlp import AffineMap

        return AffineMap(sample_shape[0], scale=options.scale, angle=options.angle)
    if options.kind == "diffusers_unet":
        return _build_unet2d(options, sample_shape, dropout)
    if points:
        raise InputError(f"network kind 'song_unet' is for images, the data has shape {sample_shape}: use mlp")
    return _build_song_unet(options, sample_shape, dropout)


def _build_song_unet(options: SongUNetOptions, sample_shape: tuple[int, ...], dropout: bool) -> torch.nn.Module:
    from .song_unet import SongUNet

    channels, height, width = sample_shape
    halvings = 2 ** (len(options.channel_mult) - 1)
    if height != width or height % halvings:
        raise InputError(
            f"song_unet needs square images whose side divides by {halvings} (network.channel_mult has "
            f"{len(options.channel_mult)} levels), the data is {height}×{width}: pack it at another --resolution"
        )
    return SongUNet(
        img_resolution=height,
        in_channels=channels,
        out_channels=channels,
        label_dim=options.label_dim,
        model_channels=options.model_channels,
        channel_mult=options.channel_mult,
        num_blocks=options.num_blocks,
        attn_resolutions=options.attn_resolutions,
        dropout=options.dropout if dropout else 0.0,
    )


def _build_unet2d(options: DiffusersUNetOptions, sample_shape: tuple[int, ...], dropout: bool) -> torch.nn.Module:
    from .unet2d import UNet2D

    halvings = 2 ** (len(options.unet.block_out_channels) - 1)
    channels, *sides = sample_shape
    if len(sides) != 2 or channels != options.unet.in_channels or any(side % halvings for side in sides):
        raise InputError(
            f"the diffusers network takes {options.unet.in_channels} channels and sides that divide by {halvings}, the "
            f"data has shape {tuple(sample_shape)}: pack it at another --resolution"
        )
    return UNet2D(options, dropout)
