"""DhariwalUNet: the U-Net of Dhariwal and Nichol (ADM, arXiv 2105.05233) as EDM (arXiv 2206.00364) configures it."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.networks.condition_embedding import ConditionEmbedding
from rdmd_fast.networks.unet_layers import Conv2d, GroupNormSiLU, Linear, NoiseEmbedding, UNet, UNetBlock, require

CHANNELS_PER_HEAD = 64


class DhariwalUNet(UNet):
    """EDM's DhariwalUNet (ADM). Keyword names, defaults and state-dict keys are EDM's.

    Blocks scale and shift by the embedding, attention has heads of 64 channels. Layers begin uniform with variance
    1 / (3 fan-in), those that end a residual branch (and the output) at zero.

    Args:
        img_resolution: height and width in pixels; 2^(levels - 1) must divide it.
        in_channels, out_channels: channels of x and F.
        label_dim, augment_dim: lengths of one-hot class labels and of augmentation labels; 0 for none.
        model_channels: channels at full resolution before channel_mult.
        channel_mult: channel multiplier of each level, from full resolution down.
        channel_mult_emb: width of the embedding over model_channels.
        num_blocks: residual blocks a level.
        attn_resolutions: resolutions whose blocks attend; the innermost block always does. Blocks of fewer channels
            than a head has do not (as in EDM).
        dropout, label_dropout: probability, in training, inside the blocks and of dropping a sample's class.
        conditioned: whether the network is told a further number by sample (ours; zero weights at first).

    Raises:
        InputError: for sizes that do not divide.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        conditioned: bool = False,
    ):
        super().__init__()
        factor = 2 ** (len(channel_mult) - 1)
        require(img_resolution % factor == 0, f"{img_resolution=}: use a multiple of {factor} or fewer levels")
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.attn_resolutions = attn_resolutions

        emb_channels = model_channels * channel_mult_emb
        self.map_noise = NoiseEmbedding(model_channels, endpoint=False, sine_first=False)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None

        self.block_options = dict(emb_channels=emb_channels, dropout=dropout, eps=1e-5)
        widths = [model_channels * mult for mult in channel_mult]
        self.enc = self.build_encoder(widths, num_blocks)
        self.dec = self.build_decoder(widths, num_blocks)
        self.out_norm = GroupNormSiLU(widths[0], eps=1e-5)
        self.out_conv = Conv2d(widths[0], out_channels, 3)
        initialise(self)
        self.map_condition = ConditionEmbedding(emb_channels) if conditioned else None

    def block(self, in_channels: int, out_channels: int, attention: bool = False, **resample) -> UNetBlock:
        heads = out_channels // CHANNELS_PER_HEAD if attention else 0
        return UNetBlock(in_channels, out_channels, heads=heads, **resample, **self.block_options)

    def build_encoder(self, widths: list[int], num_blocks: int) -> nn.ModuleDict:
        enc = nn.ModuleDict()
        channels = widths[0]
        for level, width in enumerate(widths):
            res = self.img_resolution >> level
            if level == 0:
                enc[f"{res}x{res}_conv"] = Conv2d(self.in_channels, channels, 3)
            else:
                enc[f"{res}x{res}_down"] = self.block(channels, channels, down=True)
            for i in range(num_blocks):
                enc[f"{res}x{res}_block{i}"] = self.block(channels, width, res in self.attn_resolutions)
                channels = width
        return enc

    def build_decoder(self, widths: list[int], num_blocks: int) -> nn.ModuleDict:
        skips = [layer.out_channels for layer in self.enc.values()]
        dec = nn.ModuleDict()
        channels = skips[-1]
        for level, width in reversed(list(enumerate(widths))):
            res = self.img_resolution >> level
            if level == len(widths) - 1:
                dec[f"{res}x{res}_in0"] = self.block(channels, channels, True)
                dec[f"{res}x{res}_in1"] = self.block(channels, channels)
            else:
                dec[f"{res}x{res}_up"] = self.block(channels, channels, up=True)
            for i in range(num_blocks + 1):
                attention = res in self.attn_resolutions
                dec[f"{res}x{res}_block{i}"] = self.block(channels + skips.pop(), width, attention)
                channels = width
        return dec

    def encode(self, h: Tensor, modulations: Iterator[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The innermost features, and those of every layer for the decoder, in order."""
        skips: list[Tensor] = []
        for layer in self.enc.values():
            h = self.run(layer, h, modulations)
            skips.append(h)
        return h, skips

    def decode(self, h: Tensor, skips: list[Tensor], modulations: Iterator[Tensor]) -> Tensor:
        for layer in self.dec.values():
            if h.shape[1] != layer.in_channels:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self.run(layer, h, modulations)
        return self.out_conv(self.out_norm(h))

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Noise level, class and augmentation -> [N, emb_channels], ahead of the last SiLU."""
        embedding = self.map_noise(c_noise)
        if self.map_augment is not None:
            embedding = embedding + self.augmentation(augment_labels, embedding)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(self.labels(class_labels, embedding))
        return embedding


def initialise(network: DhariwalUNet) -> None:
    """EDM's choice: uniform within 1 / sqrt(fan-in), bias too; zero where a branch ends; labels of unit variance."""
    for name, layer in network.named_modules():
        if not isinstance(layer, Linear | Conv2d) or layer.weight is None:
            continue
        role = name.rsplit(".", 1)[-1]
        bound = 1 / math.sqrt(layer.weight[0].numel())
        if role in ("conv1", "proj", "out_conv", "map_augment"):
            bound = 0.0
        if role == "map_label":
            nn.init.normal_(layer.weight)
        else:
            nn.init.uniform_(layer.weight, -bound, bound)
        if layer.bias is not None:
            nn.init.uniform_(layer.bias, -bound, bound)
