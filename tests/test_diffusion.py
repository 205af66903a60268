import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rdmd_fast.diffusion import (
    DiffusionOptions,
    ForwardProcess,
    KarrasUniformSigma,
    LogNormalSigma,
    LogUniformSigma,
    Reading,
    coefficients,
    denoise,
)
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.noise_forward import CounterNoise, noise_forward
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.samplers import Churn, churn_noise, heun_sample, karras_levels

PARAMETERIZATIONS = ["edm", "epsilon", "v", "flow"]
SIGMAS = torch.tensor([2e-3, 0.05, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)


def draw(count, seed=0, dim=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, dim, generator=generator)
    epsilon = torch.randn(count, dim, generator=generator)
    return y, CounterNoise(0, 0, torch.arange(count), epsilon)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_network_that_hits_its_target_restores_the_clean_sample(kind):
    y, noise = draw(len(SIGMAS))
    table = coefficients(SIGMAS, DiffusionOptions(parameterization=kind))
    _, state = noise_forward(y, noise=noise, table=table, return_state=True)
    target = table.row("target_clean", y) * y + table.row("target_noise", y) * noise.drawn
    restored = table.row("c_skip", y) * state + table.row("c_out", y) * target
    # The state's rounding reaches D through c_skip, relative to the state's own size.
    torch.testing.assert_close(restored, y, rtol=0, atol=3e-7 * 80 * 6)
    torch.testing.assert_close(restored[:4], y[:4], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_every_parameterization_of_an_exact_network_gives_the_same_denoiser(kind):
    """For data N(0, s²) the denoiser is x s²/(s² + σ̃²); each network form of it follows by inverting its reading."""
    s, options = 0.7, DiffusionOptions(parameterization=kind, sigma_data=0.5)
    state = torch.linspace(-2, 2, len(SIGMAS))[:, None]

    def network(network_input, c_noise, class_labels):
        sigma = (4 * c_noise.double()).exp()
        table = coefficients(sigma, options)
        alpha, c_in, c_skip, c_out = (table.row(n, state).double() for n in ("alpha", "c_in", "c_skip", "c_out"))
        own_state = network_input.double() / c_in
        exact = own_state / alpha * s**2 / (s**2 + sigma[:, None] ** 2)
        return ((exact - c_skip * own_state) / c_out).float()

    expected = state.double() * s**2 / (s**2 + SIGMAS[:, None] ** 2)
    actual = denoise(network, state, SIGMAS, options)
    # flow and epsilon subtract two numbers of the state's size; at σ̃ = 80 that costs digits.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=3e-5 if kind in ("flow", "epsilon") else 1e-6)


def test_edm_coefficients_are_table_1_of_the_paper():
    sigma_data = 0.5
    table = coefficients(SIGMAS, DiffusionOptions(sigma_data=sigma_data))
    expected = {
        "c_skip": sigma_data**2 / (SIGMAS**2 + sigma_data**2),
        "c_out": SIGMAS * sigma_data / (SIGMAS**2 + sigma_data**2).sqrt(),
        "c_in": 1 / (SIGMAS**2 + sigma_data**2).sqrt(),
        "c_noise": SIGMAS.log() / 4,
    }
    for name, values in expected.items():
        torch.testing.assert_close(table.row(name).double(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting,power", [("uniform", -2), ("sigma2", 0)])
def test_score_scale_is_omega_alpha2_over_sigma2_times_c_out(weighting, power):
    for kind in PARAMETERIZATIONS:
        table = coefficients(SIGMAS, DiffusionOptions(parameterization=kind), weighting)
        expected = SIGMAS**power * table.row("c_out").double()
        torch.testing.assert_close(table.row("score_scale").double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_denoising_loss_is_the_weighted_denoiser_error_with_its_gradient(kind):
    levels = SIGMAS[1:5]
    y, noise = draw(len(levels), seed=1)
    table = coefficients(levels, DiffusionOptions(parameterization=kind))
    output = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    gradient, loss = denoising_gradient(output, y, noise=noise, table=table)

    exact = output.double().requires_grad_()
    rows = {n: table.row(n, y).double() for n in ("alpha", "sigma", "c_skip", "c_out")}
    state = rows["alpha"] * y + rows["sigma"] * noise.drawn
    denoised = rows["c_skip"] * state + rows["c_out"] * exact
    expected = ((denoised - y).square() / rows["c_out"] ** 2).sum(1)
    expected.mean().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_sigma_distributions_have_their_quantiles():
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    lognormal = stats.lognorm(s=1.2, scale=math.exp(-1.2)).ppf(u.numpy())
    np.testing.assert_allclose(LogNormalSigma().quantile(u).numpy(), lognormal, rtol=1e-10)
    loguniform = stats.loguniform(0.02, 30).ppf(u.numpy())
    np.testing.assert_allclose(
        LogUniformSigma(sigma_min=0.02, sigma_max=30).quantile(u).numpy(), loguniform, rtol=1e-10
    )


def test_karras_uniform_draws_levels_20_to_979_of_a_thousand():
    levels = karras_levels(1000).flip(0)[1:]  # rising, without the final 0
    u = (torch.arange(960, dtype=torch.float64) + 0.5) / 960
    drawn = KarrasUniformSigma().quantile(u)
    torch.testing.assert_close(drawn, levels[20:980], rtol=1e-9, atol=0)


def test_heun_follows_the_closed_form_trajectory_of_a_gaussian():
    s, noise = 0.8, torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def denoiser(state, sigma):
        return state * float(s**2 / (s**2 + sigma**2))

    samples = heun_sample(denoiser, noise, karras_levels(256))
    expected = noise.double() * 80 * s / math.sqrt(s**2 + 80**2)  # x(σ) ∝ sqrt(s² + σ²)
    torch.testing.assert_close(samples.double(), expected, rtol=5e-4, atol=1e-4)
    coarse = heun_sample(denoiser, noise, karras_levels(64)).double() - expected
    # Second order: four times the steps leave far less than a quarter of the error.
    assert (samples.double() - expected).abs().max() < coarse.abs().max() / 8


def forward_process(stride, block=None):
    process = ForwardProcess(
        Philox(5), LogNormalSigma(), DiffusionOptions(), "uniform",
        (Stream.FAKE_SIGMA, Stream.FAKE_NOISE), (2,), stride, torch.device("cpu"),
    )  # fmt: skip
    if block:
        process.BLOCK_ELEMENTS = block
    return process


def test_draws_depend_on_positions_alone():
    whole = forward_process(stride=8)
    direct_table, direct_noise = whole.draw(torch.arange(80, 88))
    expected = Philox(5).normal(Stream.FAKE_NOISE, torch.arange(80, 88), (2,))
    assert torch.equal(direct_noise.drawn, expected)
    ahead = forward_process(stride=8, block=5 * 16)
    for step in range(20):
        for slot, half in enumerate((torch.arange(4), torch.arange(4, 8))):
            table, noise = ahead.draw(half + 8 * step, slot)
            if step == 10:
                assert torch.equal(noise.drawn, direct_noise.drawn[half])
                assert torch.equal(table.rows, direct_table.rows[:, half])


def test_draws_after_a_jump_equal_fresh_ones():
    process = forward_process(stride=8)
    process.draw(torch.arange(8))
    table, noise = process.draw(torch.arange(8004, 8012))
    fresh_table, fresh_noise = forward_process(stride=8).draw(torch.arange(8004, 8012))
    assert torch.equal(noise.drawn, fresh_noise.drawn) and torch.equal(table.rows, fresh_table.rows)


def test_generator_reads_the_teacher_as_its_denoiser_at_generator_sigma():
    options = DiffusionOptions(sigma_data=0.5)
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    def network(network_input, c_noise, class_labels):
        return torch.tanh(network_input @ weight + c_noise[:, None])

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for kind in PARAMETERIZATIONS:
        options = DiffusionOptions(parameterization=kind)
        expected = denoise(network, x, torch.tensor(1.0), options)
        torch.testing.assert_close(Reading.of("teacher", options, 1.0)(network, x), expected, rtol=1e-6, atol=1e-6)


# -- stochastic sampling -----------------------------------------------------------------------------------------------

MEAN, DEVIATION = 0.5, 0.8
STOCHASTIC = Churn(amount=5.0, sigma_min=2.0, sigma_max=10.0, noise=1.2)


def gaussian_denoiser(state, sigma):
    """Exact for data N(MEAN, DEVIATION²): linear in the state, so that a sampler keeps it Gaussian."""
    share = float(DEVIATION**2 / (DEVIATION**2 + sigma**2))
    return MEAN + share * (state - MEAN)


def stochastic_heun(positions, steps=12, churn=STOCHASTIC, seed=3):
    philox, shape = Philox(seed), (2, 3)
    noise = philox.normal(Stream.SAMPLER, positions, shape)
    return heun_sample(gaussian_denoiser, noise, karras_levels(steps), churn, churn_noise(philox, positions, shape))


def moments_of_algorithm_2(levels, churn):
    """Mean and variance after EDM's Algorithm 2 for ``gaussian_denoiser``, by the affine map that each step is."""
    steps, mean, variance = len(levels) - 1, 0.0, levels[0] ** 2
    for now, following in itertools.pairwise(levels):
        gamma = min(churn.amount / steps, 2**0.5 - 1) if churn.sigma_min <= now <= churn.sigma_max else 0.0
        raised = now + gamma * now
        variance += (raised**2 - now**2) * churn.noise**2

        def slope(x, sigma):
            return (x - MEAN) * (1 - DEVIATION**2 / (DEVIATION**2 + sigma**2)) / sigma

        def step(x, raised=raised, following=following, slope=slope):
            euler = x + (following - raised) * slope(x, raised)
            if following == 0:
                return euler
            return x + (following - raised) * (slope(x, raised) + slope(euler, following)) / 2

        gain = step(1.0) - step(0.0)
        mean, variance = step(mean), gain**2 * variance
    return mean, variance


def test_stochastic_heun_has_the_moments_of_algorithm_2():
    samples = stochastic_heun(torch.arange(20_000)).double()
    mean, variance = moments_of_algorithm_2(karras_levels(12).tolist(), STOCHASTIC)
    count = samples.numel()
    assert abs(samples.mean() - mean) < 4 * math.sqrt(variance / count)
    assert abs(samples.var() / variance - 1) < 4 * math.sqrt(2 / count)
    # The test tells the options apart: without S_noise or either bound the variance is another one.
    for other in (Churn(5.0, 2.0, 10.0, 1.0), Churn(5.0, 0.0, 10.0, 1.2), Churn(5.0, 2.0, math.inf, 1.2), Churn()):
        assert abs(moments_of_algorithm_2(karras_levels(12).tolist(), other)[1] / variance - 1) > 0.06


def test_stochastic_heun_samples_the_data_distribution():
    """As the steps get small, fresh noise and its removal cancel (S_noise = 1)."""
    samples = stochastic_heun(torch.arange(8_000), steps=256, churn=Churn(amount=40.0)).double()
    count = samples.numel()
    assert abs(samples.mean() - MEAN) < 4 * DEVIATION / math.sqrt(count)
    assert abs(samples.var() / DEVIATION**2 - 1) < 4 * math.sqrt(2 / count) + 4e-3  # what 256 steps leave


def test_stochastic_samples_depend_on_seed_and_position_alone():
    whole = stochastic_heun(torch.arange(10))
    parts = [stochastic_heun(part) for part in torch.arange(10).split(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(stochastic_heun(torch.arange(10), seed=4), whole)


def test_no_churn_is_the_deterministic_sampler():
    noise = Philox(3).normal(Stream.SAMPLER, torch.arange(10), (2, 3))
    plain = heun_sample(gaussian_denoiser, noise, karras_levels(12))
    assert torch.equal(stochastic_heun(torch.arange(10), churn=Churn()), plain)
    outside = Churn(amount=6.0, sigma_min=100.0)  # no level lies there
    assert torch.equal(stochastic_heun(torch.arange(10), churn=outside), plain)


def test_fresh_noise_differs_from_step_to_step():
    fresh = churn_noise(Philox(3), torch.arange(2000), (2,))
    first, second = fresh(0).flatten(), fresh(1).flatten()
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 4 / math.sqrt(4000)
