"""The networks of text-to-image pipelines as ours.

Latent diffusion (arXiv 2112.10752), SDXL (arXiv 2307.01952), Stable Diffusion 3 (arXiv 2403.03206), FLUX.1. diffusers
computes them; here our input, c_noise and a prompt become the arguments of its forward, one adapter a family.
"""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdmd_fast.errors import InputError
from rdmd_fast.extras import quiet, require
from rdmd_fast.networks.adapters import add_adapters
from rdmd_fast.networks.diffusers_unet import Timestep
from rdmd_fast.networks.text_options import TIME_IDS, TextOptions
from rdmd_fast.networks.unet_layers import ExactTables


class TextCondition(NamedTuple):
    """What a network is told of N samples beside the noise level.

    Attributes:
        embeds: [N, T, D], one embedding a token.
        pooled: [N, P] of the whole prompt; None for a family without.
        time_ids: [N, 6], float32: original height and width, crop from the top and the left, target height and width,
            pixels; None for a family without.
        guidance: [N], float32: how far it is to be guided; None for a network that is not told.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: Tensor | None = None


# -- adapters ----------------------------------------------------------------------------------------------------------


def _stable_diffusion(unet: nn.Module, x: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
    embeds = condition.embeds.to(x.dtype)
    return unet(x, timestep, encoder_hidden_states=embeds, return_dict=False)[0]


def _stable_diffusion_xl(unet: nn.Module, x: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
    added = {"text_embeds": condition.pooled.to(x.dtype), "time_ids": condition.time_ids}
    embeds = condition.embeds.to(x.dtype)
    return unet(x, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]


def _stable_diffusion_3(transformer: nn.Module, x: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
    embeds, pooled = condition.embeds.to(x.dtype), condition.pooled.to(x.dtype)
    told = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "timestep": timestep}
    return transformer(x, **told, return_dict=False)[0].contiguous(memory_format=torch.channels_last)


def _flux(transformer: nn.Module, x: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
    # One input is a square of 2×2 latents; where it is, it is told as (0, row, column), and (0, 0, 0) of a text's.
    packed = F.pixel_unshuffle(x, 2)
    places = torch.zeros(*packed.shape[2:], 3, device=x.device)
    for axis, count in enumerate(packed.shape[2:]):
        places[..., axis + 1] = torch.arange(count, device=x.device).view(-1, *[1] * (1 - axis))
    embeds, pooled = condition.embeds.to(x.dtype), condition.pooled.to(x.dtype)
    told = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "guidance": condition.guidance}
    told |= {"img_ids": places.flatten(0, 1), "txt_ids": places.new_zeros(embeds.shape[1], 3)}
    tokens = packed.flatten(2).transpose(1, 2)
    output = transformer(tokens, timestep=timestep / 1000, **told, return_dict=False)[0]
    unpacked = F.pixel_shuffle(output.transpose(1, 2).unflatten(2, packed.shape[2:]), 2)
    return unpacked.contiguous(memory_format=torch.channels_last)


ADAPTERS: dict[str, Callable[[nn.Module, Tensor, Tensor, TextCondition], Tensor]] = {
    "stable_diffusion": _stable_diffusion,
    "stable_diffusion_xl": _stable_diffusion_xl,
    "stable_diffusion_3": _stable_diffusion_3,
    "flux": _flux,
}
"""(library's network, input [N, C, h, w], timestep [N], condition) -> raw prediction [N, C, h, w], channels_last, by
family."""


# -- network -----------------------------------------------------------------------------------------------------------


class Prompt(ExactTables):
    """One prompt's embedding, in the state dict; casting the network does not round it."""

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(name for name, table in self._buffers.items() if table is not None)

    def __init__(self, options: TextOptions):
        super().__init__()
        pooled = options.pooled_width
        self.register_buffer("embeds", torch.zeros(1, options.tokens, options.width))
        self.register_buffer("pooled", torch.zeros(1, pooled) if pooled else None)
        self.register_buffer("time_ids", torch.zeros(1, TIME_IDS) if options.tells_size else None)
        self.register_buffer("guidance", torch.zeros(1) if options.embeds_guidance else None)

    def forward(self, count: int) -> TextCondition:
        """The condition of ``count`` samples alike."""
        tables = (getattr(self, name) for name in TextCondition._fields)
        return TextCondition(*(None if table is None else table.expand(count, *table.shape[1:]) for table in tables))


class TextNetwork(nn.Module):
    """The network of ``TextOptions``. State dict: ``unet.`` or ``transformer.`` and diffusers' names, ``prompt.``,
    ``negative.``.

    With ``lora`` adapters are in it, named as PEFT names them; they make nothing of it before training, and the other
    parameters get no gradient.

    With a guidance s other than 1 its output is F_negative + s (F_prompt - F_negative), linear in F (classifier-free
    guidance, arXiv 2207.12598, whose w is s - 1), computed for both in one pass of 2 N samples. ``negative`` is there
    in that case only.

    Args:
        base: a network of the same part without adapters; its parameters become this one's, and are in memory once.

    Raises:
        InputError: diffusers is not installed, or cannot build such a network, or ``lora`` finds no layer in it.
    """

    def __init__(self, options: TextOptions, base: "TextNetwork | None" = None):
        super().__init__()
        self.part = options.part
        if base is None:
            part = _library_network(options)
        else:
            held = (*base.library_network.parameters(), *base.library_network.buffers())
            part = copy.deepcopy(base.library_network, {id(tensor): tensor for tensor in held})
        self.add_module(self.part, part)
        if options.lora:
            library_layers = set(part.modules())
            add_adapters(part, options.lora)
            _leave_out_buffers(part)
            _keep_channels_last(layer for layer in part.modules() if layer not in library_layers)
        self.adapter, self.guidance = ADAPTERS[options.family], options.guidance
        self.timestep = Timestep(options.schedule)
        self.prompt = Prompt(options)
        self.negative = None if self.guidance == 1 else Prompt(options)

    @property
    def library_network(self) -> nn.Module:
        """diffusers' own."""
        return getattr(self, self.part)

    @property
    def checkpointing(self) -> bool:
        """Whether the activations of its blocks are computed again in the backward pass."""
        return self.library_network.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        if wanted:
            self.library_network.enable_gradient_checkpointing()
        else:
            self.library_network.disable_gradient_checkpointing()

    def prompt_names(self) -> list[str]:
        """Of the state dict, what it is told."""
        return [name for name in self.state_dict() if name.startswith(("prompt.", "negative."))]

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: None = None) -> Tensor:
        """The raw prediction F.

        Args:
            x: [N, C, h, w], latents; h and w divide by ``TextOptions.divisor``.
            c_noise: ln(σ̃)/4, [N].

        Returns:
            [N, C, h, w] in x's dtype, channels_last.
        """
        timestep, count = self.timestep(c_noise).float(), x.shape[0]
        if self.negative is None:
            return self.adapter(self.library_network, x, timestep, self.prompt(count))
        both = TextCondition(
            *(
                None if wanted is None else torch.cat([unwanted, wanted])
                for unwanted, wanted in zip(self.negative(count), self.prompt(count), strict=True)
            )
        )
        outputs = self.adapter(self.library_network, torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        unconditional, conditional = outputs.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def _library_network(options: TextOptions) -> nn.Module:
    """diffusers' module of a config.json."""
    library, path, name = require("diffusers", "text"), f"{options.part}/config.json", options.class_of(options.family)
    try:
        with quiet(library):
            network, unknown = getattr(library, name).from_config(options.config, return_unused_kwargs=True)
    except Exception as error:  # whatever the library makes of a damaged configuration
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} describes no {name} ({reason})") from None
    if unknown:
        raise InputError(f"{path}: {min(unknown)}: is not a key that the installed diffusers knows")
    _keep_channels_last(network.modules())
    return network


def _leave_out_buffers(network: nn.Module) -> None:
    """Have the state dict without buffers, which are the base's, as positions."""
    for layer in network.modules():
        for name, buffer in list(layer.named_buffers(recurse=False)):
            layer.register_buffer(name, buffer, persistent=False)


# The library leaves the layout of activations to convolutions, and those to the layout of their weights: engines have
# another than frozen networks, and a 1×1 weight could be of either. With these copies of a network agree to the bit.


def _keep_channels_last(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        # Also an adapted one as a whole: base and adapter then keep one input for their backward passes.
        if isinstance(layer, nn.Conv2d) or isinstance(getattr(layer, "base_layer", None), nn.Conv2d):
            layer.register_forward_pre_hook(_input_channels_last)
            layer.register_forward_hook(_output_channels_last)


def _input_channels_last(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]


def _output_channels_last(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.contiguous(memory_format=torch.channels_last)
