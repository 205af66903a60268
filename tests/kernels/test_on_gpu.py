"""That the compiled kernels are right on this GPU: noise bit-equal to the CPU's, each kernel against its reference.

    pytest tests/kernels/test_on_gpu.py
    TRITON_INTERPRET=1 pytest tests/kernels/test_on_gpu.py
    python -m pytest -p tests.gpu_stand_in.plugin tests/kernels/test_on_gpu.py

The second line runs the same under Triton's interpreter, the third on PTX for sm_90 that is interpreted: both at small
shapes only.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from benchmarks.timing import CUDA, DEVICE
from rdmd_fast.diffusion import DiffusionOptions, Reading, coefficients
from rdmd_fast.kernels import _dispatch, philox
from rdmd_fast.kernels.coefficients import ROWS, Coefficients
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.ema_update import ema_update
from rdmd_fast.kernels.group_norm_silu import branching_group_norm_silu, group_norm_silu
from rdmd_fast.kernels.image_normalize import image_normalize
from rdmd_fast.kernels.noise_forward import CounterNoise, generator_noise_forward, noise_forward
from rdmd_fast.kernels.rdmd_gradient import COSTS, WEIGHTINGS, generator_gradient
from rdmd_fast.kernels.scaled_residual import scaled_residual
from rdmd_fast.networks import build_network
from rdmd_fast.networks.options import DhariwalUNetOptions

pytestmark = pytest.mark.skipif(not (CUDA or _dispatch.INTERPRETED), reason="no GPU, and no interpreter")

LARGE = CUDA and "GPU_STAND_IN" not in os.environ  # what is interpreted takes milliseconds for each block
SHAPES = [(3, 2), (2, 7, 5, 3), (1, 3, 8, 8), (2, 3, 33, 31)] + [(5, 4, 64, 64), (3, 3, 256, 256)] * LARGE
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED, STREAM = 2**40 + 1, 7
READING = Reading(0.2, 1.0, 0.45, 0.0)


def random(shape, seed, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def on_device(argument):
    if isinstance(argument, torch.Tensor):
        return argument.to(DEVICE)
    if isinstance(argument, Coefficients):
        return Coefficients(argument.rows.to(DEVICE))
    if isinstance(argument, CounterNoise):
        return argument._replace(positions=argument.positions.to(DEVICE))
    return argument


def both(monkeypatch, function, *arguments, **named):
    """(Triton's results, the reference's on the CPU), each a flat list of tensors on the CPU."""
    results = []
    for backend, place in (("triton", on_device), ("reference", lambda argument: argument)):
        monkeypatch.setenv("RDMD_KERNELS", backend)
        placed = {name: place(argument) for name, argument in named.items()}
        leaves = torch.utils._pytree.tree_leaves(function(*map(place, arguments), **placed))
        results.append([leaf.cpu() for leaf in leaves if leaf is not None])
    return results


def assert_close(results, expected):
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == right.dtype and result.shape == right.shape
        # The interpreter cuts bf16 off where hardware rounds: one unit in the last place.
        tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[result.dtype]
        scale = float(right.float().abs().max())
        torch.testing.assert_close(result, right, rtol=tolerance, atol=tolerance * scale / 4)


def table_and_noise(n, weighting="uniform"):
    sigma = torch.logspace(-1, 1, n, dtype=torch.float64)
    table = coefficients(sigma, DiffusionOptions(), weighting)
    return table, CounterNoise(SEED, STREAM, torch.arange(n) + 2**33 - 1)


@pytest.mark.parametrize("seed", [0, SEED, 2**64 - 1])
@pytest.mark.parametrize(("n", "count"), [(1024 if LARGE else 16, 1024), (7, 1), (3, 4102), (67, 6)])
def test_noise_has_the_bits_of_the_cpu(monkeypatch, seed, n, count):
    draw = functools.partial(philox.normal, seed, STREAM, count=count)
    for first in (0, 2**32 - 3, 2**33):
        (result,), (expected,) = both(monkeypatch, draw, torch.arange(n) + first)
        assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_inside_a_kernel_has_the_bits_of_the_cpu(monkeypatch, shape):
    table, noise = table_and_noise(shape[0])
    rows = torch.zeros_like(table.rows)
    rows[ROWS.index("sigma")] = rows[ROWS.index("c_in")] = 1  # alpha = 0: what comes out is the noise itself
    results, expected = both(monkeypatch, noise_forward, random(shape, 1), noise=noise, table=Coefficients(rows))
    assert torch.equal(results[0].view(torch.int32), expected[0].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_noising(monkeypatch, shape, dtype):
    table, noise = table_and_noise(shape[0])
    drawn = {"noise": noise, "table": table}
    assert_close(*both(monkeypatch, noise_forward, random(shape, 1), **drawn, dtype=dtype, return_state=True))
    samples = random(shape, 1, dtype), random(shape, 2)
    assert_close(*both(monkeypatch, generator_noise_forward, *samples, reading=READING, **drawn))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(monkeypatch, shape, weighting, cost):
    table, noise = table_and_noise(shape[0], weighting)
    options = {"x": random(shape, 5), "noise": noise, "table": table, "weighting": weighting, "cost": cost}

    def of_generator(**given):
        gradient, statistics = generator_gradient(**given)
        return gradient, statistics.score_gradient_square, statistics.transport_cost

    for dtype in DTYPES:
        given = {"f_real": random(shape, 1, dtype), "f_fake": random(shape, 2, dtype), **options}
        given |= {"f_generator": random(shape, 3, dtype), "reading": READING}
        at_hand = READING.skip * given["x"] + READING.scale * given["f_generator"].float()
        assert_close(*both(monkeypatch, of_generator, **given, y=at_hand, transport_weight=0.3))
        for weight in (0.3, torch.linspace(0.05, 2, shape[0])):
            assert_close(*both(monkeypatch, of_generator, **given, transport_weight=weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_denoising(monkeypatch, shape, dtype):
    table, noise = table_and_noise(shape[0])
    samples = random(shape, 1, dtype), random(shape, 2)
    assert_close(*both(monkeypatch, denoising_gradient, *samples, noise=noise, table=table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (2, 32, 7, 9)] + [(2, 128, 64, 64), (3, 256, 16, 16)] * LARGE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalization_forward_and_backward(monkeypatch, shape, modulated, channels_last, dtype):
    n, channels = shape[:2]
    x, dy = random(shape, 1, dtype), random(shape, 2, dtype)
    if not channels_last:
        x, dy = x.contiguous(), dy.contiguous()
    modulation = [random((n, channels), seed, dtype) for seed in (5, 6)] if modulated else [None, None]
    addend = [None] if modulated else [random((n, channels), 7, dtype)]
    x_bias = random((channels,), 8)

    def forward_and_backward(dy, *inputs):
        inputs = [part if part is None else part.detach().requires_grad_() for part in inputs]
        x, weight, bias, x_bias, *rest = inputs
        y = group_norm_silu(x, weight, bias, min(32, channels // 4), 1e-5, *rest, x_bias=x_bias)
        return y.detach(), torch.autograd.grad(y, [part for part in inputs if part is not None], dy)

    inputs = x, random((channels,), 3), random((channels,), 4), x_bias, *modulation, *addend
    assert_close(*both(monkeypatch, forward_and_backward, dy, *inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (2, 32, 7, 9)] + [(2, 128, 64, 64)] * LARGE)
def test_residual_block_ways(monkeypatch, shape, dtype):
    """The norm with another branch, and the residual sum, also for the gradient of a slice of channels."""
    channels = shape[1]

    def forward_and_backward(x, weight, bias, first, second, gradient):
        leaves = x, first, second = [part.detach().requires_grad_() for part in (x, first, second)]
        y, past = branching_group_norm_silu(x, weight, bias, channels // 4, 1e-5)
        total = torch.cat([scaled_residual(y * 1, past, 0.5**0.5, [first, second]), past], dim=1)
        return total.detach(), torch.autograd.grad(total, leaves, gradient)

    n, _, height, width = shape
    arguments = random(shape, 1, dtype), random((channels,), 2), random((channels,), 3)
    arguments += tuple(random((channels,), seed, dtype) for seed in (5, 6))
    gradient = random((n, 2 * channels, height, width), 4, dtype)
    assert_close(*both(monkeypatch, forward_and_backward, *arguments, gradient))


@pytest.mark.skipif(not CUDA, reason="whole networks are slow under the interpreter")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["digits"] + ["songunet64", "adm64"] * LARGE)
def test_networks_equal_their_plain_formulation(case, dtype):
    from benchmarks.networks import check_equal

    check_equal(case, dtype)


@pytest.mark.skipif(not CUDA, reason="whole networks are slow under the interpreter")
def test_a_network_whose_embedding_scales_and_shifts(monkeypatch):
    options = DhariwalUNetOptions(
        kind="dhariwal_unet", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0
    )

    def outputs_and_gradients(x, c_noise, gradient):
        network = build_network(options, (3, 8, 8))
        for seed, parameter in enumerate(network.parameters()):
            width = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.data = random(parameter.shape, seed).contiguous() * width**-0.5 + (parameter.ndim == 1)
        network.to(x.device)
        y = network(x, c_noise)
        return y.detach(), torch.autograd.grad(y, list(network.parameters()), gradient)

    inputs = random((2, 3, 8, 8), 1), torch.tensor([-0.5, 0.5]), random((2, 3, 8, 8), 2)
    (y, *gradients), (right, *exact) = both(monkeypatch, outputs_and_gradients, *inputs)
    assert_close([y], [right])
    for gradient, expected in zip(gradients, exact, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_averaging(monkeypatch):
    sizes = (1, 7, 1000, 4096) + (2**20 + 3,) * LARGE

    def averaged(*tensors):
        averages = [tensor.clone() for tensor in tensors[: len(sizes)]]
        ema_update(averages, list(tensors[len(sizes) :]), 0.01)
        return averages

    tensors = [random((size,), seed) for seed in (1, 2) for size in sizes]
    assert_close(*both(monkeypatch, averaged, *tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (3, 1, 7, 5)] + [(4, 3, 256, 256)] * LARGE)
def test_normalizing(monkeypatch, shape, flip, dtype):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)

    def normalized(images, positions):
        return image_normalize(images, dtype, CounterNoise(SEED, STREAM, positions) if flip else None)

    assert_close(*both(monkeypatch, normalized, images, torch.arange(len(images))))
