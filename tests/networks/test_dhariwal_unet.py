"""DhariwalUNet against a plain fp64 formulation written from the papers, and against EDM's names and shapes."""

import math
from pathlib import Path

import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
from rdmd_fast.networks.unet_layers import UNetBlock

from .unet_reference import PlainDhariwalUNet, assert_gradients_match_finite_differences, inputs, randomised

BASE = dict(
    img_resolution=16, in_channels=3, out_channels=3, model_channels=64, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[8], label_dim=10, dropout=0.0,
)  # fmt: skip
SMALL = BASE | dict(img_resolution=8, model_channels=32, channel_mult=[1, 2], attn_resolutions=[4], label_dim=3)
CONFIGS = {
    "imagenet-like": BASE,
    "heads-everywhere": BASE | dict(img_resolution=8, attn_resolutions=[8, 4], label_dim=0, augment_dim=9),
    "three-levels": SMALL | dict(channel_mult=[2, 2, 6], num_blocks=2, channel_mult_emb=2, augment_dim=4),
    "heads-of-80": SMALL | dict(channel_mult=[1, 5], label_dim=0),
    "no-head-fits": SMALL | dict(channel_mult=[1], attn_resolutions=[8]),
    "innermost-only": SMALL | dict(channel_mult=[1, 3, 4], attn_resolutions=[], label_dim=1),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adm(config: dict, dtype=torch.float64) -> DhariwalUNet:
    return randomised(DhariwalUNet(**config), dtype)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_network_equals_plain_formulation(config):
    network, call = adm(config), inputs(config)
    expected = PlainDhariwalUNet(network)(**call)
    # Frequencies are fp32 whatever the network's dtype, hence not 1e-12.
    for dtype, tolerance in ((torch.float64, 2e-6), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        images = dict(x=call["x"].to(torch.promote_types(dtype, torch.float32)))
        with torch.no_grad():
            actual = network.to(dtype)(**call | images)
        assert actual.dtype == images["x"].dtype
        assert (actual - expected).norm() < tolerance * expected.norm(), dtype


@pytest.mark.parametrize(("config", "heads"), [
    (BASE, {"enc.8x8_block0": 2, "dec.8x8_in0": 2, "dec.8x8_block0": 2, "dec.8x8_block1": 2}),
    (SMALL | dict(channel_mult=[2, 6], attn_resolutions=[]), {"dec.4x4_in0": 3}),
    (SMALL | dict(channel_mult=[5, 1], attn_resolutions=[8]),
     {"enc.8x8_block0": 2, "dec.8x8_block0": 2, "dec.8x8_block1": 2}),
    (CONFIGS["no-head-fits"], {}),
], ids=["imagenet-like", "innermost", "full-resolution", "too-narrow"])  # fmt: skip
def test_where_blocks_attend(config, heads):
    """At the chosen resolutions of encoder and decoder and once innermost, a head for each 64 channels."""
    network = DhariwalUNet(**config)
    found = {name: layer.heads for name, layer in network.named_modules() if getattr(layer, "qkv", None)}
    assert found == heads


def test_state_dict_has_edm_names_and_shapes():
    lines = (Path(__file__).parent / "adm_16_state_dict.txt").read_text().splitlines()
    expected = {name: tuple(map(int, shape.split("x"))) for name, shape in map(str.split, lines)}
    assert {name: tuple(value.shape) for name, value in DhariwalUNet(**BASE).state_dict().items()} == expected
    augmented = DhariwalUNet(**BASE | dict(augment_dim=9)).state_dict()
    assert {name: tuple(augmented[name].shape) for name in augmented.keys() - expected} == {
        "map_augment.weight": (64, 9)
    }


def test_edm_imagenet_64_configuration_has_its_published_size():
    with torch.device("meta"):
        network = DhariwalUNet(64, 3, 3, label_dim=1000)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 295.9
    # Three levels down and three up, each with a filter for the convolution and one for the skip.
    assert sum("resample_filter" in name for name, _ in network.named_buffers()) == 12


def test_gradients_match_finite_differences():
    config = SMALL | dict(img_resolution=4, channel_mult=[2, 1], attn_resolutions=[4], augment_dim=2)
    assert_gradients_match_finite_differences(adm(config), inputs(config, batch=2))


def test_traces_into_one_graph():
    network, call = adm(SMALL), inputs(SMALL)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**call), network(**call))


def test_samples_do_not_influence_each_other():
    network, call = adm(SMALL), inputs(SMALL)
    with torch.no_grad():
        together = network(**call)
        alone = [network(**{name: value[i : i + 1] for name, value in call.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_initial_output_is_zero_and_residual_branches_are_closed():
    network = DhariwalUNet(**BASE | dict(augment_dim=9))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(x, torch.zeros(2)), torch.zeros_like(x))
    h, embedding = torch.randn(2, 64, 16, 16), torch.randn(2, 256)
    block = network.enc["16x16_block0"]
    assert torch.equal(block(h, block.affine(embedding)), h)
    wide = torch.randn(2, 128, 8, 8)
    assert network.dec["8x8_in0"].heads and torch.equal(network.dec["8x8_in0"](wide, embedding), wide)
    assert not network.map_augment.weight.any()


def test_initial_weights_have_their_scale():
    network = DhariwalUNet(**BASE)
    assert network.map_label.weight.std().item() == pytest.approx(1, rel=0.05)
    blocks = [layer for layer in network.modules() if isinstance(layer, UNetBlock)]
    for layer in [network.map_layer0, network.dec["8x8_in0"].qkv, *(block.conv0 for block in blocks)]:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert 0.9 * bound < layer.bias.abs().max() <= bound


def test_no_class_means_zero_labels():
    network, call = adm(SMALL), inputs(SMALL)
    labelled, unlabelled = network(**call), network(**call | dict(class_labels=None))
    assert torch.equal(unlabelled, network(**call | dict(class_labels=torch.zeros(3, 3).double())))
    assert all((labelled - unlabelled).flatten(1).norm(dim=1) > 1e-2 * labelled.flatten(1).norm(dim=1))
    unconditional = adm(SMALL | dict(label_dim=0))
    assert torch.equal(unconditional(**call), unconditional(**call | dict(class_labels=None)))


def test_label_dropout_takes_the_class_of_single_samples_in_training_only():
    config = SMALL | dict(label_dropout=0.5)
    network, call = adm(config), inputs(config, batch=24)
    with torch.no_grad():
        labelled, unlabelled = network(**call), network(**call | dict(class_labels=None))
        mixed = network.train()(**call)
    kept, dropped = (
        torch.isclose(mixed, other, rtol=1e-9, atol=1e-9).flatten(1).all(1) for other in (labelled, unlabelled)
    )
    assert torch.equal(kept, ~dropped)
    assert 4 < kept.sum() < 20  # 12 ± 2.4


def test_dropout_acts_in_training_only():
    config = SMALL | dict(dropout=0.5)
    network, call = adm(config), inputs(config)
    with torch.no_grad():
        assert torch.equal(network(**call), adm(SMALL)(**call))
        trained = network.train()(**call)
        torch.manual_seed(0)
        assert not torch.allclose(network(**call), trained)


@pytest.mark.parametrize(("change", "key"), [
    (dict(img_resolution=15), "img_resolution"),
    (dict(img_resolution=12, channel_mult=[1, 1, 1, 1]), "img_resolution"),
    (dict(model_channels=144), "model_channels"),
    (dict(model_channels=2), "model_channels"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_one_line_errors(change, key):
    with pytest.raises(InputError, match=key) as error:
        DhariwalUNet(**BASE | change)
    assert "\n" not in str(error.value)
