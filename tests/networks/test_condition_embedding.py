"""A network that is told a number by sample: it starts as the network without, and learns what the number means."""

import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.weights import load_teacher_weights
from rdmd_fast.networks import build_network
from rdmd_fast.networks.condition_embedding import ConditionEmbedding, conditioning_weights
from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions
from rdmd_fast.networks.options import AffineOptions, DhariwalUNetOptions, MLPOptions, SongUNetOptions

SMALL = dict(model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.0, label_dim=3)
UNET = dict(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=[32], layers_per_block=1,
    down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], norm_num_groups=8, num_class_embeds=3,
)  # fmt: skip
KINDS = {
    "mlp": (MLPOptions(kind="mlp", hidden=16, depth=2, embedding=8), (2,)),
    "song_unet": (SongUNetOptions(kind="song_unet", **SMALL), (3, 8, 8)),
    "dhariwal_unet": (DhariwalUNetOptions(kind="dhariwal_unet", **SMALL), (3, 8, 8)),
    "diffusers_unet": (DiffusersUNetOptions.model_validate({"unet": UNET, "schedule": {"kind": "vp"}}), (3, 8, 8)),
}


def pair(kind):
    """(teacher, network told a condition that has its weights, samples, noise levels, labels)."""
    options, shape = KINDS[kind]
    torch.manual_seed(0)
    teacher = build_network(options, shape, dropout=False)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    conditioned = build_network(options, shape, dropout=False, conditioned=True)
    load_teacher_weights(conditioned, teacher.state_dict(), "here")
    labels = None if kind == "mlp" else torch.eye(3)[[0, 1, 2, 0]]
    return teacher.eval(), conditioned.eval(), torch.randn(4, *shape), torch.linspace(-1, 0.5, 4), labels


CONDITION = torch.tensor([-1.0, -0.3, 0.4, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_teachers_weights_it_is_the_teacher_bit_for_bit(kind):
    teacher, conditioned, x, c_noise, labels = pair(kind)
    expected = teacher(x, c_noise, labels)
    assert expected.std() > 1e-3
    for condition in (None, CONDITION):
        assert torch.equal(conditioned(x, c_noise, labels, condition=condition), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_answers_to_its_own_condition_once_trained(kind):
    _, conditioned, x, c_noise, labels = pair(kind)
    torch.nn.init.normal_(conditioned.map_condition.layer1.weight, std=0.1)
    together = conditioned(x, c_noise, labels, condition=CONDITION)
    for sample in range(4):
        one = slice(sample, sample + 1)
        alone = conditioned(x[one], c_noise[one], None if labels is None else labels[one], condition=CONDITION[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)
    moved = conditioned(x, c_noise, labels, condition=CONDITION.flip(0))
    assert (moved - together).flatten(1).abs().amax(1).min() > 1e-4
    zeros = conditioned(x, c_noise, labels, condition=torch.zeros(4))
    assert torch.equal(conditioned(x, c_noise, labels), zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_the_condition_learns(kind):
    _, conditioned, x, c_noise, labels = pair(kind)
    optimizer = torch.optim.Adam(conditioned.map_condition.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in conditioning_weights(conditioned).items()}
    for _ in range(2):  # behind zeros the first layer has no gradient in the first step
        optimizer.zero_grad()
        conditioned(x, c_noise, labels, condition=CONDITION).square().sum().backward()
        optimizer.step()
    after = conditioning_weights(conditioned)
    assert len(after) == 4 and all((after[name] - before[name]).abs().max() > 1e-3 for name in after)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_conditions_layers_may_be_missing(kind):
    teacher, conditioned, *_ = pair(kind)
    weights = dict(teacher.state_dict())
    assert {*conditioned.state_dict()} - {*weights} == {*conditioning_weights(conditioned)}
    lost = weights.pop(next(iter(weights)))
    with pytest.raises(InputError, match="has no weight"):
        load_teacher_weights(conditioned, weights, "here")
    with pytest.raises(InputError, match="has no place"):
        load_teacher_weights(conditioned, teacher.state_dict() | {"another": lost}, "here")


def test_an_affine_map_takes_none():
    with pytest.raises(InputError, match="takes no condition"):
        build_network(AffineOptions(kind="affine"), (2,), conditioned=True)


def test_features_stay_exact_in_a_network_of_16_bits():
    torch.manual_seed(0)
    exact = ConditionEmbedding(8)
    torch.nn.init.normal_(exact.layer1.weight)
    rounded = ConditionEmbedding(8)
    rounded.load_state_dict(exact.state_dict())
    rounded = rounded.bfloat16()
    assert torch.equal(rounded.frequencies, exact.frequencies)
    found = rounded(CONDITION, torch.zeros(4))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact(CONDITION, torch.zeros(4)), rtol=0.05, atol=0.05)
