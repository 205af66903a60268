import os
import subprocess
import sys

import pytest
import torch

from rdmd_fast.kernels.group_norm_silu import group_norm_silu


def modulated(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 6, 3, 4), (6,), (6,), (2, 6), (2, 6), (2, 6)]
    x, weight, bias, scale, shift, addend = (
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    )
    return x, weight, bias, 2, 1e-3, scale, shift, addend


@pytest.mark.parametrize("silu", [True, False])
def test_reference_is_the_formula(silu):
    x, weight, bias, groups, eps, scale, shift, addend = modulated()
    u = (x + addend[:, :, None, None]).reshape(2, groups, -1)
    h = (u - u.mean(2, keepdim=True)) / (u.var(2, keepdim=True, correction=0) + eps).sqrt()
    z = h.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    z = z * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    expected = z * torch.sigmoid(z) if silu else z
    torch.testing.assert_close(group_norm_silu(*modulated(), silu=silu), expected, rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck():
    x, weight, bias, groups, eps, *modulation = modulated()
    torch.autograd.gradcheck(
        lambda x, weight, bias, *rest: group_norm_silu(x, weight, bias, groups, eps, *rest),
        (x, weight, bias, *modulation),
    )


def test_reference_in_bf16_with_fp32_parameters_rounds_once():
    x, weight, bias, groups, eps, *modulation = (
        part.detach().float() if isinstance(part, torch.Tensor) else part for part in modulated()
    )
    x, *modulation = (part.bfloat16() for part in (x, *modulation))
    exact = group_norm_silu(x.double(), weight.double(), bias.double(), groups, eps, *(m.double() for m in modulation))
    actual = group_norm_silu(x, weight, bias, groups, eps, *modulation)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, exact.to(torch.bfloat16), rtol=2**-8, atol=1e-6)


def test_reference_compiles_without_graph_breaks():
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    arguments = modulated()
    leaves = [part for part in arguments if isinstance(part, torch.Tensor)]
    eager, traced = (
        torch.autograd.grad(function(*arguments).sum(), leaves) for function in (group_norm_silu, compiled)
    )
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def run_python(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_in_the_interpreter(interpreted_cases):
    interpreted_cases("interpreted_group_norm_silu.py")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from rdmd_fast.kernels.ema_update import ema_update
from rdmd_fast.kernels.group_norm_silu import group_norm_silu
from rdmd_fast.kernels.image_normalize import image_normalize
ema = [torch.zeros(3)]
ema_update(ema, [torch.ones(3)], 0.25)
assert torch.equal(ema[0], torch.full((3,), 0.25))
assert group_norm_silu(torch.zeros(1, 4, 2, 2), torch.ones(4), torch.zeros(4), 1, 1e-5).abs().max() == 0
assert image_normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).max() == -1
"""


def test_references_work_without_triton():
    run_python("-c", WITHOUT_TRITON, RDMD_KERNELS="auto")
