"""The Triton kernels under the interpreter: test_scaled_residual.py runs this file in a process of its own."""

import pytest
import torch

from rdmd_fast.kernels import _dispatch
from rdmd_fast.kernels.scaled_residual import scaled_residual

assert _dispatch.backend("cpu") == "triton"

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter truncates to bf16
SHAPES = [(2, 6, 5, 7), (1, 16, 40, 33), (3, 50, 8), (2049,), (2, 4, 1, 1)]


def operands(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.5**0.5, 1.0])
def test_sum_and_gradient_match_fp64(shape, dtype, scale):
    h, x, dy = operands(shape, dtype)
    expected = (h.double() + x.double()) * scale
    leaf_h, leaf_x = h.clone().requires_grad_(), x.clone().requires_grad_()
    y = scaled_residual(leaf_h * 1, leaf_x, scale)
    y.backward(dy)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for gradient in (leaf_h.grad, leaf_x.grad):
        torch.testing.assert_close(gradient.double(), dy.double() * scale, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("channels", [3, 8, 200])
def test_gradient_of_a_slice_of_channels_is_packed(channels):
    """What ``cat`` hands back: the channels of a wider channels_last tensor."""
    wide = torch.randn(2, 2 * channels, 5, 6).to(memory_format=torch.channels_last)
    h = torch.randn(2, channels, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    for dy in (wide[:, channels:], wide[:, :channels], wide[:, ::2], wide.transpose(2, 3)[:, :channels, :5]):
        if dy.shape != h.shape:
            continue
        y = scaled_residual(h * 1, torch.zeros_like(h), 0.25)
        (gradient,) = torch.autograd.grad(y, h, dy)
        assert torch.equal(gradient, 0.25 * dy)
        dense = torch.ops.aten.is_non_overlapping_and_dense(gradient)
        assert dense


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 16, 40, 33), (2, 200, 3, 3), (50, 24)], ids=str)
@pytest.mark.parametrize(("scale", "count"), [(0.5**0.5, 2), (1.0, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_biases_and_their_gradients_match_fp64(shape, dtype, scale, count, channels_last):
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    h, x, dy = (part.contiguous(memory_format=layout) for part in operands(shape, dtype))
    biases = [bias.requires_grad_() for bias in operands(shape[1:2], dtype, seed=1)[:count]]
    wide = [part.double().requires_grad_() for part in (h, x, *biases)]
    expected = (sum(wide[:2]) + sum(wide[2:]).view(-1, *(1,) * (len(shape) - 2))) * scale
    leaf_h, leaf_x = h.clone().requires_grad_(), x.clone().requires_grad_()
    y = scaled_residual(leaf_h * 1, leaf_x, scale, biases)
    torch.testing.assert_close(y.double(), expected, rtol=2 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    gradients = torch.autograd.grad(y, [leaf_h, leaf_x, *biases], dy)
    pixels = dy.numel() // shape[1]
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * pixels**0.5)


def test_biases_gradient_of_a_slice_of_channels():
    wide = torch.randn(2, 80, 9, 11).to(memory_format=torch.channels_last)
    h = torch.randn(2, 40, 9, 11).to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.zeros(40, requires_grad=True)
    for dy in (wide[:, 40:], wide[:, ::2]):
        dh, db = torch.autograd.grad(scaled_residual(h * 1, torch.zeros_like(h), 0.5, [bias]), (h, bias), dy)
        assert torch.equal(dh, 0.5 * dy)
        torch.testing.assert_close(db.double(), 0.5 * dy.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biases", [[torch.zeros(3)], [torch.zeros(2)] * 3], ids=["shape", "count"])
def test_biases_that_do_not_fit_are_refused(biases):
    with pytest.raises(ValueError, match="want at most two of"):
        scaled_residual(torch.zeros(3, 2), torch.zeros(3, 2), 0.5, biases)


def test_operands_in_different_layouts():
    h, x, _ = operands((2, 6, 5, 7), torch.float32)
    expected = (h + x) * 0.5
    torch.testing.assert_close(scaled_residual(h.to(memory_format=torch.channels_last), x, 0.5), expected)


def test_empty_batch():
    assert scaled_residual(torch.zeros(0, 4, 2, 2), torch.zeros(0, 4, 2, 2), 0.5).shape == (0, 4, 2, 2)
    bias = torch.ones(4, requires_grad=True)
    y = scaled_residual(torch.zeros(0, 4, 2, 2), torch.zeros(0, 4, 2, 2), 0.5, [bias])
    assert torch.equal(*torch.autograd.grad(y.sum(), bias), torch.zeros(4))


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_operands_that_differ_are_refused(x):
    with pytest.raises(ValueError, match="want both alike"):
        scaled_residual(torch.zeros(3, 2), x, 0.5)
