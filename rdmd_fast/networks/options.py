"""Options of the networks."""

from typing import Annotated, Literal

from pydantic import Field

from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions
from rdmd_fast.networks.text_options import TextTransformerOptions, TextUNetOptions
from rdmd_fast.options import Options

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
    MLPOptions
    | AffineOptions
    | SongUNetOptions
    | DhariwalUNetOptions
    | DiffusersUNetOptions
    | TextUNetOptions
    | TextTransformerOptions,
    Field(discriminator="kind"),
]


class TeacherCopyOptions(Options):
    """G is the teacher's network, its weights at first, read at σ̃ = generator_sigma (paper)."""

    kind: Literal["teacher"] = "teacher"


GeneratorOptions = Annotated[TeacherCopyOptions | MLPOptions | AffineOptions, Field(discriminator="kind")]
