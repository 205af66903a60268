"""The plain PyTorch formulation of the image networks, as most repositories write it: the yardstick of
``benchmarks.networks``.

One operation a step of the papers' equations: convolution, then its bias, GroupNorm, SiLU, embedding, residual sum and
skip scale each pass over memory on their own; resampling is a depthwise convolution; attention multiplies matrices in
fp32; tensors are contiguous. It reads the parameters of our own modules, so both compute the same function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
from rdmd_fast.networks.unet_layers import Conv2d, UNetBlock


def conv(layer: Conv2d, x: Tensor) -> Tensor:
    if layer.up or layer.down:
        channels, kernel = x.shape[1], layer.resample_filter.to(x.dtype)
        padding = (kernel.shape[-1] - 1) // 2
        if layer.up:
            weight = (4 * kernel).tile(channels, 1, 1, 1)
            x = F.conv_transpose2d(x, weight, groups=channels, stride=2, padding=padding)
        else:
            x = F.conv2d(x, kernel.tile(channels, 1, 1, 1), groups=channels, stride=2, padding=padding)
    if layer.weight is None:
        return x
    x = F.conv2d(x, layer.weight, padding=layer.weight.shape[-1] // 2)
    return x + layer.bias[:, None, None]


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def block(layer: UNetBlock, x: Tensor, embedding: Tensor) -> Tensor:
    h = conv(layer.conv0, F.silu(norm(layer.norm0, x)))
    modulation = F.linear(embedding, layer.affine.weight) + layer.affine.bias
    if layer.adaptive_scale:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = F.silu(norm(layer.norm1, h) * (scale + 1) + shift)
    else:
        h = F.silu(norm(layer.norm1, h + modulation[:, :, None, None]))
    h = conv(layer.conv1, h)
    h = h + (x if layer.skip is None else conv(layer.skip, x))
    h = h * layer.skip_scale
    return attention(layer, h) if layer.heads else h


def attention(layer: UNetBlock, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    qkv = conv(layer.qkv, norm(layer.norm2, x))
    q, k, v = qkv.reshape(batch * layer.heads, channels // layer.heads, 3, height * width).unbind(2)
    logits = torch.einsum("ncq,nck->nqk", q.float(), k.float() / math.sqrt(k.shape[1]))
    weights = logits.softmax(dim=2).to(x.dtype)
    attended = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
    return (conv(layer.proj, attended) + x) * layer.skip_scale


class PlainUNet(nn.Module):
    """``network`` (SongUNet or DhariwalUNet) in the plain formulation, on its own copy-free parameters."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        network = self.network
        embedding = F.silu(network.embed(c_noise, class_labels, None))
        h = aux = x.to(embedding.dtype)
        skips = []
        for name, layer in network.enc.items():
            if name.endswith("aux_residual"):
                # The filter follows the convolution here.
                kernel = layer.resample_filter.to(h.dtype).tile(layer.out_channels, 1, 1, 1)
                filtered = F.conv2d(aux, layer.weight, padding=1 + layer.filter_padding)
                filtered = F.conv2d(filtered, kernel, groups=layer.out_channels, stride=2)
                h = aux = skips[-1] = (filtered + layer.bias[:, None, None] + h) * math.sqrt(0.5)
                continue
            h = block(layer, h, embedding) if isinstance(layer, UNetBlock) else conv(layer, h)
            skips.append(h)
        for layer in network.dec.values():
            if isinstance(layer, UNetBlock):
                if h.shape[1] != layer.in_channels:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = block(layer, h, embedding)
        adm = isinstance(network, DhariwalUNet)
        out_norm, out_conv = (network.out_norm, network.out_conv) if adm else list(network.dec.values())[-2:]
        return conv(out_conv, F.silu(norm(out_norm, h))).to(x.dtype)
