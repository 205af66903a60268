"""SongUNet against a plain fp64 formulation written from the papers, and against EDM's names and shapes."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rdmd_fast.errors import InputError
from rdmd_fast.kernels.group_norm_silu import group_norm_silu
from rdmd_fast.networks.song_unet import SongUNet
from rdmd_fast.networks.unet_layers import Conv2d, UNetBlock, attention

from .unet_reference import PlainSongUNet, assert_gradients_match_finite_differences, inputs, randomised, silu

DDPMPP = dict(
    img_resolution=16, in_channels=3, out_channels=3, augment_dim=9, model_channels=32, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[8], dropout=0.0,
)  # fmt: skip
NCSNPP = DDPMPP | dict(
    embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]
)
# The shrunken image enters every level, and every level adds to the output.
SKIPPING = DDPMPP | dict(encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1])
SMALL = dict(img_resolution=8, model_channels=8, channel_mult=[1, 2, 2], attn_resolutions=[4], label_dim=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def song(config: dict, dtype=torch.float64) -> SongUNet:
    return randomised(SongUNet(**config), dtype)


@pytest.mark.parametrize("config", [
    DDPMPP, NCSNPP, DDPMPP | SMALL, NCSNPP | SMALL, SKIPPING, SKIPPING | SMALL | dict(resample_filter=[1, 1]),
    SKIPPING | SMALL | dict(encoder_type="residual"), NCSNPP | SMALL | dict(encoder_type="skip"),
], ids=[
    "ddpmpp", "ncsnpp", "ddpmpp-class", "ncsnpp-class", "skip", "skip-box", "residual-to-skip", "skip-in-only",
])  # fmt: skip
def test_network_equals_plain_formulation(config):
    network, call = song(config), inputs(config)
    expected = PlainSongUNet(network, config)(**call)
    with torch.no_grad():
        actual = network(**call)
    # Frequencies are fp32 whatever the network's dtype, hence not 1e-12.
    assert (actual - expected).norm() < 2e-6 * expected.norm()
    with torch.no_grad():
        single = network.float()(**{name: value.float() for name, value in call.items()})
    assert single.dtype == torch.float32
    assert (single - expected).norm() < 2e-5 * expected.norm()


def edm_shapes() -> dict[str, tuple[int, ...]]:
    lines = (Path(__file__).parent / "ddpmpp_16_state_dict.txt").read_text().splitlines()
    return {name: tuple(map(int, shape.split("x"))) for name, shape in map(str.split, lines)}


def test_ddpmpp_state_dict_has_edm_names_and_shapes():
    assert {name: tuple(value.shape) for name, value in SongUNet(**DDPMPP).state_dict().items()} == edm_shapes()


def test_ncsnpp_state_dict_has_edm_names_and_shapes():
    expected = {name: (1, 1, 4, 4) if "resample" in name else shape for name, shape in edm_shapes().items()}
    expected |= {
        "map_noise.freqs": (32,),
        "map_augment.weight": (64, 9),
        "map_layer0.weight": (128, 64),
        "enc.8x8_aux_residual.weight": (32, 3, 3, 3),
        "enc.8x8_aux_residual.bias": (32,),
        "enc.8x8_aux_residual.resample_filter": (1, 1, 4, 4),
    }
    assert {name: tuple(value.shape) for name, value in SongUNet(**NCSNPP).state_dict().items()} == expected


def test_skip_state_dict_has_edm_names_and_shapes():
    """aux_down and aux_up only resample; each level above the innermost has them, and every level its own output."""
    config = dict(img_resolution=16, in_channels=3, out_channels=2, model_channels=8, channel_mult=[1, 2, 2])
    network = SongUNet(**config, encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1])
    expected = {}
    for size, entering in ((8, 8), (4, 16)):
        expected[f"enc.{size}x{size}_aux_down.resample_filter"] = (1, 1, 4, 4)
        expected[f"enc.{size}x{size}_aux_skip.weight"] = (entering, 3, 1, 1)
        expected[f"enc.{size}x{size}_aux_skip.bias"] = (entering,)
    for size, width in ((4, 16), (8, 16), (16, 8)):
        if size > 4:
            expected[f"dec.{size}x{size}_aux_up.resample_filter"] = (1, 1, 4, 4)
        expected |= {f"dec.{size}x{size}_aux_norm.{part}": (width,) for part in ("weight", "bias")}
        expected[f"dec.{size}x{size}_aux_conv.weight"] = (2, width, 3, 3)
        expected[f"dec.{size}x{size}_aux_conv.bias"] = (2,)
    state = network.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if "aux" in name} == expected
    names = [name.removeprefix("16x16_") for name in network.dec if name.startswith("16x16_")]
    assert names[0] == "up" and names[-3:] == ["aux_up", "aux_norm", "aux_conv"]


def test_edm_64_pixel_configuration_has_its_published_size():
    with torch.device("meta"):
        network = SongUNet(64, 3, 3, augment_dim=9, channel_mult=[1, 2, 2, 2])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 61.8
    assert sum("resample_filter" in name for name, _ in network.named_buffers()) == 12


@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_silu_matches_fp64_moments(modulated):
    x, w, b = torch.randn(3, 12, 5, 7) * 4 + 9, torch.randn(12), torch.randn(12)
    scale, shift = (torch.randn(3, 12), torch.randn(3, 12)) if modulated else (None, None)
    grouped = x.double().reshape(3, 4, -1)
    std = (grouped.var(2, keepdim=True, correction=0) + 1e-3).sqrt()
    expected = ((grouped - grouped.mean(2, keepdim=True)) / std).reshape(x.shape)
    expected = expected * w[:, None, None] + b[:, None, None]
    if modulated:
        expected = expected * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    actual = group_norm_silu(x, w, b, 4, 1e-3, scale, shift)
    torch.testing.assert_close(actual.double(), silu(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 5, 0]])
@pytest.mark.parametrize("way", ["up", "down", "fused"])
def test_resampling_convolutions_equal_explicit_filters(kernel, taps, way):
    layer = Conv2d(4, 6, kernel, taps=taps, up=way == "up", down=way != "up", fused=way == "fused").double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 6, 10, dtype=torch.float64)
    row = torch.tensor(taps, dtype=torch.float64)
    smoothing, pad = row.outer(row) / row.sum() ** 2, (len(taps) - 1) // 2

    def smooth(y, padding, transpose=False):
        bank = smoothing.repeat(y.shape[1], 1, 1, 1)
        convolve = F.conv_transpose2d if transpose else F.conv2d
        return convolve(y, 4 * bank if transpose else bank, stride=2, padding=padding, groups=y.shape[1])

    if way == "fused":
        expected = smooth(F.conv2d(x, layer.weight, layer.bias, padding=kernel // 2 + pad), 0)
    else:
        expected = F.conv2d(smooth(x, pad, way == "up"), layer.weight, layer.bias, padding=kernel // 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # the filter buffer is fp32


@pytest.mark.parametrize("config", [DDPMPP | SMALL, NCSNPP | SMALL, SKIPPING | SMALL], ids=["ddpmpp", "ncsnpp", "skip"])
def test_gradients_match_finite_differences(config):
    assert_gradients_match_finite_differences(song(config), inputs(config, batch=2))


def test_samples_do_not_influence_each_other():
    network, call = song(NCSNPP | SMALL), inputs(NCSNPP | SMALL)
    with torch.no_grad():
        together = network(**call)
        alone = [network(**{name: value[i : i + 1] for name, value in call.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
    changed = call["x"].clone()
    changed[1] += 1
    with torch.no_grad():
        others = network(**call | dict(x=changed))
    assert not torch.equal(others[1], together[1])
    torch.testing.assert_close(others[[0, 2]], together[[0, 2]], rtol=0, atol=1e-12)


def test_initial_output_is_near_zero_and_residual_branches_are_almost_closed():
    network = SongUNet(**DDPMPP)
    x = torch.randn(2, 3, 16, 16)
    assert network(x, torch.zeros(2)).abs().max() < 1e-3
    block = next(layer for layer in network.enc.values() if isinstance(layer, UNetBlock))
    h = torch.randn(2, 32, 16, 16)
    torch.testing.assert_close(block(h, block.affine(torch.randn(2, 128))), h * math.sqrt(0.5), rtol=0, atol=1e-3)
    qkv = network.dec["8x8_in0"].qkv.weight.detach()
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(0.2 * 6 / (64 + 192)), rel=1e-2)


def test_no_class_means_zero_labels_and_label_dropout_only_acts_in_training():
    network = song(DDPMPP | SMALL | dict(label_dropout=1.0))
    call = inputs(DDPMPP | SMALL)
    labelled, unlabelled = network(**call), network(**call | dict(class_labels=None))
    torch.testing.assert_close(unlabelled, network(**call | dict(class_labels=torch.zeros(3, 3))))
    assert (labelled - unlabelled).abs().max() > 1e-3
    torch.testing.assert_close(network.train()(**call), unlabelled)


@pytest.mark.parametrize("config", [DDPMPP, NCSNPP], ids=["ddpmpp", "ncsnpp"])
def test_bf16_network_keeps_input_dtype_and_exact_frequencies(config):
    network = song(config, torch.float32)
    x, c_noise = torch.randn(2, 3, 16, 16), torch.randn(2)
    with torch.no_grad():
        expected, frequencies = network(x, c_noise), network.map_noise.freqs.clone()
        actual = network.bfloat16()(x, c_noise)
    assert actual.dtype == torch.float32
    assert torch.equal(network.map_noise.freqs, frequencies)
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_memory_format_of_input_and_weights_does_not_matter():
    network, call = song(NCSNPP, torch.float32), inputs(NCSNPP)
    call = {name: value.float() for name, value in call.items()}
    expected = network(**call)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    call["x"] = call["x"].contiguous(memory_format=torch.channels_last)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(**call), expected, rtol=1e-4, atol=1e-4)


def test_traces_into_one_graph():
    network, call = song(NCSNPP | SMALL), inputs(NCSNPP | SMALL)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**call), network(**call))


@pytest.mark.parametrize(("change", "key"), [
    (dict(embedding_type="sine"), "embedding_type"),
    (dict(encoder_type="aux"), "encoder_type"),
    (dict(decoder_type="residual"), "decoder_type"),
    (dict(img_resolution=15), "img_resolution"),
    (dict(resample_filter=[1, 2, 1]), "resample_filter"),
    (dict(model_channels=144), "model_channels"),
])  # fmt: skip
def test_impossible_choices_are_one_line_errors(change, key):
    with pytest.raises(InputError, match=key) as error:
        SongUNet(**DDPMPP | change)
    assert "\n" not in str(error.value)


def test_new_weights_are_contiguous():
    """DeepSpeed's first broadcast refuses channels_last parameters on gloo."""
    assert all(parameter.is_contiguous() for parameter in SongUNet(**NCSNPP).parameters())


@pytest.mark.parametrize("tokens", [16, 300])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3.5e-3), (torch.float16, 4e-4)])
def test_attention_is_softmax_of_scaled_products(dtype, tolerance, tokens):
    """Against fp64, at logits of some 10, where a rounded one would show; in 16 bits few tokens go another way."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 64, generator=generator).to(dtype) for _ in range(3))
    q = 3 * q
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) / 8, dim=-1)
    expected = weights @ v.double()
    assert (attention(q, k, v) - expected).norm() < tolerance * expected.norm()
