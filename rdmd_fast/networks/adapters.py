"""Low-rank adapters (LoRA, arXiv 2106.09685) in a network, by PEFT; and their weights as files name them.

A file's pair of X.lora_A.weight [r, …] and X.lora_B.weight [o, r, …] adds B A to the weight of X: the scale is in B.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.networks.text_options import LoRAOptions

NAME = "default"  # PEFT's, of a network's only adapter
A, B = ".lora_A.weight", ".lora_B.weight"
_ATTENTION = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"
# Layers of FLUX.1's single blocks are beside each other, and the last joins attention and feed-forward.
_FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.proj_(mlp|out)"
_LAYERS = {"attention": _ATTENTION, "attention_feed_forward": f"{_ATTENTION}|{_FEED_FORWARD}", "all": ".*"}


def add_adapters(network: nn.Module, lora: LoRAOptions) -> None:
    """Put an adapter beside each layer that ``lora`` names, in place; all other parameters get no gradient.

    B is zero at first, so that the network's output stays as it is to the bit.

    Raises:
        InputError: peft is not installed, or there is no such layer.
    """
    peft = require("peft", "text")
    wanted = re.compile(rf"(.*\.)?({_LAYERS[lora.targets]})")
    layers = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and wanted.fullmatch(name)
    ]
    if not layers:
        raise InputError(f"lora.targets: {lora.targets} finds no layer in this {type(network).__name__}, use all")
    alpha = lora.rank if lora.alpha is None else lora.alpha
    network.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=layers), network, NAME)


def file_weights(state: Mapping[str, Tensor], scale: float, beneath: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of trained adapters, and whatever else is in it, as files name and scale them.

    Args:
        scale: alpha / rank.
        beneath: adapters, as files name them, that are part of what was the base in training: both sum up, as one
            adapter of both ranks.
    """
    ours = {
        name.replace(f".{NAME}.", "."): scale * tensor if f".lora_B.{NAME}." in name else tensor
        for name, tensor in state.items()
    }
    joint = {
        name: torch.cat([tensor, ours[name]], 0 if name.endswith(A) else 1) if name in ours else tensor
        for name, tensor in beneath.items()
    }
    return ours | joint


def adapter_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to adapters of a file's weights."""
    return {name: tensor for name, tensor in weights.items() if name.endswith((A, B))}


def merged(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """``weights`` with ``adapter`` added to them, float32.

    Raises:
        InputError: an adapter is half there, or fits no weight.
    """
    result = dict(weights)
    for name in adapter:
        layer = name.removesuffix(A).removesuffix(B)
        down, up, weight = adapter.get(layer + A), adapter.get(layer + B), result.get(f"{layer}.weight")
        if down is None or up is None:
            raise InputError(f"{origin}: {layer} has half an adapter, {name} alone: copy the file again")
        if name.endswith(B):
            continue
        added = up.flatten(1) @ down.flatten(1) if up.shape[1:2] == down.shape[:1] else None
        if weight is None or added is None or added.numel() != weight.numel() or len(up) != len(weight):
            raise InputError(f"{origin}: {name} fits no layer of the base, it is of another pipeline")
        result[f"{layer}.weight"] = weight + added.view_as(weight)
    return result
