import math

import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.networks.mlp import MLP, AffineMap


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_mlp_starts_at_zero_and_keeps_shape_and_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        output = MLP(dim=3, label_dim=2)(torch.randn(5, 3, dtype=dtype), torch.randn(5))
        assert output.dtype == dtype and output.shape == (5, 3)
        assert not output.any()


def test_mlp_equals_layers_with_noise_biases_written_out():
    network = MLP(dim=2, hidden=16, depth=2, embedding=4, label_dim=3).double()
    torch.nn.init.normal_(network.output_layer.weight)
    x, c_noise = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    labels = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    angles = 2 * math.pi * c_noise[:, None] * torch.tensor([1 / 8, 4], dtype=torch.float64)
    features = torch.cat([angles.sin(), angles.cos(), labels], dim=1)
    state, h = network.state_dict(), x
    for i in range(2):
        rows = slice(16 * i, 16 * (i + 1))
        h = h @ state[f"hidden_layers.{i}.weight"].T + features @ state["conditioning.weight"][rows].T
        h = h + state["conditioning.bias"][rows]
        h = h * torch.sigmoid(h)
    sigma = torch.exp(4 * c_noise)[:, None]
    expected = (h @ state["output_layer.weight"].T + state["output_layer.bias"]) * sigma / (1 + sigma**2).sqrt()
    torch.testing.assert_close(network(x, c_noise, labels), expected, rtol=1e-5, atol=1e-5)  # fp32 frequencies
    torch.testing.assert_close(network(x, c_noise), network(x, c_noise, torch.zeros(6, 3)))


def test_mlp_has_no_random_or_saved_buffers():
    first, second = MLP(), MLP()
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert set(first.state_dict()) == {name for name, _ in first.named_parameters()}


def test_mlp_learns_a_target_that_depends_on_the_noise_level():
    """x / (1 + sigma^2) at c_noise = ln(sigma) / 4 is a Gaussian's denoiser; its variance is some 0.2."""
    network = MLP(hidden=64, embedding=32)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(400):
        x, sigma = torch.randn(256, 2), torch.exp(1.2 * torch.randn(256))
        loss = (network(x, sigma.log() / 4) - x / (1 + sigma**2)[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2e-3


@pytest.mark.parametrize("change", [dict(depth=0), dict(embedding=5), dict(dim=0)])
def test_mlp_refuses_impossible_sizes(change):
    with pytest.raises(InputError, match=next(iter(change))):
        MLP(**change)


def test_affine_map_starts_as_a_scaled_rotation():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor([[0.0, 1.5], [-3.0, 0.0]])
    torch.testing.assert_close(AffineMap(scale=1.5, angle=90)(x, torch.zeros(2)), expected)
    torch.testing.assert_close(AffineMap(dim=5, scale=0.5)(torch.ones(3, 5)), torch.full((3, 5), 0.5))
    with pytest.raises(InputError, match="dim=2"):
        AffineMap(dim=3, angle=10)


def test_affine_map_applies_matrix_then_offset():
    layer = AffineMap(dim=3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(4, 3)
    expected = torch.stack([layer.weight @ row + layer.bias for row in x])
    torch.testing.assert_close(layer(x, None, None, None), expected)


def test_weights_of_16_bits_beside_buffers_of_32():
    """DeepSpeed casts parameters and leaves buffers: the phases of the noise level stay exact."""
    torch.manual_seed(0)
    network = MLP(dim=2, hidden=16, depth=2)
    torch.nn.init.normal_(network.output_layer.weight)
    x, c_noise = torch.randn(4, 2), torch.randn(4)
    exact = network(x, c_noise)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    rounded = network(x.bfloat16(), c_noise)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
