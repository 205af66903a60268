"""Networks and their options. Every raw network is called ``network(x, c_noise, class_labels=None)``.

One that was built to be told a number of each sample, as λ, takes it as ``condition=``.
"""

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions
from rdmd_fast.networks.text_options import TextOptions
from rdmd_fast.options import Options


def build_network(
    options: Options, sample_shape: tuple[int, ...], dropout: bool = True, conditioned: bool = False
) -> torch.nn.Module:
    """A raw network for samples of ``sample_shape``, (D,) or (C, H, W), freshly initialised.

    ``dropout=False`` leaves it out whatever the options say: distillation wants scores without noise of their own.
    With ``conditioned`` the network takes a further number by sample, ``network(..., condition=values)``, of which it
    makes nothing before training.

    Raises:
        InputError: the network does not fit the samples, or takes no condition.
    """
    points = len(sample_shape) == 1
    if options.kind in ("mlp", "affine") and not points:
        raise InputError(
            f"network kind {options.kind!r} is for points, the data has shape {sample_shape}: use song_unet"
        )
    if options.kind == "mlp":
        from rdmd_fast.networks.mlp import MLP

        return MLP(
            sample_shape[0],
            hidden=options.hidden,
            depth=options.depth,
            embedding=options.embedding,
            conditioned=conditioned,
        )
    if options.kind == "affine":
        if conditioned:
            raise InputError("network kind 'affine' takes no condition: use mlp")
        from rdmd_fast.networks.mlp import AffineMap

        return AffineMap(sample_shape[0], scale=options.scale, angle=options.angle)
    if options.kind == "diffusers_unet":
        return _build_unet2d(options, sample_shape, dropout, conditioned)
    if isinstance(options, TextOptions):
        return _build_text_network(options, sample_shape, dropout, conditioned)
    if points:
        raise InputError(f"network kind {options.kind!r} is for images, the data has shape {sample_shape}: use mlp")
    return _build_unet(options, sample_shape, dropout, conditioned)


def _build_unet(
    options: SongUNetOptions | DhariwalUNetOptions, sample_shape: tuple[int, ...], dropout: bool, conditioned: bool
) -> torch.nn.Module:
    from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
    from rdmd_fast.networks.song_unet import SongUNet

    channels, height, width = sample_shape
    halvings = 2 ** (len(options.channel_mult) - 1)
    if height != width or height % halvings:
        raise InputError(
            f"{options.kind} needs square images whose side divides by {halvings} (network.channel_mult has "
            f"{len(options.channel_mult)} levels), the data is {height}×{width}: pack it at another --resolution"
        )
    arguments = options.model_dump(exclude={"kind"})
    if not dropout:
        arguments |= {"dropout": 0.0, "label_dropout": 0.0}
    build = {"song_unet": SongUNet, "dhariwal_unet": DhariwalUNet}[options.kind]
    return build(
        img_resolution=height, in_channels=channels, out_channels=channels, conditioned=conditioned, **arguments
    )


def _build_unet2d(
    options: DiffusersUNetOptions, sample_shape: tuple[int, ...], dropout: bool, conditioned: bool
) -> torch.nn.Module:
    from rdmd_fast.networks.diffusers_unet import UNet2D

    halvings = 2 ** (len(options.unet.block_out_channels) - 1)
    channels, *sides = sample_shape
    if len(sides) != 2 or channels != options.unet.in_channels or any(side % halvings for side in sides):
        raise InputError(
            f"the diffusers network takes {options.unet.in_channels} channels and sides that divide by {halvings}, the "
            f"data has shape {tuple(sample_shape)}: pack it at another --resolution"
        )
    return UNet2D(options, dropout, conditioned)


def _build_text_network(
    options: TextOptions, sample_shape: tuple[int, ...], dropout: bool, conditioned: bool
) -> torch.nn.Module:
    from rdmd_fast.networks.text_network import TextNetwork

    channels, *sides = sample_shape
    if len(sides) != 2 or channels != options.channels or any(side % options.divisor for side in sides):
        raise InputError(
            f"the pipeline's network takes latents of {options.channels} channels and sides that divide by "
            f"{options.divisor}, the data has shape {tuple(sample_shape)}: pack it by `rdmd pack --encoder "
            "PIPELINE` at another --resolution"
        )
    if options.longest and max(sides) > options.longest:
        raise InputError(
            f"the pipeline's network takes latents of sides up to {options.longest}, the data has shape "
            f"{tuple(sample_shape)}: pack it at a lower --resolution"
        )
    if conditioned:
        raise InputError("rdmd.transport_weight: a text-to-image network is of one λ only, give a number")
    return TextNetwork(options if dropout else options.without_dropout())
