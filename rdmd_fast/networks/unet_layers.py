"""Layers that the U-Nets of EDM (arXiv 2206.00364) share: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

Activations are channels_last. GroupNorm and SiLU are one pass, and so are residual sum and skip scale. Parameter and
buffer names are EDM's, so its checkpoints load one to one. ZeRO-3 gathers parameters module by module: those that are
read outside of their own module's forward are `borrowed_parameters`, or are read so below ZeRO 3 alone.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdmd_fast.errors import InputError
from rdmd_fast.kernels._dispatch import backend
from rdmd_fast.kernels.group_norm_silu import branching_group_norm_silu, group_norm_silu
from rdmd_fast.kernels.scaled_residual import scaled_residual


def require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))  # noise features come in fp32


class GroupNorm(nn.GroupNorm):
    """At least four channels a group, at most 32 groups."""

    def __init__(self, channels: int, eps: float):
        groups = min(32, channels // 4)
        fits = groups > 0 and channels % groups == 0
        require(fits, f"{groups} groups do not fit {channels} channels: use model_channels=32 or a multiple")
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)


class GroupNormSiLU(GroupNorm):
    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, addend=None, x_bias=None
    ) -> Tensor:
        """silu(norm(x + addend + x_bias) (1 + scale) + shift); x [N, C, H, W], x_bias [C], others [N, C]; or None."""
        parameters = self.weight, self.bias, self.num_groups, self.eps
        return group_norm_silu(x, *parameters, scale, shift, addend, x_bias=x_bias)


class BranchingGroupNormSiLU(GroupNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(silu(norm(x)), x for the way past the norm): their gradients are added in the norm's backward pass."""
        return branching_group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class Conv2d(nn.Module):
    """A "same" convolution, after doubling or halving the resolution with a smoothing filter if asked.

    The filter is the normalised outer product of `taps`; [1, 1] is nearest repetition and 2x2 averaging.
    `kernel` 0 resamples without convolving. `fused` (down only) filters after the convolution and folds the two
    into one strided convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        fused: bool = False,
        taps: Sequence[float] = (1, 1),
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down, self.fused = up, down, fused
        self.box, self.filter_padding = list(taps) == [1, 1], (len(taps) - 1) // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        if up or down:
            row = torch.as_tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (row.outer(row) / row.sum() ** 2)[None, None])
        if up and self.box and kernel == 3:
            # A repeated pixel meets neighbouring weights together: tap t of the transposed kernel is
            # w[2 - t] + w[3 - t].
            taps = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
            self.register_buffer("transposed_from_taps", torch.kron(taps, taps).t().contiguous(), persistent=False)

    def forward(self, x: Tensor, adds_bias: bool = True) -> Tensor:
        bias = self.bias if adds_bias else None
        if self.fused:
            return self.fused_down(x, bias)
        if self.up and self.box and self.kernel == 1:
            return self.upsample(self.convolve(x, bias))  # the two commute; this order does a quarter of the work
        if self.up and self.box and self.kernel == 3:
            return self.repeat_and_convolve(x, bias)
        if self.up:
            x = self.upsample(x)
        elif self.down:
            x = self.downsample(x)
        return self.convolve(x, bias) if self.kernel else x

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, self.weight, bias, padding=self.kernel // 2)

    def repeat_and_convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Nearest repetition and a 3x3 convolution as one transposed 4x4 convolution: 4 products for 9."""
        by_tap = self.weight.permute(1, 2, 3, 0).flatten(1, 2)  # [in, 9, out]: the product comes out channels_last
        kernel = self.transposed_from_taps.to(by_tap.dtype).expand(len(by_tap), -1, -1) @ by_tap
        return F.conv_transpose2d(x, kernel.unflatten(1, (4, 4)).permute(0, 3, 1, 2), bias, stride=2, padding=1)

    def upsample(self, x: Tensor) -> Tensor:
        if self.box:
            return repeat_pixels(x)
        kernel = 4 * self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=self.filter_padding, groups=x.shape[1])

    def downsample(self, x: Tensor) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=self.filter_padding, groups=x.shape[1])

    def fused_down(self, x: Tensor, bias: Tensor | None) -> Tensor:
        smoothing = self.resample_filter.to(self.weight.dtype).flip(2, 3)
        kernel = F.conv2d(self.weight.flatten(0, 1)[:, None], smoothing, padding=smoothing.shape[-1] - 1)
        kernel = kernel[:, 0].unflatten(0, self.weight.shape[:2])
        return F.conv2d(x, kernel, bias, stride=2, padding=self.kernel // 2 + self.filter_padding)


class PackedQKV(Conv2d):
    """Queries, keys and values, interleaved by EDM inside each head: output channel 3 (d head + c) + {0, 1, 2}."""

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, 3 * channels, 1)
        self.heads = heads

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [N, L, C] -> three of [N, heads, L, C / heads]."""
        channels = tokens.shape[-1]
        # Reordering the small weight leaves q, k and v with unit stride, as flash attention wants them.
        weight = self.weight.reshape(channels, 3, channels).transpose(0, 1).reshape(3 * channels, channels)
        bias = self.bias.reshape(channels, 3).t().reshape(-1)
        packed = F.linear(tokens, weight, bias).unflatten(2, (3, self.heads, channels // self.heads))
        return packed.permute(2, 0, 3, 1, 4).unbind()


class TokenProjection(Conv2d):
    """A 1x1 convolution applied to tokens [N, L, C]."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1)

    def forward(self, tokens: Tensor, adds_bias: bool = True) -> Tensor:
        return F.linear(tokens, self.weight.flatten(1), self.bias if adds_bias else None)


class UNetBlock(nn.Module):
    """Residual block: norm, convolution, embedding, norm, convolution, skip; then self-attention if `heads`.

    The embedding is added before the second norm, or with `adaptive_scale` scales and shifts after it.
    `project_skip`: the skip of a resampling block convolves even if it need not change the width.

    forward(x [N, in, H, W], modulation) -> [N, out, H', W'] with H' = H, 2 H (up) or H / 2 (down); the modulation is
    ``affine`` of an embedding [N, E], which the network computes for all blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        taps: Sequence[float] = (1, 1),
        eps: float = 1e-5,
        adaptive_scale: bool = True,
        project_skip: bool = False,
        skip_scale: float = 1.0,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.heads, self.dropout, self.adaptive_scale, self.skip_scale = heads, dropout, adaptive_scale, skip_scale
        resample = dict(up=up, down=down, taps=taps)
        self.norm0 = BranchingGroupNormSiLU(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNormSiLU(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if out_channels != in_channels or up or down:
            convolves = project_skip or out_channels != in_channels
            self.skip = Conv2d(in_channels, out_channels, 1 if convolves else 0, **resample)
        if heads:
            require(out_channels % heads == 0, f"{heads} attention heads do not fit {out_channels} channels")
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = PackedQKV(out_channels, heads)
            self.proj = TokenProjection(out_channels)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        # cuDNN adds a bias in a pass of its own, and sums its gradient in one: the norm and the sum do so in theirs.
        apart = kernels_run(x)
        h, x = self.norm0(x)
        h = self.conv0(h, adds_bias=not apart)
        x_bias = self.conv0.bias if apart else None
        if self.adaptive_scale:
            h = self.norm1(h, *modulation.chunk(2, dim=1), x_bias=x_bias)
        else:
            h = self.norm1(h, addend=modulation, x_bias=x_bias)
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        h = self.conv1(h, adds_bias=not apart)
        x = x if self.skip is None else self.skip(x, adds_bias=not apart)
        h = scaled_residual(h, x, self.skip_scale, self.residual_biases() if apart else ())
        return self.attend(h) if self.heads else h

    def residual_biases(self) -> list[Tensor]:
        layers = (self.conv1,) if self.skip is None else (self.conv1, self.skip)
        return [layer.bias for layer in layers if layer.bias is not None]

    def borrowed_parameters(self) -> list[Tensor]:
        """Parameters of submodules that ``forward`` reads itself: ZeRO-3 must gather them for this module."""
        return [self.conv0.bias, *self.residual_biases(), *([self.proj.bias] if self.heads else [])]

    def attend(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.qkv(to_tokens(self.norm2(x)))
        attended = attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
        apart = kernels_run(x)
        projected, biases = self.proj(attended, adds_bias=not apart), [self.proj.bias] if apart else ()
        tokens = scaled_residual(projected, to_tokens(x).flatten(0, 1), self.skip_scale, biases)
        return tokens.unflatten(0, (n, height, width)).permute(0, 3, 1, 2)


def kernels_run(x: Tensor) -> bool:
    """Whether our kernels do what is theirs, biases of the convolutions before them included."""
    return backend(x.device) != "reference"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of [N, heads, tokens, D]; logits are fp32."""
    # For few tokens of 16 bits PyTorch's own takes twice to four times as long on a CPU (benchmarks/NOTES.md).
    if q.device.type == "cpu" and q.element_size() == 2 and q.shape[-2] <= 256:
        logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        return torch.softmax(logits, dim=-1).to(q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def repeat_pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2 H, 2 W], nearest."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # Inductor makes interpolate's backward pass one of atomic adds, whose order is another in each run.
        n, c, height, width = x.shape
        repeated = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, height, 2, width, 2, c)
        return repeated.reshape(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest")


def to_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H W, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class ExactTables(nn.Module):
    """Casting the network must not round the buffers that ``tables`` names: phases reach hundreds of radians."""

    tables: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        exact = {name: getattr(self, name) for name in self.tables}
        super()._apply(fn, recurse)
        for name, table in exact.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self


class NoiseEmbedding(ExactTables):
    """[N] noise levels -> [N, channels] sines and cosines.

    Frequencies are geometric, from 1 radian down to `lowest` (positional), or with `fourier` random, of standard
    deviation 16 cycles, and kept in the state dict.
    """

    tables = ("freqs",)

    def __init__(self, channels: int, *, fourier: bool = False, endpoint: bool = True, sine_first: bool = True):
        super().__init__()
        half = channels // 2
        steps = max(half - 1, 1) if endpoint else half
        freqs = 16 * torch.randn(half) if fourier else 1e-4 ** (torch.arange(half) / steps)
        self.radians, self.sine_first = 2 * math.pi if fourier else 1.0, sine_first
        self.register_buffer("freqs", freqs, persistent=fourier)

    def forward(self, c_noise: Tensor) -> Tensor:
        phase = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32)).outer(self.radians * self.freqs)
        waves = phase.sin(), phase.cos()
        return torch.cat(waves if self.sine_first else waves[::-1], dim=1)


class UNet(nn.Module):
    """What EDM's U-Nets have in common: `enc` and `dec` lists of named layers around one embedding.

    Attributes:
        checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        map_condition: embeds the condition; None in a network without.
    """

    checkpointing = False
    map_condition: nn.Module | None

    def run(self, layer: nn.Module, x: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        """One layer of `enc` or `dec`, in their order."""
        if not isinstance(layer, UNetBlock):
            return layer(x)
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, next(modulations), use_reentrant=False)
        return layer(x, next(modulations))

    def modulations(self, embedding: Tensor) -> Iterator[Tensor]:
        """Each block's ``affine`` of the embedding, in the order of `enc` and `dec`.

        On a GPU one product for all, unless ZeRO-3 gathers weights module by module.
        """
        layers = [each.affine for each in (*self.enc.values(), *self.dec.values()) if isinstance(each, UNetBlock)]
        if not kernels_run(embedding) or hasattr(layers[0].weight, "ds_id"):
            return map(lambda layer: layer(embedding), layers)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return iter(F.linear(embedding.to(weight.dtype), weight, bias).split([len(layer.bias) for layer in layers], 1))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The raw output F.

        Args:
            x: [N, in_channels, H, W], scaled by c_in.
            c_noise: [N].
            class_labels: [N, label_dim] one-hot; None means no class (zeros); ignored if label_dim is 0.
            augment_labels: [N, augment_dim], or None for images that were not augmented.
            condition: [N] in [-1, 1], None for 0; ignored by a network built without.

        Returns:
            [N, out_channels, H, W], channels_last, in x's dtype; computed in the weights' dtype.
        """
        embedding = self.embed(c_noise, class_labels, augment_labels)
        if self.map_condition is not None:
            embedding = embedding + self.map_condition(condition, c_noise)
        embedding = F.silu(embedding)
        h = x.to(embedding.dtype, memory_format=torch.channels_last)
        modulations = self.modulations(embedding)
        return self.decode(*self.encode(h, modulations), modulations).to(x.dtype)

    def labels(self, class_labels: Tensor | None, features: Tensor) -> Tensor:
        """class_labels, zeros where there are none; in training some samples lose theirs (label_dropout)."""
        if class_labels is None:
            class_labels = features.new_zeros(len(features), self.label_dim)
        if self.training and self.label_dropout:
            keep = torch.rand(len(features), 1, device=features.device) >= self.label_dropout
            class_labels = class_labels * keep
        return class_labels

    def augmentation(self, augment_labels: Tensor | None, features: Tensor) -> Tensor:
        """Embedded augmentation labels. Zeros stand for none: their weight then has a gradient, as engines expect."""
        if augment_labels is None:
            augment_labels = features.new_zeros(features.shape[0], self.augment_dim)
        return self.map_augment(augment_labels)
