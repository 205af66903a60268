"""Passes over memory outside the convolutions, and that both sides of the benchmark compute the same function."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import networks, plain_networks
from benchmarks.plain_networks import PlainUNet
from benchmarks.traffic import network_traffic
from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
from rdmd_fast.networks.song_unet import SongUNet

SMALL = dict(img_resolution=8, in_channels=3, out_channels=3, num_blocks=1, attn_resolutions=[4], dropout=0.0)
CASES = {
    "digits": networks.CASES["digits"],
    "ncsnpp": lambda: SongUNet(
        **SMALL, model_channels=32, channel_mult=[1, 2], embedding_type="fourier", encoder_type="residual",
        channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
    ),
    "adm": lambda: DhariwalUNet(**SMALL, model_channels=64, channel_mult=[1, 2]),
}  # fmt: skip


def bytes_of_shapes(case: str, batch: int) -> list[int]:
    """``network_traffic`` of ours and the plain formulation in bf16, of shapes alone: nothing is computed."""
    counts = []
    for formulation, layout in ((lambda network: network, torch.channels_last), (PlainUNet, torch.contiguous_format)):
        with FakeTensorMode():
            network = networks.CASES[case]()
            for layer in network.modules():
                for name, parameter in layer._parameters.items():
                    if parameter is not None:
                        images = parameter.ndim == 4
                        memory_format = layout if images else torch.preserve_format
                        value = parameter.detach().to(torch.bfloat16, memory_format=memory_format)
                        layer._parameters[name] = nn.Parameter(value)
            counts.append(network_traffic(networks.Step(network, formulation(network), batch, torch.bfloat16)))
    return counts


def test_half_the_bytes_of_the_plain_formulation_outside_convolutions():
    """At a training batch, where what moves once a step (kernels of transposed convolutions, say) weighs little."""
    ours, plain = bytes_of_shapes("songunet64", 16)
    assert plain >= 2 * ours
    # A second look at the yardstick: an image's activation of 128 channels at 64 x 64 is 1 MiB.
    assert 900 < plain / 16 / 2**20 < 1100


def test_bytes_of_shapes_are_those_of_a_step():
    counts = bytes_of_shapes("digits", 2)
    for count, step in zip(counts, networks.steps("digits", 2, "bf16"), strict=True):
        assert count == pytest.approx(network_traffic(step), rel=0.02)


@pytest.mark.parametrize("dtype", networks.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_plain_formulation(case, dtype, monkeypatch):
    monkeypatch.setattr(networks, "CASES", CASES)
    networks.check_equal(case, dtype)


def test_unequal_networks_are_not_timed(monkeypatch):
    attention = plain_networks.attention
    monkeypatch.setattr(plain_networks, "attention", lambda layer, x: 0.99 * attention(layer, x))
    with pytest.raises(RuntimeError, match="outputs differ"):
        networks.check_equal("digits", "fp32")
