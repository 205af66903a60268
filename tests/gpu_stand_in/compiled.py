"""A training pass of a small network on the stand-in, as written and under torch.compile, compared; as JSON.

    python -m tests.gpu_stand_in.compiled song_unet|diffusers_unet [--dtype bf16] [--deterministic]

``--interpolate`` puts PyTorch's own operation in the place of ``repeat_pixels``, to show what that is there for.
"""

from __future__ import annotations

import argparse
import json
import warnings

from tests.gpu_stand_in import install

BATCH, SHAPE = 2, (3, 8, 8)
UNET = dict(
    sample_size=8, block_out_channels=[8, 16], down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"], norm_num_groups=4, attention_head_dim=4,
    layers_per_block=1,
)  # fmt: skip
"""Upsamples in front of a convolution and within a residual block."""


def network_options(name: str):
    from benchmarks.step_cases import network_options
    from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions, UNet2DOptions, VPSchedule

    if name == "song_unet":
        return network_options("digits")
    return DiffusersUNetOptions(unet=UNet2DOptions(**UNET), schedule=VPSchedule())


class TrainingPass:
    """Forward and backward pass of a network on fixed inputs, with weights that make every branch count."""

    def __init__(self, name: str, dtype: str):
        import torch

        from rdmd_fast.engine.options import DTYPES
        from rdmd_fast.networks import build_network

        generator = torch.Generator().manual_seed(0)
        network = build_network(network_options(name), SHAPE)
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.data = scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
        self.network = network.to("cuda", DTYPES[dtype], memory_format=torch.channels_last).train()
        self.call = self.network
        drawn = [torch.randn(BATCH, *SHAPE, generator=generator).to("cuda", DTYPES[dtype]) for _ in range(2)]
        self.x, self.gradient = drawn
        self.c_noise = torch.linspace(-1, 1, BATCH).cuda()

    def compile(self) -> None:
        import torch

        self.call = torch.compile(self.network)

    def __call__(self) -> list:
        """Output, and gradients of all parameters."""
        import torch

        output = self.call(self.x, self.c_noise)
        return [output.detach(), *torch.autograd.grad(output, list(self.network.parameters()), self.gradient)]


def largest_difference(results: list, expected: list) -> float:
    """Of any of the tensors, relative to its norm; of zero, whatever is not."""
    pairs = ((a.float().cpu(), b.float().cpu()) for a, b in zip(results, expected, strict=True))
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def compare(name: str, dtype: str) -> dict:
    from tests.gpu_stand_in.triton_driver import loaded

    training_pass = TrainingPass(name, dtype)
    written = training_pass()
    training_pass.compile()
    difference = largest_difference(training_pass(), written)
    code = (each for kernel in loaded if kernel.program.name.startswith("triton_") for each in kernel.program.code)
    return {"difference": difference, "instructions": sorted({".".join(each.parts) for each in code})}


def main() -> None:
    parser = argparse.ArgumentParser(prog="compiled")
    parser.add_argument("network", choices=("song_unet", "diffusers_unet"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--interpolate", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    install()
    if arguments.deterministic:
        from rdmd_fast.engine.determinism import make_deterministic

        make_deterministic()
    if arguments.interpolate:
        from torch.nn import functional

        from rdmd_fast.networks import diffusers_unet, unet_layers

        for module in (diffusers_unet, unet_layers):
            module.repeat_pixels = lambda x: functional.interpolate(x, scale_factor=2, mode="nearest")
    print(json.dumps(compare(arguments.network, arguments.dtype)))


if __name__ == "__main__":
    main()
