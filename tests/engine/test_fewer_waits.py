import math

import pytest
import torch

from rdmd_fast.engine.fewer_waits import _nonfinite, _overflows, _square


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_of_squares_is_that_of_fp64(dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in [(7, 5), (1,), (1000,)]]
    expected = sum(float(each.double().square().sum()) for each in gradients)
    assert float(_square([gradients[0], None, *gradients[1:]])) == pytest.approx(expected, rel=1e-6)


def test_a_rank_without_a_part_adds_nothing():
    assert float(_square([])) == float(_square([None])) == 0


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_one_element_that_is_not_finite_is_seen(number):
    parameters = [torch.zeros(3, 4, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    for parameter in parameters[1:]:
        parameter.grad = torch.full_like(parameter, 60_000)
    gradients = [parameter.grad for parameter in parameters]
    assert not _overflows(parameters) and not _nonfinite(gradients).item()
    parameters[2].grad[1, 2] = number
    assert _overflows(parameters) and _nonfinite(gradients).item()
