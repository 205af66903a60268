import pytest
import torch

from rdmd_fast.diffusion import DiffusionOptions, coefficients
from rdmd_fast.kernels.coefficients import ROWS, Coefficients
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.noise_forward import CounterNoise

SIGMAS = torch.tensor([0.03, 0.4, 6.0], dtype=torch.float64)
TABLE = coefficients(SIGMAS, DiffusionOptions())
NOISE = CounterNoise(7, 5, torch.arange(3))


def samples(*shape, seed=0):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2,), (3, 20, 20)])
def test_gradient_is_that_of_the_mean_loss_by_autograd_in_fp64(shape):
    output, y = samples(*shape), samples(*shape, seed=1)
    variable, rows = output.double().requires_grad_(), TABLE.rows.double()
    columns = [rows[ROWS.index(name)].view(-1, *(1,) * len(shape)) for name in ("target_clean", "target_noise")]
    target = columns[0] * y.double() + columns[1] * NOISE.values(y).double()
    expected = (variable - target).square().flatten(1).sum(1)
    (expected.sum() / 12).backward()
    gradient, losses = denoising_gradient(output, y, noise=NOISE, table=TABLE, batch_size=12)
    torch.testing.assert_close(gradient.double(), variable.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=0)


def test_compiled_loss_and_its_gradient_equal_eager_ones():
    def both(f, y, rows):
        return denoising_gradient(f, y, noise=NOISE, table=Coefficients(rows), loss_scale=3.0)

    f = samples(3, 4, 6, seed=2).contiguous(memory_format=torch.channels_last)
    arguments = f, samples(3, 4, 6), TABLE.rows
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments)
    for expected, found in zip(both(*arguments), compiled, strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_operator_is_registered_soundly():
    y = samples(3, 20, 20)
    torch.library.opcheck(
        torch.ops.rdmd_fast.denoising_loss.default, (y.bfloat16(), y + 1, 0.5, TABLE.rows, *NOISE.arguments())
    )
