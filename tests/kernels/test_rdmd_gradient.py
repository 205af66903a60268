import pytest
import torch

from rdmd_fast.costs import CostOptions, transport_cost
from rdmd_fast.diffusion import DiffusionOptions, coefficients
from rdmd_fast.kernels.noise_forward import CounterNoise
from rdmd_fast.kernels.rdmd_gradient import rdmd_gradient

SIGMAS = torch.tensor([0.03, 0.4, 1.0, 6.0], dtype=torch.float64)


def batch(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f_real, f_fake, y, x, epsilon = (torch.randn(len(SIGMAS), *shape, generator=generator) for _ in range(5))
    return f_real, f_fake, y, x, CounterNoise(0, 0, torch.arange(len(SIGMAS)), epsilon)


def explicit_gradient(f_real, f_fake, y, x, epsilon, table, weighting, sigma):
    """From both denoisers in float64, as the paper and DMD2 write it; without the transport term."""
    rows = {n: table.row(n, y).double() for n in ("alpha", "sigma", "c_skip", "c_out")}
    state = rows["alpha"] * y.double() + rows["sigma"] * epsilon.double()
    d_real = rows["c_skip"] * state + rows["c_out"] * f_real.double()
    d_fake = rows["c_skip"] * state + rows["c_out"] * f_fake.double()
    if weighting == "dmd":
        per_sample = (y.double() - d_real).abs().flatten(1).mean(1)
        return (d_fake - d_real) / per_sample.view(-1, *(1,) * (y.ndim - 1))
    omega = sigma**2 if weighting == "sigma2" else torch.ones_like(sigma)
    return (d_fake - d_real) * (omega / sigma**2).view(-1, *(1,) * (y.ndim - 1))


@pytest.mark.parametrize("kind", ["edm", "epsilon", "v", "flow"])
@pytest.mark.parametrize("weighting", ["uniform", "sigma2", "dmd"])
@pytest.mark.parametrize("shape", [(2,), (3, 5, 7)])
def test_gradient_equals_the_explicit_denoiser_difference(kind, weighting, shape):
    f_real, f_fake, y, x, noise = batch(shape)
    table = coefficients(SIGMAS, DiffusionOptions(parameterization=kind), weighting)
    gradient, statistics = rdmd_gradient(f_real, f_fake, y, x, noise, table, 0.3, weighting)
    score = explicit_gradient(f_real, f_fake, y, x, noise.drawn, table, weighting, SIGMAS)
    expected = (score + 0.3 * 2 * (y - x).double()) / len(SIGMAS)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(
        statistics.score_gradient_square.double(), score.square().flatten(1).sum(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(statistics.transport_cost, (y - x).square().flatten(1).sum(1))


@pytest.mark.parametrize("cost", ["squared_l2", "l1", "pseudo_huber"])
def test_cost_gradient_is_the_derivative_of_the_reported_cost(cost):
    f_real, _, y, x, noise = batch((4,))
    table = coefficients(SIGMAS, DiffusionOptions())
    # Equal scores leave the transport term alone.
    gradient, statistics = rdmd_gradient(f_real, f_real, y, x, noise, table, 0.7, "uniform", cost, delta=0.2)
    variable = y.double().requires_grad_()
    displacement = variable - x.double()
    value = {
        "squared_l2": displacement.square(),
        "l1": displacement.abs(),
        "pseudo_huber": 0.04 * ((1 + (displacement / 0.2) ** 2).sqrt() - 1),
    }[cost].sum(1)
    (0.7 * value.mean()).backward()
    torch.testing.assert_close(gradient.double(), variable.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.transport_cost.double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(transport_cost(x, y, CostOptions(kind=cost, delta=0.2)), statistics.transport_cost)


def test_a_sample_that_the_teacher_restores_exactly_stays_finite():
    f_real, f_fake, y, x, noise = batch((4,))
    table = coefficients(SIGMAS, DiffusionOptions())
    f_real = table.row("target_clean", y) * y + table.row("target_noise", y) * noise.drawn
    gradient, _ = rdmd_gradient(f_real, f_fake, y, x, noise, table, 0.1, "dmd")
    assert gradient.isfinite().all()


def test_noise_is_drawn_again_from_its_counters():
    from rdmd_fast.randomness import Philox, Stream

    f_real, f_fake, y, x, _ = batch((3, 4, 4))
    table = coefficients(SIGMAS, DiffusionOptions(), "dmd")
    positions = torch.arange(7, 7 + len(SIGMAS))
    counters = CounterNoise(11, int(Stream.GENERATOR_NOISE), positions)
    drawn = counters._replace(drawn=Philox(11).normal(Stream.GENERATOR_NOISE, positions, (3, 4, 4)))
    again, _ = rdmd_gradient(f_real, f_fake, y, x, counters, table, 0.1, "dmd")
    once, _ = rdmd_gradient(f_real, f_fake, y, x, drawn, table, 0.1, "dmd")
    assert torch.equal(again, once)
