"""Operations under torch.compile beside the same ones as written.

Not collected by itself: test_compile.py runs it in a process of its own, where the stand-in is in place.
"""

import pytest
import torch

from rdmd_fast.kernels.group_norm_silu import group_norm_silu, plan_resident
from tests.gpu_stand_in.device import recording
from tests.gpu_stand_in.log import LAUNCH

N, CHANNELS, SIZE, GROUPS, EPS = 2, 32, 24, 1, 1e-5
ROWS = ("scale", "shift", "addend")


def tensors(dtype, names):
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (CHANNELS,), "bias": (CHANNELS,), "x_bias": (CHANNELS,), **dict.fromkeys(ROWS, (N, CHANNELS))}
    x = torch.randn(N, CHANNELS, SIZE, SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
    drawn = {"x": x, **{name: torch.randn(shapes[name], generator=generator) for name in names}}
    return {name: each.to("cuda", dtype).requires_grad_() for name, each in drawn.items()}


def gradients(call, inputs, dy):
    y = call(groups=GROUPS, eps=EPS, **inputs)
    return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), dy)]


# Relative, of all elements of a tensor together: fp32 sums 18,432 numbers in another order; bf16 rounds results, 2^-9.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("modulation", [("addend", "x_bias"), ("scale", "shift")])
def test_a_norm_whose_gradient_inductor_applies(dtype, tolerance, modulation):
    shape = N, CHANNELS, SIZE * SIZE
    assert plan_resident(shape, GROUPS, dtype.itemsize, True, 2) is None  # else one kernel does all of it
    inputs = tensors(dtype, ("weight", "bias", *modulation))
    dy = torch.linspace(-1, 1, inputs["x"].numel()).reshape(inputs["x"].shape).to("cuda", dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    written = gradients(group_norm_silu, inputs, dy)
    with recording() as log:
        compiled = gradients(torch.compile(group_norm_silu), inputs, dy)
    launched = {operation for kind, operation, _ in log.operations if kind == LAUNCH}
    assert "triton::gradient_table_kernel" in launched and "triton::gradient_apply_kernel" not in launched
    for name, found, expected in zip(("y", *inputs), compiled, written, strict=True):
        assert found.dtype == expected.dtype and found.stride() == expected.stride(), name
        assert float((found - expected).float().norm() / expected.float().norm()) < tolerance, name
