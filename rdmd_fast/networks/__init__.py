"""Networks and their options. Every raw network is called ``network(x, c_noise, class_labels=None)``.

One that was built to be told a number of each sample, as λ, takes it as ``condition=``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ..errors import InputError
from ..options import Options
from .diffusers_options import DiffusersUNetOptions

# Beyond what anybody trains, within what can be built on the meta device at once.
MOST_CHANNELS, MOST_LEVELS = 2**14, 10
Multiple = Annotated[int, Field(ge=1, le=64)]


class MLPOptions(Options):
    """Multi-layer perceptron for points. Its last layer starts at zero, so that F = 0 before training."""

    kind: Literal["mlp"]
    hidden: int = Field(256, ge=1, le=MOST_CHANNELS, description="width of the hidden layers (ours)")
    depth: int = Field(3, ge=1, le=256, description="number of hidden layers (ours)")
    embedding: int = Field(64, ge=2, le=MOST_CHANNELS, description="features of the noise level (ours)")


class AffineOptions(Options):
    """G(x) = A x + b with A = scale · rotation(angle) at first: the theory checks' generator."""

    kind: Literal["affine"]
    scale: float = Field(1.0, description="initial scale of A (ours)")
    angle: float = Field(0.0, description="initial rotation of A, degrees, 2-D only (ours)")


class SongUNetOptions(Options):
    """EDM's DDPM++ and NCSN++ networks. Resolution and channels follow from the data."""

    kind: Literal["song_unet"]
    model_channels: int = Field(
        128, ge=8, le=MOST_CHANNELS, description="channels at full resolution (EDM; dhariwal_unet: 192)"
    )
    channel_mult: list[Multiple] = Field(
        [2, 2, 2],
        min_length=1,
        max_length=MOST_LEVELS,
        description="channels by resolution, as multiples (EDM; dhariwal_unet: [1, 2, 3, 4])",
    )
    num_blocks: int = Field(4, ge=1, le=64, description="residual blocks by resolution (EDM; dhariwal_unet: 3)")
    attn_resolutions: list[int] = Field(
        [16], description="resolutions with self-attention, pixels (EDM; dhariwal_unet: [32, 16, 8])"
    )
    dropout: float = Field(0.10, ge=0, lt=1, description="dropout while the teacher trains; 0 in the rdmd stage (EDM)")
    label_dim: int = Field(0, ge=0, le=2**20, description="number of classes, 0 for none (EDM)")
    augment_dim: int = Field(
        0, ge=0, le=4096, description="length of augmentation labels, 0 for none (EDM: 9 for its own)"
    )
    channel_mult_emb: Multiple = Field(4, description="width of the embedding over model_channels (EDM)")
    label_dropout: float = Field(
        0.0, ge=0, le=1, description="probability of dropping a sample's class while the teacher trains (EDM)"
    )
    embedding_type: Literal["positional", "fourier"] = Field(
        "positional", description="features of the noise level: positional for DDPM++, fourier for NCSN++ (EDM)"
    )
    channel_mult_noise: Multiple = Field(
        1, description="width of those features over model_channels: 1 for DDPM++, 2 for NCSN++ (EDM)"
    )
    encoder_type: Literal["standard", "skip", "residual"] = Field(
        "standard", description="standard for DDPM++; residual, with a pyramid of the input, for NCSN++ (EDM)"
    )
    decoder_type: Literal["standard", "skip"] = Field(
        "standard", description="standard for DDPM++ and NCSN++; skip: every level adds to the output (EDM)"
    )
    resample_filter: list[float] = Field(
        [1, 1],
        min_length=2,
        max_length=64,
        description="smoothing when resolution changes: [1, 1] for DDPM++, [1, 3, 3, 1] for NCSN++ (EDM)",
    )


class DhariwalUNetOptions(Options):
    """EDM's form of the ADM network. Resolution and channels follow from the data."""

    kind: Literal["dhariwal_unet"]
    model_channels: int = Field(192, ge=8, le=MOST_CHANNELS, description="channels at full resolution (EDM)")
    channel_mult: list[Multiple] = Field(
        [1, 2, 3, 4],
        min_length=1,
        max_length=MOST_LEVELS,
        description="channels by resolution, as multiples (EDM)",
    )
    channel_mult_emb: Multiple = Field(4, description="width of the embedding over model_channels (EDM)")
    num_blocks: int = Field(3, ge=1, le=64, description="residual blocks by resolution (EDM)")
    attn_resolutions: list[int] = Field([32, 16, 8], description="resolutions with self-attention, pixels (EDM)")
    dropout: float = Field(0.10, ge=0, lt=1, description="dropout while the teacher trains; 0 in the rdmd stage (EDM)")
    label_dropout: float = Field(
        0.0, ge=0, le=1, description="probability of dropping a sample's class while the teacher trains (EDM)"
    )
    label_dim: int = Field(0, ge=0, le=2**20, description="number of classes, 0 for none (EDM)")
    augment_dim: int = Field(
        0, ge=0, le=4096, description="length of augmentation labels, 0 for none (EDM: 9 for its own)"
    )


NetworkOptions = Annotated[MLPOptions | SongUNetOptions | DhariwalUNetOptions, Field(discriminator="kind")]
ExportedNetworkOptions = Annotated[
    MLPOptions | AffineOptions | SongUNetOptions | DhariwalUNetOptions | DiffusersUNetOptions,
    Field(discriminator="kind"),
]


class TeacherCopyOptions(Options):
    """G is the teacher's network, its weights at first, read at σ̃ = generator_sigma (paper)."""

    kind: Literal["teacher"] = "teacher"


GeneratorOptions = Annotated[TeacherCopyOptions | MLPOptions | AffineOptions, Field(discriminator="kind")]


def build_network(
    options: Options, sample_shape: tuple[int, ...], dropout: bool = True, condition: bool = False
) -> torch.nn.Module:
    """A raw network for samples of ``sample_shape``, (D,) or (C, H, W), freshly initialised.

    ``dropout=False`` leaves it out whatever the options say: distillation wants scores without noise of their own.
    With ``condition`` the network takes a further number by sample, ``network(..., condition=values)``, of which it
    makes nothing before training.

    Raises:
        InputError: the network does not fit the samples, or takes no condition.
    """
    points = len(sample_shape) == 1
    if options.kind in ("mlp", "affine") and not points:
        raise InputError(
            f"network kind {options.kind!r} is for points, the data has shape {sample_shape}: use song_unet"
        )
    if options.kind == "mlp":
        from .mlp import MLP

        return MLP(
            sample_shape[0],
            hidden=options.hidden,
            depth=options.depth,
            embedding=options.embedding,
            condition=condition,
        )
    if options.kind == "affine":
        if condition:
            raise InputError("network kind 'affine' takes no condition: use mlp")
        from .mlp import AffineMap

        return AffineMap(sample_shape[0], scale=options.scale, angle=options.angle)
    if options.kind == "diffusers_unet":
        return _build_unet2d(options, sample_shape, dropout, condition)
    if points:
        raise InputError(f"network kind {options.kind!r} is for images, the data has shape {sample_shape}: use mlp")
    return _build_unet(options, sample_shape, dropout, condition)


def _build_unet(
    options: SongUNetOptions | DhariwalUNetOptions, sample_shape: tuple[int, ...], dropout: bool, condition: bool
) -> torch.nn.Module:
    from .dhariwal_unet import DhariwalUNet
    from .song_unet import SongUNet

    channels, height, width = sample_shape
    halvings = 2 ** (len(options.channel_mult) - 1)
    if height != width or height % halvings:
        raise InputError(
            f"{options.kind} needs square images whose side divides by {halvings} (network.channel_mult has "
            f"{len(options.channel_mult)} levels), the data is {height}×{width}: pack it at another --resolution"
        )
    arguments = options.model_dump(exclude={"kind"})
    if not dropout:
        arguments |= {"dropout": 0.0, "label_dropout": 0.0}
    build = {"song_unet": SongUNet, "dhariwal_unet": DhariwalUNet}[options.kind]
    return build(img_resolution=height, in_channels=channels, out_channels=channels, condition=condition, **arguments)


def _build_unet2d(
    options: DiffusersUNetOptions, sample_shape: tuple[int, ...], dropout: bool, condition: bool
) -> torch.nn.Module:
    from .unet2d import UNet2D

    halvings = 2 ** (len(options.unet.block_out_channels) - 1)
    channels, *sides = sample_shape
    if len(sides) != 2 or channels != options.unet.in_channels or any(side % halvings for side in sides):
        raise InputError(
            f"the diffusers network takes {options.unet.in_channels} channels and sides that divide by {halvings}, the "
            f"data has shape {tuple(sample_shape)}: pack it at another --resolution"
        )
    return UNet2D(options, dropout, condition)
