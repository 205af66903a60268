import math

import pytest
import torch

from rdmd_fast.kernels.scaled_residual import scaled_residual


@pytest.mark.parametrize("scale", [math.sqrt(0.5), 1.0])
def test_reference_is_the_formula_and_its_gradient(scale):
    h, x = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(scaled_residual(h * 1, x, scale), scale * (h + x), rtol=1e-14, atol=1e-14)
    torch.autograd.gradcheck(lambda h, x: scaled_residual(h * 1, x, scale), (h, x))


def test_compiles_without_graph_breaks():
    def double(h, x):
        return scaled_residual(2 * h, x, 0.5)

    h, x = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(double, fullgraph=True, backend="aot_eager")(h, x), h + x / 2)


def test_kernels_in_the_interpreter(interpreted_cases):
    interpreted_cases("interpreted_scaled_residual.py")
