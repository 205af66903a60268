"""SongUNet: the U-Net of Song et al. (arXiv 2011.13456) as EDM (arXiv 2206.00364) configures it.

DDPM++ is "positional", "standard", filter [1, 1]; NCSN++ "fourier", "residual", [1, 3, 3, 1].
Parameter and buffer names are EDM's, so its checkpoints load one to one.

Parameters are read only inside the forward of their own module, since ZeRO-3 gathers them module by module.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.errors import InputError
from rdmd_fast.kernels.group_norm_silu import group_norm_silu

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches
NEAR_ZERO = 1e-5  # initial gain of the layers that end a residual branch
ATTENTION_GAIN = math.sqrt(0.2)


def initialise(layer: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Xavier-uniform weights times gain, zero bias (EDM's choice for SongUNet)."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        initialise(self, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))  # noise features come in fp32


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int):
        groups = min(32, channels // 4)
        fits = groups > 0 and channels % groups == 0
        require(fits, f"{groups} groups do not fit {channels} channels: use model_channels=32 or a multiple")
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)


class GroupNormSiLU(GroupNorm):
    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """addend [N, C] is added to x [N, C, H, W] first."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, addend=addend)


class Conv2d(nn.Conv2d):
    """A "same" convolution, after doubling or halving the resolution with a smoothing filter if asked.

    The filter is the normalised outer product of `taps`; [1, 1] is nearest repetition and 2x2 averaging.
    `fused` (down only) filters after the convolution and folds the two into one strided convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        gain: float = 1.0,
        up: bool = False,
        down: bool = False,
        fused: bool = False,
        taps: Sequence[float] = (1, 1),
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        initialise(self, gain)
        self.up, self.down, self.fused = up, down, fused
        self.box, self.filter_padding = list(taps) == [1, 1], (len(taps) - 1) // 2
        if up or down:
            row = torch.as_tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (row.outer(row) / row.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.fused_down(x)
        if self.up and self.box and self.kernel_size == (1, 1):
            return self.upsample(super().forward(x))  # the two commute; this order does a quarter of the work
        if self.up:
            x = self.upsample(x)
        elif self.down:
            x = self.downsample(x)
        return super().forward(x)

    def upsample(self, x: Tensor) -> Tensor:
        if self.box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        kernel = 4 * self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=self.filter_padding, groups=x.shape[1])

    def downsample(self, x: Tensor) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=self.filter_padding, groups=x.shape[1])

    def fused_down(self, x: Tensor) -> Tensor:
        smoothing = self.resample_filter.to(self.weight.dtype).flip(2, 3)
        kernel = F.conv2d(self.weight.flatten(0, 1)[:, None], smoothing, padding=smoothing.shape[-1] - 1)
        kernel = kernel[:, 0].unflatten(0, self.weight.shape[:2])
        return F.conv2d(x, kernel, self.bias, stride=2, padding=self.padding[0] + self.filter_padding)


class PackedQKV(Conv2d):
    """Queries, keys and values of one attention head, interleaved by EDM: output channel 3 c + {0, 1, 2}."""

    def __init__(self, channels: int):
        super().__init__(channels, 3 * channels, 1, gain=ATTENTION_GAIN)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [N, L, C] -> three of [N, L, C]."""
        channels = tokens.shape[-1]
        # Reordering the small weight leaves q, k and v with unit stride, as flash attention wants them.
        weight = self.weight.reshape(channels, 3, channels).transpose(0, 1).reshape(3 * channels, channels)
        bias = self.bias.reshape(channels, 3).t().reshape(-1)
        return F.linear(tokens, weight, bias).chunk(3, dim=-1)


class TokenProjection(Conv2d):
    """A 1x1 convolution applied to tokens [N, L, C]."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1, gain=NEAR_ZERO)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class UNetBlock(nn.Module):
    """Residual block: norm, convolution, embedding, norm, convolution, skip; then self-attention if asked.

    forward(x [N, in, H, W], embedding [N, E]) -> [N, out, H', W'] with H' = H, 2 H (up) or H / 2 (down).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        dropout: float = 0.0,
        taps: Sequence[float] = (1, 1),
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.attention, self.dropout = attention, dropout
        resample = dict(up=up, down=down, taps=taps)
        self.norm0 = GroupNormSiLU(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNormSiLU(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=NEAR_ZERO)
        self.skip = None
        if out_channels != in_channels or up or down:
            self.skip = Conv2d(in_channels, out_channels, 1, **resample)
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = PackedQKV(out_channels)
            self.proj = TokenProjection(out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # In-place sums touch only fresh outputs of linear layers, whose backward does not read them.
        h = self.norm1(self.conv0(self.norm0(x)), self.affine(embedding))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        h = self.conv1(h).add_(x if self.skip is None else self.skip(x)).mul_(SKIP_SCALE)
        return self.attend(h) if self.attention else h

    def attend(self, x: Tensor) -> Tensor:
        height_width = x.shape[2:]
        q, k, v = (part[:, None] for part in self.qkv(to_tokens(self.norm2(x))))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        tokens = self.proj(attended).add_(to_tokens(x)).mul_(SKIP_SCALE)
        return tokens.unflatten(1, height_width).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H W, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class NoiseEmbedding(nn.Module):
    """[N] noise levels -> [N, channels] sines, then cosines.

    Frequencies are geometric, from 1 down to 1e-4 radians (DDPM++), or with `fourier` random, of standard
    deviation 16 cycles, and kept in the state dict (NCSN++).
    """

    def __init__(self, channels: int, fourier: bool):
        super().__init__()
        half = channels // 2
        freqs = 16 * torch.randn(half) if fourier else 1e-4 ** (torch.arange(half) / max(half - 1, 1))
        self.radians = 2 * math.pi if fourier else 1.0
        self.register_buffer("freqs", freqs, persistent=fourier)

    def _apply(self, fn, recurse=True):
        # Casting the network to bf16 must not round the frequencies: phases reach hundreds of radians.
        exact = self.freqs
        super()._apply(fn, recurse)
        self.freqs = exact.to(self.freqs.device)
        return self

    def forward(self, c_noise: Tensor) -> Tensor:
        phase = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32)).outer(self.radians * self.freqs)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class SongUNet(nn.Module):
    """EDM's SongUNet (DDPM++ and NCSN++). Keyword names, defaults and state-dict keys are EDM's.

    Activations are channels_last; weights are contiguous, as DeepSpeed wants them (elsewhere
    `.to(memory_format=torch.channels_last)` spares their conversion). Layers begin Xavier-uniform: those that
    end a residual branch (and the output) times 1e-5, queries, keys and values times sqrt(1/5).

    Args:
        img_resolution: height and width in pixels; 2^(levels - 1) must divide it.
        in_channels, out_channels: channels of x and F.
        label_dim, augment_dim: lengths of one-hot class labels and of augmentation labels; 0 for none.
        model_channels: channels at full resolution before channel_mult.
        channel_mult: channel multiplier of each level, from full resolution down.
        channel_mult_emb, channel_mult_noise: widths of embedding and noise features over model_channels.
        num_blocks: residual blocks a level.
        attn_resolutions: resolutions whose blocks attend; the innermost block always does.
        dropout, label_dropout: probability, in training, inside the blocks and of dropping a sample's class.
        embedding_type: "positional" or "fourier".
        encoder_type: "standard" or "residual"; decoder_type: "standard".
        resample_filter: an even number of taps.

    Raises:
        InputError: for a choice that is not supported, or sizes that do not divide.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        require(embedding_type in ("positional", "fourier"), f"{embedding_type=}: use positional or fourier")
        require(encoder_type in ("standard", "residual"), f"{encoder_type=}: use standard or residual")
        require(decoder_type == "standard", f"{decoder_type=}: use standard")
        factor = 2 ** (len(channel_mult) - 1)
        require(img_resolution % factor == 0, f"{img_resolution=}: use a multiple of {factor} or fewer levels")
        require(len(resample_filter) % 2 == 0, f"{resample_filter=}: use an even number of taps")
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout

        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise = NoiseEmbedding(noise_channels, fourier=embedding_type == "fourier")
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        widths = [model_channels * mult for mult in channel_mult]
        block = dict(emb_channels=emb_channels, dropout=dropout, taps=resample_filter)
        residual = encoder_type == "residual"
        self.enc = self.build_encoder(model_channels, widths, num_blocks, attn_resolutions, residual, block)
        self.dec = self.build_decoder(widths, num_blocks, attn_resolutions, block)

    def build_encoder(self, stem, widths, num_blocks, attn_resolutions, residual, block) -> nn.ModuleDict:
        enc = nn.ModuleDict()
        channels, aux_channels = stem, self.in_channels
        for level, width in enumerate(widths):
            res = self.img_resolution >> level
            if level == 0:
                enc[f"{res}x{res}_conv"] = Conv2d(self.in_channels, channels, 3)
            else:
                enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
            if level > 0 and residual:
                resample = dict(down=True, fused=True, taps=block["taps"])
                enc[f"{res}x{res}_aux_residual"] = Conv2d(aux_channels, channels, 3, **resample)
                aux_channels = channels
            for i in range(num_blocks):
                attention = res in attn_resolutions
                enc[f"{res}x{res}_block{i}"] = UNetBlock(channels, width, attention=attention, **block)
                channels = width
        return enc

    def build_decoder(self, widths, num_blocks, attn_resolutions, block) -> nn.ModuleDict:
        skips = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]
        dec = nn.ModuleDict()
        channels = skips[-1]
        for level, width in reversed(list(enumerate(widths))):
            res = self.img_resolution >> level
            if level == len(widths) - 1:
                dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, attention=True, **block)
                dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and res in attn_resolutions
                channels += skips.pop()
                dec[f"{res}x{res}_block{i}"] = UNetBlock(channels, width, attention=attention, **block)
                channels = width
        dec[f"{res}x{res}_aux_norm"] = GroupNormSiLU(channels)
        dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, self.out_channels, 3, gain=NEAR_ZERO)
        return dec

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The raw output F.

        Args:
            x: [N, in_channels, H, W], scaled by c_in.
            c_noise: [N].
            class_labels: [N, label_dim] one-hot; None means no class (zeros); ignored if label_dim is 0.
            augment_labels: [N, augment_dim], or None for images that were not augmented.

        Returns:
            [N, out_channels, H, W], channels_last, in x's dtype; computed in the weights' dtype.
        """
        embedding = self.embed(c_noise, class_labels, augment_labels)
        h = aux = x.to(embedding.dtype, memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                h = aux = skips[-1] = layer(aux).add_(h).mul_(SKIP_SCALE)
            else:
                h = layer(h, embedding) if isinstance(layer, UNetBlock) else layer(h)
                skips.append(h)
        for layer in self.dec.values():
            if isinstance(layer, UNetBlock) and h.shape[1] != layer.in_channels:
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding) if isinstance(layer, UNetBlock) else layer(h)
        return h.to(x.dtype)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Noise level, class and augmentation -> [N, emb_channels]."""
        embedding = self.map_noise(c_noise)
        if self.map_label is not None:
            if class_labels is None:
                class_labels = embedding.new_zeros(len(embedding), self.label_dim)
            if self.training and self.label_dropout:
                keep = torch.rand(len(embedding), 1, device=embedding.device) >= self.label_dropout
                class_labels = class_labels * keep
            # sqrt(label_dim) gives a one-hot vector unit variance.
            embedding = embedding + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(f"SongUNet: {message}")
