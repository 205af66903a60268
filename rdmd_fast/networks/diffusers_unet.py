"""diffusers' UNet2DModel (the U-Net of DDPM, arXiv 2006.11239) for our kernels and memory format.

State-dict keys are diffusers', so that its safetensors load one to one; the library itself is not needed.
Parameters are read only inside the forward of their own module, since ZeRO-3 gathers them module by module.
"""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdmd_fast.kernels.group_norm_silu import group_norm_silu
from rdmd_fast.networks.condition_embedding import ConditionEmbedding
from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions, FlowSchedule, UNet2DOptions, VPSchedule
from rdmd_fast.networks.unet_layers import ExactTables, Linear, attention, repeat_pixels


def log_sigma_table(schedule: VPSchedule) -> np.ndarray:
    """ln σ̃_t = ln((1 - ᾱ_t) / ᾱ_t) / 2 of the levels t = 0, 1, …, float64; levels with ᾱ = 0 are left out."""
    steps = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        betas = np.asarray(schedule.trained_betas)
    elif schedule.beta_schedule == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, steps)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, steps) ** 2
    else:  # the cosine schedule of arXiv 2102.09672, Equation 17
        squared = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - squared[1:] / squared[:-1], 0.999)
    alpha = np.cumprod(1 - betas) ** 0.5
    if schedule.rescale_betas_zero_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha = alpha[alpha > 0]
    return np.log((1 - alpha**2) / alpha**2) / 2


def nearest_level(schedule: VPSchedule | FlowSchedule, sigma: float) -> float:
    """σ̃ of the schedule's level that is nearest to ``sigma``; on the straight path every level is one."""
    if isinstance(schedule, FlowSchedule):
        return sigma
    levels = np.exp(log_sigma_table(schedule))
    return float(levels[np.abs(levels - sigma).argmin()])


class Timestep(ExactTables):
    """c_noise [N] -> the timestep that the network was trained with, float64 [N].

    On a VP process it is interpolated in ln σ̃ between the schedule's levels, exact at each of them, and clamped to
    their range.
    """

    # A float32 c_noise tells timesteps apart to some 1e-4; what lies nearer to a level is that level.
    SNAP = 1e-3
    tables = ("log_sigma",)

    def __init__(self, schedule: VPSchedule | FlowSchedule):
        super().__init__()
        self.flow_scale = schedule.num_train_timesteps if isinstance(schedule, FlowSchedule) else None
        table = [] if self.flow_scale else log_sigma_table(schedule).tolist()
        self.register_buffer("log_sigma", torch.tensor(table, dtype=torch.float64), persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        return self.timestep(c_noise)

    def timestep(self, c_noise: Tensor) -> Tensor:
        """c_noise = ln(σ̃)/4, [N] -> fractional timestep, float64 [N]."""
        level = 4 * c_noise.double()
        if self.flow_scale:
            return self.flow_scale * level.sigmoid()
        upper = torch.searchsorted(self.log_sigma, level).clamp(1, len(self.log_sigma) - 1)
        below, above = self.log_sigma[upper - 1], self.log_sigma[upper]
        timestep = upper - 1 + ((level - below) / (above - below)).clamp(0, 1)
        nearest = timestep.round()
        return torch.where((timestep - nearest).abs() < self.SNAP, nearest, timestep)


class TimestepFeatures(Timestep):
    """c_noise [N] -> cosines and sines [N, channels], float32, of the timestep."""

    tables = ("frequencies", "log_sigma")

    def __init__(self, schedule: VPSchedule | FlowSchedule, channels: int, freq_shift: int, cosine_first: bool):
        super().__init__(schedule)
        half = channels // 2
        # In float32, as the network was trained: at t = 1000 one rounding of a frequency turns its phase by 6e-5.
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - freq_shift))
        self.cosine_first = cosine_first
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        phase = self.timestep(c_noise).float().outer(self.frequencies)
        waves = (phase.cos(), phase.sin()) if self.cosine_first else (phase.sin(), phase.cos())
        return torch.cat(waves, dim=1)


class ClassEmbedding(nn.Embedding):
    def forward(self, class_labels: Tensor) -> Tensor:
        """One-hot rows [N, classes] -> [N, E]; a row of zeros is no class."""
        return class_labels.to(self.weight.dtype) @ self.weight


class TimestepMLP(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(channels, width), Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor, silu: bool = True, **modulation) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=silu, **modulation)


class ResnetBlock(nn.Module):
    """x [N, in, H, W], embedding [N, E] -> [N, out, H', W'] with H' = H, 2 H (``up``) or H / 2 (``down``)."""

    def __init__(
        self, in_channels: int, out_channels: int, options: UNet2DOptions, embedding: int,
        up: bool = False, down: bool = False, divisor: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        norm = dict(num_groups=options.norm_num_groups, eps=options.norm_eps)
        self.modulates = options.resnet_time_scale_shift == "scale_shift"
        self.up, self.down, self.dropout, self.divisor = up, down, options.dropout, divisor
        self.norm1 = GroupNorm(num_channels=in_channels, **norm)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, 2 * out_channels if self.modulates else out_channels)
        self.norm2 = GroupNorm(num_channels=out_channels, **norm)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x)))
        time = self.time_emb_proj(F.silu(embedding))
        if self.modulates:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, addend=time)
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        x = self.resample(x)
        # In place on the convolution's fresh output, whose backward does not read it.
        h = self.conv2(h).add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.divisor == 1 else h.div_(self.divisor)

    def resample(self, x: Tensor) -> Tensor:
        if self.up:
            return repeat_pixels(x)
        return F.avg_pool2d(x, 2) if self.down else x


class Attention(nn.Module):
    """Self-attention over the pixels of x [N, C, H, W], added to x."""

    def __init__(self, channels: int, options: UNet2DOptions, groups: int | None, divisor: float = 1.0):
        super().__init__()
        self.head_dim, self.divisor = options.attention_head_dim or channels, divisor
        self.group_norm = GroupNorm(groups, channels, eps=options.norm_eps) if groups else None
        width = channels // self.head_dim * self.head_dim  # whole heads alone
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, channels)])

    def forward(self, x: Tensor) -> Tensor:
        height_width = x.shape[2:]
        normed = x if self.group_norm is None else self.group_norm(x, silu=False)
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (
            layer(tokens).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.to_out[0](attended).unflatten(1, height_width).permute(0, 3, 1, 2).add_(x)
        return y if self.divisor == 1 else y.div_(self.divisor)


class Resample(nn.Module):
    """Convolution that halves the resolution, or doubles it after repeating pixels."""

    def __init__(self, channels: int, down: bool, padding: int = 1):
        super().__init__()
        self.down, self.pads = down, down and padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if not self.down:
            x = repeat_pixels(x)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pads else x)


class Level(nn.Module):
    """The layers of one resolution on the way down or up; diffusers' names for them."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], resampler: nn.Module | None, down: bool):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        samplers = nn.ModuleList([resampler]) if resampler is not None else None
        self.downsamplers, self.upsamplers = (samplers, None) if down else (None, samplers)

    def layer(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[index](x, embedding)
        return x if self.attentions is None else self.attentions[index](x)

    def resample(self, x: Tensor, embedding: Tensor) -> Tensor:
        (sampler,) = self.downsamplers or self.upsamplers
        return sampler(x, embedding) if isinstance(sampler, ResnetBlock) else sampler(x)


class MidBlock(nn.Module):
    def __init__(self, channels: int, options: UNet2DOptions, embedding: int):
        super().__init__()
        divisor = options.mid_block_scale_factor
        groups = options.attn_norm_num_groups
        if groups is None and options.resnet_time_scale_shift == "default":
            groups = options.norm_num_groups
        attends = options.add_attention
        self.attentions = nn.ModuleList([Attention(channels, options, groups, divisor)] if attends else [])
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, options, embedding, divisor=divisor) for _ in range(2)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[0](x, embedding)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x, embedding)


class UNet2D(nn.Module):
    """The network of ``DiffusersUNetOptions``; activations are channels_last.

    With ``checkpointing`` the activations of a residual block are computed again in the backward pass.
    """

    checkpointing = False

    def __init__(self, options: DiffusersUNetOptions, dropout: bool = True, conditioned: bool = False):
        super().__init__()
        unet = options.unet if dropout else options.unet.model_copy(update={"dropout": 0.0})
        widths = unet.block_out_channels
        embedding = unet.time_embedding_dim or 4 * widths[0]
        self.centre, self.classes = unet.center_input_sample, options.label_dim
        self.time_features = TimestepFeatures(options.schedule, widths[0], unet.freq_shift, unet.flip_sin_to_cos)
        self.time_embedding = TimestepMLP(widths[0], embedding)
        self.class_embedding = ClassEmbedding(self.classes, embedding) if self.classes else None
        self.conv_in = nn.Conv2d(unet.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _down_level(unet, embedding, level, channels)
            for level, channels in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid_block = MidBlock(widths[-1], unet, embedding) if unet.mid_block_type else None
        self.up_blocks = nn.ModuleList(_up_level(unet, embedding, position) for position in range(len(widths)))
        self.conv_norm_out = GroupNorm(unet.norm_num_groups, widths[0], eps=unet.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], unet.out_channels, 3, padding=1)
        self.map_condition = ConditionEmbedding(embedding) if conditioned else None

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The raw prediction F.

        Args:
            x: [N, C, H, W]; H and W divide by 2^(levels - 1).
            c_noise: ln(σ̃)/4, [N].
            class_labels: one-hot [N, classes]; None or a row of zeros means no class.
            condition: [N] in [-1, 1], None for 0; ignored by a network built without.

        Returns:
            [N, C, H, W] in x's dtype, channels_last; computed in the weights' dtype.
        """
        embedding = self.time_embedding(self.time_features(c_noise))
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = embedding.new_zeros(len(embedding), self.classes)
            embedding = embedding + self.class_embedding(class_labels)
        if self.map_condition is not None:
            embedding = embedding + self.map_condition(condition, c_noise)
        h = x.to(embedding.dtype, memory_format=torch.channels_last)
        h = self.conv_in(2 * h - 1 if self.centre else h)
        skips = [h]
        for level in self.down_blocks:
            for index in range(len(level.resnets)):
                h = self.run(level.layer, index, h, embedding)
                skips.append(h)
            if level.downsamplers is not None:
                h = self.run(level.resample, h, embedding)
                skips.append(h)
        if self.mid_block is not None:
            h = self.run(self.mid_block, h, embedding)
        for level in self.up_blocks:
            for index in range(len(level.resnets)):
                h = self.run(level.layer, index, torch.cat([h, skips.pop()], dim=1), embedding)
            if level.upsamplers is not None:
                h = self.run(level.resample, h, embedding)
        return self.conv_out(self.conv_norm_out(h)).to(x.dtype)

    def run(self, part, *arguments) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *arguments, use_reentrant=False)
        return part(*arguments)


def _down_level(unet: UNet2DOptions, embedding: int, level: int, channels: tuple[int, int]) -> Level:
    before, width = channels
    kind, count = unet.down_block_types[level], unet.layers_per_block
    attends = kind == "AttnDownBlock2D"
    resnets = [ResnetBlock(before if i == 0 else width, width, unet, embedding) for i in range(count)]
    attentions = [Attention(width, unet, unet.norm_num_groups) for _ in range(count)] if attends else []
    if level == len(unet.block_out_channels) - 1:
        resampler = None
    elif kind == "ResnetDownsampleBlock2D" or (attends and unet.downsample_type == "resnet"):
        resampler = ResnetBlock(width, width, unet, embedding, down=True)
    else:
        resampler = Resample(width, down=True, padding=unet.downsample_padding)
    return Level(resnets, attentions, resampler, down=True)


def _up_level(unet: UNet2DOptions, embedding: int, position: int) -> Level:
    """The level at ``position`` on the way up, which begins at the lowest resolution."""
    widths = unet.block_out_channels[::-1]
    width, before = widths[position], widths[max(position - 1, 0)]
    kind, count = unet.up_block_types[position], unet.layers_per_block + 1
    attends = kind == "AttnUpBlock2D"
    # The last skip connection of a level was made at the entry to it, with the channels of the level above.
    skips = [width] * (count - 1) + [widths[min(position + 1, len(widths) - 1)]]
    resnets = [
        ResnetBlock((before if i == 0 else width) + skip, width, unet, embedding) for i, skip in enumerate(skips)
    ]
    attentions = [Attention(width, unet, unet.norm_num_groups) for _ in range(count)] if attends else []
    if position == len(widths) - 1:
        resampler = None
    elif kind == "ResnetUpsampleBlock2D" or (attends and unet.upsample_type == "resnet"):
        resampler = ResnetBlock(width, width, unet, embedding, up=True)
    else:
        resampler = Resample(width, down=False)
    return Level(resnets, attentions, resampler, down=False)
