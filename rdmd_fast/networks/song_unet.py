"""SongUNet: the U-Net of Song et al. (arXiv 2011.13456) as EDM (arXiv 2206.00364) configures it.

DDPM++ is "positional", "standard", filter [1, 1]; NCSN++ "fourier", "residual", [1, 3, 3, 1].
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.kernels.scaled_residual import scaled_residual
from rdmd_fast.networks.condition_embedding import ConditionEmbedding
from rdmd_fast.networks.unet_layers import Conv2d, GroupNormSiLU, Linear, NoiseEmbedding, UNet, UNetBlock, require

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches
NEAR_ZERO = 1e-5  # initial gain of the layers that end a residual branch
ATTENTION_GAIN = math.sqrt(0.2)


class SongUNet(UNet):
    """EDM's SongUNet (DDPM++ and NCSN++). Keyword names, defaults and state-dict keys are EDM's.

    Activations are channels_last; weights are contiguous, as DeepSpeed wants them (elsewhere
    `.to(memory_format=torch.channels_last)` spares their conversion, as of loaded exports). Layers begin
    Xavier-uniform: those that end a residual branch (and the output) times 1e-5, queries, keys and values times
    sqrt(1/5).

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
        encoder_type: "standard", "skip" or "residual": how a shrunken x enters each level again.
        decoder_type: "standard" or "skip": whether each level adds to the output.
        resample_filter: an even number of taps.
        conditioned: whether the network is told a further number by sample (ours; zero weights at first).

    Raises:
        InputError: for a choice that does not exist, or sizes that do not divide.
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
        conditioned: bool = False,
    ):
        super().__init__()
        check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", decoder_type, ("standard", "skip"))
        factor = 2 ** (len(channel_mult) - 1)
        require(img_resolution % factor == 0, f"{img_resolution=}: use a multiple of {factor} or fewer levels")
        require(len(resample_filter) % 2 == 0, f"{resample_filter=}: use an even number of taps")
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.attn_resolutions, self.taps = attn_resolutions, resample_filter

        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise = NoiseEmbedding(noise_channels, fourier=embedding_type == "fourier")
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        self.block_options = dict(
            emb_channels=emb_channels, dropout=dropout, taps=resample_filter, eps=1e-6, adaptive_scale=False,
            project_skip=True, skip_scale=SKIP_SCALE,
        )  # fmt: skip
        widths = [model_channels * mult for mult in channel_mult]
        self.enc = self.build_encoder(model_channels, widths, num_blocks)
        self.dec = self.build_decoder(widths, num_blocks)
        initialise(self)
        self.map_condition = ConditionEmbedding(emb_channels) if conditioned else None

    def block(self, in_channels: int, out_channels: int, attention: bool = False, **resample) -> UNetBlock:
        return UNetBlock(in_channels, out_channels, heads=int(attention), **resample, **self.block_options)

    def build_encoder(self, stem: int, widths: list[int], num_blocks: int) -> nn.ModuleDict:
        enc, taps = nn.ModuleDict(), self.taps
        channels, aux = stem, self.in_channels
        for level, width in enumerate(widths):
            res = self.img_resolution >> level
            if level == 0:
                enc[f"{res}x{res}_conv"] = Conv2d(self.in_channels, channels, 3)
            else:
                enc[f"{res}x{res}_down"] = self.block(channels, channels, down=True)
            if level > 0 and self.encoder_type == "skip":
                enc[f"{res}x{res}_aux_down"] = Conv2d(aux, aux, 0, down=True, taps=taps)
                enc[f"{res}x{res}_aux_skip"] = Conv2d(aux, channels, 1)
            if level > 0 and self.encoder_type == "residual":
                enc[f"{res}x{res}_aux_residual"] = Conv2d(aux, channels, 3, down=True, fused=True, taps=taps)
                aux = channels
            for i in range(num_blocks):
                enc[f"{res}x{res}_block{i}"] = self.block(channels, width, res in self.attn_resolutions)
                channels = width
        return enc

    def build_decoder(self, widths: list[int], num_blocks: int) -> nn.ModuleDict:
        skips = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]
        dec, innermost = nn.ModuleDict(), len(widths) - 1
        channels = skips[-1]
        for level, width in reversed(list(enumerate(widths))):
            res = self.img_resolution >> level
            if level == innermost:
                dec[f"{res}x{res}_in0"] = self.block(channels, channels, True)
                dec[f"{res}x{res}_in1"] = self.block(channels, channels)
            else:
                dec[f"{res}x{res}_up"] = self.block(channels, channels, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and res in self.attn_resolutions
                dec[f"{res}x{res}_block{i}"] = self.block(channels + skips.pop(), width, attention)
                channels = width
            if self.decoder_type == "skip" or level == 0:
                if level < innermost and self.decoder_type == "skip":
                    out = self.out_channels
                    dec[f"{res}x{res}_aux_up"] = Conv2d(out, out, 0, up=True, taps=self.taps)
                dec[f"{res}x{res}_aux_norm"] = GroupNormSiLU(channels, eps=1e-6)
                dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, self.out_channels, 3)
        return dec

    def encode(self, x: Tensor, modulations: Iterator[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The innermost features, and those of every level for the decoder, in order."""
        h = aux = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                h = skips[-1] = layer(aux).add_(h)
            elif name.endswith("aux_residual"):
                h = aux = skips[-1] = scaled_residual(layer(aux), h, SKIP_SCALE)
            else:
                h = self.run(layer, h, modulations)
                skips.append(h)
        return h, skips

    def decode(self, h: Tensor, skips: list[Tensor], modulations: Iterator[Tensor]) -> Tensor:
        output = normed = None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                output = layer(output)
            elif name.endswith("aux_norm"):
                normed = layer(h)
            elif name.endswith("aux_conv"):
                output = layer(normed) if output is None else layer(normed).add_(output)
            else:
                if h.shape[1] != layer.in_channels:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = self.run(layer, h, modulations)
        return output

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Noise level, class and augmentation -> [N, emb_channels], ahead of the last SiLU."""
        embedding = self.map_noise(c_noise)
        if self.map_label is not None:
            # sqrt(label_dim) gives a one-hot vector unit variance.
            embedding = embedding + self.map_label(self.labels(class_labels, embedding) * math.sqrt(self.label_dim))
        if self.map_augment is not None:
            embedding = embedding + self.augmentation(augment_labels, embedding)
        return self.map_layer1(F.silu(self.map_layer0(embedding)))


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"SongUNet: {key}={value!r}: use {' or '.join(choices)}")


def initialise(network: SongUNet) -> None:
    """EDM's choice: Xavier-uniform weights times a gain by the layer's role, zero bias."""
    gains = {"conv1": NEAR_ZERO, "proj": NEAR_ZERO, "qkv": ATTENTION_GAIN}
    for name, layer in network.named_modules():
        if not isinstance(layer, Linear | Conv2d) or layer.weight is None:
            continue
        role = name.rsplit(".", 1)[-1]
        nn.init.xavier_uniform_(layer.weight, NEAR_ZERO if role.endswith("aux_conv") else gains.get(role, 1.0))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
