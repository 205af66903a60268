"""Every option of the image networks reaches the network that is built."""

import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.networks import build_network
from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions
from rdmd_fast.networks.song_unet import SongUNet

SHARED = dict(
    model_channels=64, channel_mult=[2, 1, 1], channel_mult_emb=3, num_blocks=2, attn_resolutions=[8], dropout=0.3,
    label_dropout=0.2, label_dim=5, augment_dim=4,
)  # fmt: skip
SONG = SHARED | dict(
    embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", decoder_type="standard",
    resample_filter=[1, 3, 3, 1],
)  # fmt: skip


@pytest.mark.parametrize(("options", "network", "values"), [
    (SongUNetOptions(kind="song_unet", **SONG), SongUNet, SONG),
    (DhariwalUNetOptions(kind="dhariwal_unet", **SHARED), DhariwalUNet, SHARED),
])  # fmt: skip
def test_every_option_reaches_the_network(options, network, values):
    assert set(type(options).model_fields) == {"kind", *values}
    with torch.device("meta"):
        built, expected = build_network(options, (1, 16, 16)), network(16, 1, 1, **values)
        silent = build_network(options, (1, 16, 16), dropout=False)
    assert type(built) is network and (built.label_dropout, silent.label_dropout) == (0.2, 0.0)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (built, expected)]
    assert shapes[0] == shapes[1]
    assert {layer.dropout for layer in built.modules() if hasattr(layer, "dropout")} == {0.3}
    assert {layer.dropout for layer in silent.modules() if hasattr(layer, "dropout")} == {0.0}


@pytest.mark.parametrize("kind", [SongUNetOptions(kind="song_unet"), DhariwalUNetOptions(kind="dhariwal_unet")])
@pytest.mark.parametrize("shape", [(2,), (3, 16, 24), (3, 6, 6)])
def test_data_that_an_image_network_cannot_take(kind, shape):
    with pytest.raises(InputError, match=kind.kind):
        build_network(kind, shape)
