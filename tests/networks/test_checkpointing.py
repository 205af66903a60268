"""Activation checkpointing of the image networks: the same numbers from fewer stored activations."""

import pytest
import torch

from rdmd_fast.networks import unet_layers
from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
from rdmd_fast.networks.song_unet import SongUNet
from rdmd_fast.networks.unet_layers import UNetBlock

from .unet_reference import inputs, randomised

CONFIG = dict(
    img_resolution=8, in_channels=3, out_channels=3, label_dim=3, model_channels=64, channel_mult=[1, 1],
    num_blocks=1, attn_resolutions=[4],
)  # fmt: skip
EVERY_LAYER = dict(encoder_type="residual", decoder_type="skip", resample_filter=[1, 3, 3, 1])
NETWORKS = {
    "song": lambda **changes: SongUNet(**CONFIG, **EVERY_LAYER, **changes),
    "adm": lambda **changes: DhariwalUNet(**CONFIG, **changes),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def build(request):
    return lambda **changes: randomised(request.param(**changes), torch.float32)


@pytest.fixture
def call():
    return {name: value.float() for name, value in inputs(CONFIG).items()}


def stored_and_results(network, call):
    """Bytes that the forward pass keeps for the backward pass, the output and all gradients."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network.zero_grad()
    x = call["x"].clone().requires_grad_()
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(**call | dict(x=x))
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    output.square().sum().backward()
    stored = sum(size for address, size in storages.items() if address not in own)
    return stored, [output.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_same_output_and_gradients_from_fewer_stored_bytes(build, call, dropout):
    network = build(dropout=dropout).train()
    stored, expected = stored_and_results(network, call)
    network.checkpointing = True
    fewer, actual = stored_and_results(network, call)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert 0 < fewer < 0.25 * stored


def test_blocks_are_computed_again_only_where_gradients_are_wanted_in_training(build, call, monkeypatch):
    layers, original = [], unet_layers.checkpoint

    def recorded(layer, *arguments, **keywords):
        layers.append(layer)
        return original(layer, *arguments, **keywords)

    monkeypatch.setattr(unet_layers, "checkpoint", recorded)
    network = build(dropout=0.0)
    network.checkpointing = True
    network.eval()(**call)
    with torch.no_grad():
        network.train()(**call)
    assert not layers
    network(**call)
    assert layers == [layer for layer in network.modules() if isinstance(layer, UNetBlock)]
