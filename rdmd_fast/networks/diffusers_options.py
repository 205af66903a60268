"""A diffusers UNet2DModel and the schedule that it was trained on, with the names of its folder's config files."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rdmd_fast.options import Options

Size = Annotated[int, Field(ge=1, le=2**14)]
DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
Resampling = Literal["conv", "resnet"]


class UNet2DOptions(Options):
    """config.json of a UNet2DModel; absent keys have diffusers' defaults. Values that are not named are refused."""

    sample_size: Size | list[Size] = Field(description="height and width, pixels")
    in_channels: Size = 3
    out_channels: Size = 3
    center_input_sample: bool = Field(False, description="the network sees 2 x - 1")
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Size | None = Field(None, description="embedding's width, unset: 4 block_out_channels[0]")
    freq_shift: int = Field(
        0, ge=-(2**14), description="frequencies fall from 1 to 1e-4 over channels / 2 - freq_shift steps"
    )
    flip_sin_to_cos: bool = Field(True, description="cosines before sines")
    down_block_types: list[DownBlock] = Field(["DownBlock2D", *["AttnDownBlock2D"] * 3])
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: list[UpBlock] = Field([*["AttnUpBlock2D"] * 3, "UpBlock2D"])
    block_out_channels: list[Size] = Field([224, 448, 672, 896], min_length=1, max_length=10)
    layers_per_block: int = Field(2, ge=1, le=64)
    mid_block_scale_factor: float = Field(1.0, gt=0, description="divisor of the middle block's residual sums")
    downsample_padding: Literal[0, 1] = Field(1, description="0 pads on the right and below alone")
    downsample_type: Resampling = "conv"
    upsample_type: Resampling = "conv"
    dropout: float = Field(0.0, ge=0, lt=1)
    act_fn: Literal["silu", "swish"] = "silu"
    attention_head_dim: Size | None = Field(8, description="channels of an attention head, all of them if null")
    norm_num_groups: Size = 32
    attn_norm_num_groups: Size | None = None
    norm_eps: float = Field(1e-5, gt=0)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = Field(True, description="attention in the middle block")
    class_embed_type: None = None
    num_class_embeds: Size | None = None
    num_train_timesteps: int | None = Field(None, description="without effect on a positional embedding")

    @model_validator(mode="after")
    def _consistent(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, block_out_channels {levels}")
        if self.out_channels != self.in_channels:
            raise ValueError(
                f"out_channels is {self.out_channels}, in_channels {self.in_channels}: "
                "a learned variance or a conditioning image is not supported"
            )
        groups, head = self.norm_num_groups, self.attention_head_dim or 1
        for channels in self.block_out_channels:
            if channels % groups:
                raise ValueError(f"block_out_channels: {channels} does not divide by norm_num_groups = {groups}")
        if min(self._attending_widths, default=head) < head:
            raise ValueError(f"attention_head_dim: {head} is wider than a block that attends")
        if self._attends_in_the_middle and self.block_out_channels[-1] % (self.attn_norm_num_groups or 1):
            raise ValueError(f"attn_norm_num_groups: {self.attn_norm_num_groups} does not divide the last width")
        if self.block_out_channels[0] % 2 or self.block_out_channels[0] // 2 <= self.freq_shift:
            raise ValueError(f"block_out_channels: {self.block_out_channels[0]} is too odd or small for the embedding")
        if isinstance(self.sample_size, list) and len(self.sample_size) != 2:
            raise ValueError("sample_size: give one side or [height, width]")
        return self

    @property
    def _attends_in_the_middle(self) -> bool:
        return self.add_attention and self.mid_block_type is not None

    @property
    def _attending_widths(self) -> list[int]:
        """Channels of the blocks in which there is attention."""
        widths = self.block_out_channels
        kinds = (*self.down_block_types, *self.up_block_types)
        attending = [width for kind, width in zip(kinds, widths + widths[::-1], strict=True) if kind.startswith("Attn")]
        return attending + (widths[-1:] if self._attends_in_the_middle else [])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.sample_size
        height, width = size if isinstance(size, list) else (size, size)
        return self.in_channels, height, width


class VPSchedule(Options):
    """Discrete variance-preserving process, ᾱ_t = Π_{s <= t} (1 - β_s) (DDPM, arXiv 2006.11239, Equation 4)."""

    kind: Literal["vp"] = "vp"
    num_train_timesteps: int = Field(1000, ge=2, le=100_000, description="levels t = 0, 1, … of the table")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    trained_betas: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None, min_length=2, description="β of every level, in place of the formula"
    )
    rescale_betas_zero_snr: bool = Field(False, description="ᾱ is 0 at the last level (arXiv 2305.08891, Algorithm 1)")


class FlowSchedule(Options):
    """Straight path x_t = (1 - t) x + t ε; the network is told num_train_timesteps · t (arXiv 2403.03206)."""

    kind: Literal["flow"] = "flow"
    num_train_timesteps: int = Field(1000, ge=1, le=100_000, description="timestep at t = 1")


class DiffusersUNetOptions(Options):
    """A diffusers UNet2DModel read as one of our networks."""

    kind: Literal["diffusers_unet"] = "diffusers_unet"
    unet: UNet2DOptions
    schedule: Annotated[VPSchedule | FlowSchedule, Field(discriminator="kind")]

    @property
    def label_dim(self) -> int:
        """Number of classes, 0 for none."""
        return self.unet.num_class_embeds or 0
