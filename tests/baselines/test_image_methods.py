"""ILVR, CycleDiffusion and EGSDE on tiny images with exact denoisers: what their equations promise."""

import itertools

import pytest
import torch

from rdmd_fast.baselines import (
    CycleDiffusionOptions,
    EGSDEOptions,
    ILVROptions,
    Models,
    SDEditOptions,
    solvers,
    translate,
)
from rdmd_fast.baselines.egsde import faithful, faithful_gradient, realism, realism_gradient
from rdmd_fast.baselines.energy import ClassifierOptions, EnergyConfig, build_energy
from rdmd_fast.baselines.solvers import low_pass
from rdmd_fast.errors import InputError
from rdmd_fast.networks.analytic import GaussianMixtureDenoiser
from rdmd_fast.randomness import Philox, Stream

SHAPE = (1, 4, 4)


class Mixture:
    """An exact denoiser of a mixture of two Gaussians over images of ``SHAPE``."""

    def __init__(self, seed, deviation):
        means = Philox(seed).normal(Stream.EVALUATION, torch.arange(2), (16,))
        self.flat = GaussianMixtureDenoiser(means, torch.tensor([deviation**2, deviation**2]))

    def __call__(self, x, sigma):
        return self.flat(x.flatten(1), sigma).view(x.shape)


SOURCE, TARGET = Mixture(1, 0.3), Mixture(2, 0.5)


def images(count, seed=5):
    return Philox(seed).normal(Stream.EVALUATION, torch.arange(count), SHAPE).contiguous()


def run(options, x, seed=0, positions=None, source=SOURCE, target=TARGET, energy=None):
    positions = torch.arange(len(x)) if positions is None else positions
    return translate(options, Models(target, source, energy), x, Philox(seed), positions)


@pytest.fixture(scope="module")
def energy():
    torch.manual_seed(0)
    network = ClassifierOptions(model_channels=8, channel_mult=[1, 2], num_blocks=1)
    return build_energy(EnergyConfig(network=network, sample_shape=list(SHAPE), sigma_data=0.5, step=0), dropout=False)


# -- the low-pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_low_pass_is_a_linear_idempotent_symmetric_operator_of_block_means(factor):
    x, y = images(3).double(), images(3, seed=6).double()
    torch.testing.assert_close(low_pass(2 * x - 3 * y, factor), 2 * low_pass(x, factor) - 3 * low_pass(y, factor))
    torch.testing.assert_close(low_pass(low_pass(x, factor), factor), low_pass(x, factor))
    torch.testing.assert_close((low_pass(x, factor) * y).sum(), (x * low_pass(y, factor)).sum())
    torch.testing.assert_close(
        low_pass(x, factor)[1, 0, :factor, :factor], x[1, 0, :factor, :factor].mean().expand(factor, factor)
    )


def test_low_pass_refuses_what_it_does_not_fit():
    with pytest.raises(InputError, match=r"factor 3: .* \[1, 4, 4\]"):
        low_pass(images(1), 3)
    with pytest.raises(InputError, match=r"factor 1: .* \[2\]"):
        low_pass(torch.zeros(1, 2), 1)


# -- ILVR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4])
def test_ilvr_keeps_the_low_frequencies_of_its_reference(factor):
    x = images(6)
    y = run(ILVROptions(steps=8, factor=factor), x).outputs
    torch.testing.assert_close(low_pass(y, factor), low_pass(x, factor), atol=1e-6, rtol=0)
    assert (y - x).abs().mean() > 0.3  # the rest is the target's


def test_ilvr_stops_substituting_below_the_stop_level(monkeypatch):
    """At the last substituted step the state's φ is that of x + σ_s z; afterwards it is the chain's own."""
    seen = []

    def record(state, denoised, now, following):
        seen.append((state, float(now)))
        return reverse_mean(state, denoised, now, following)

    reverse_mean = solvers.reverse_mean
    monkeypatch.setattr("rdmd_fast.baselines.ilvr.reverse_mean", record)
    x, options = images(6), ILVROptions(steps=8, stop=0.5)
    run(options, x)
    noise = solvers.Noise(Philox(0), torch.arange(6), x)
    for step, (state, level) in enumerate(seen[1:]):
        expected = low_pass(x.double() + level * noise.reference(step), options.factor)
        same = torch.allclose(low_pass(state, options.factor), expected, atol=1e-9)
        assert same == (level >= 0.5)
    assert {level >= 0.5 for _, level in seen[1:]} == {True, False}


def test_ilvr_that_never_substitutes_samples_the_target_whatever_the_source():
    """From pure noise with stop above all levels nothing of the source is left; from a level it starts from it."""
    x = images(4)
    free = ILVROptions(steps=8, stop=1e6)
    torch.testing.assert_close(run(free, x).outputs, run(free, x + 1).outputs, atol=0, rtol=0)
    started = ILVROptions(steps=8, stop=1e6, sigma0=0.5)
    torch.testing.assert_close(
        run(started, x).outputs, run(SDEditOptions(steps=8, sigma0=0.5, solver="ancestral"), x).outputs, atol=0, rtol=0
    )


# -- CycleDiffusion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_cyclediffusion_with_one_teacher_returns_its_input(eta):
    x = images(6)
    y = run(CycleDiffusionOptions(steps=6, sigma0=3.0, eta=eta), x, source=TARGET).outputs
    torch.testing.assert_close(y, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_cyclediffusion_is_encoder_and_decoder_of_the_paper(eta):
    """Written out as the paper has it: the whole list of ε first, divided by the deviations, then the replay."""
    x, options = images(5), CycleDiffusionOptions(steps=6, sigma0=3.0, eta=eta)
    noise, clean = solvers.Noise(Philox(0), torch.arange(5), x), x.double()
    levels = solvers.level_schedule(options, TARGET, 3.0)

    def step(model, state, now, following):
        deviation = eta * following * (1 - following**2 / now**2).sqrt()
        denoised = clean if model is None else model(state.float(), now).double()
        return denoised + (following**2 - deviation**2).sqrt() / now * (state - denoised), deviation

    chain = [clean + levels[0] * noise.start()]
    epsilons = []
    pairs = list(itertools.pairwise(levels))
    for number, (now, following) in enumerate(pairs[:-1]):
        mean, deviation = step(None, chain[-1], now, following)
        chain.append(mean + deviation * noise.step(number))
        epsilons.append((chain[-1] - step(SOURCE, chain[-2], now, following)[0]) / deviation)
    residual = clean - step(SOURCE, chain[-1], *pairs[-1])[0]
    state = chain[0]
    for (now, following), epsilon in zip(pairs[:-1], epsilons, strict=True):
        mean, deviation = step(TARGET, state, now, following)
        state = mean + deviation * epsilon
    expected = step(TARGET, state, *pairs[-1])[0] + residual
    torch.testing.assert_close(run(options, x).outputs.double(), expected, atol=1e-6, rtol=0)


def test_cyclediffusion_draws_its_chain_from_the_forward_process():
    """x_s given x alone must be N(x, σ_s²), whatever η: the teachers see states of their own noise level."""
    seen = {}

    def teacher(state, level):
        seen[float(level)] = state
        return torch.zeros_like(state)

    x = images(1).expand(4000, *SHAPE)
    run(CycleDiffusionOptions(steps=5, sigma0=3.0, eta=0.6, rho=3.0), x, source=teacher)
    assert len(seen) == 5
    for level, state in seen.items():
        noise = (state - x) / level
        assert abs(float(noise.mean())) < 0.02
        assert float(noise.std()) == pytest.approx(1.0, abs=0.02)


# -- EGSDE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sde", "ancestral"])
def test_egsde_without_weights_is_sdedit_bit_for_bit(solver):
    x = images(6)
    alike = dict(steps=6, sigma0=1.5, solver=solver)
    plain = run(SDEditOptions(**alike), x)
    guided = run(EGSDEOptions(**alike, lambda_s=0.0, lambda_i=0.0), x)
    assert torch.equal(guided.outputs, plain.outputs)
    assert guided.evaluations == plain.evaluations == 6


def test_energy_gradients_are_those_of_the_energies(energy):
    """Central differences in float64."""
    energy = energy.double()
    y, source, level = images(2).double(), images(2, seed=8).double(), torch.tensor(0.7, dtype=torch.float64)
    gradients = {
        lambda y: realism(energy, y, source, level): realism_gradient(energy, y, source, level),
        lambda y: faithful(y, source, level, 2): faithful_gradient(y, source, level, 2),
    }
    for function, gradient in gradients.items():
        numeric, width = torch.zeros_like(y), 1e-6
        for place in range(16):
            shift = torch.zeros_like(y)
            shift.view(2, 16)[:, place] = width
            with torch.no_grad():
                numeric.view(2, 16)[:, place] = (function(y + shift) - function(y - shift)) / (2 * width)
        torch.testing.assert_close(gradient, numeric, atol=1e-8, rtol=1e-5)
        assert gradient.abs().max() > 1e-3
    energy.float()


def test_realism_is_the_mean_cosine_of_the_features_at_each_place(energy):
    y, source, level = images(3), images(3, seed=8), torch.tensor(0.7)
    a, b = (energy.features(each, level).detach() for each in (y, source))
    assert a.shape == (3, 16, 2, 2)
    cosine = (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())
    torch.testing.assert_close(realism(energy, y, source, level), cosine.mean((1, 2)))
    torch.testing.assert_close(realism(energy, y, y, level), torch.ones(3))


def test_egsde_subtracts_the_gradient_of_both_energies_from_the_score(energy):
    x, steps = images(3), 1
    options = EGSDEOptions(steps=steps, sigma0=0.8, lambda_s=3.0, lambda_i=0.5, factor=2)
    guided = run(options, x, energy=energy)
    plain = run(SDEditOptions(steps=steps, sigma0=0.8), x).outputs
    noise, level = solvers.Noise(Philox(0), torch.arange(3), x), torch.tensor(0.8, dtype=torch.float64)
    y, source = x.double() + level * noise.start(), x.double() + level * noise.reference(0)
    # α = 1/sqrt(1 + σ²) of the paper's states.
    pull = 0.5 * 2 * low_pass(y - source, 2) / (1 + 0.8**2)
    push = 3.0 * realism_gradient(energy, y, source, level)
    torch.testing.assert_close(guided.outputs.double(), plain.double() - 0.8**2 * (pull + push), atol=1e-5, rtol=1e-5)
    assert (guided.evaluations, guided.energy_evaluations) == (1, 2)


def test_weights_of_egsde_move_what_they_are_for(energy):
    x = images(64)

    def measured(**weights):
        y = run(EGSDEOptions(steps=20, sigma0=1.5, factor=2, **weights), x, energy=energy).outputs
        similarity = realism(energy, y, x, torch.tensor(0.05)).mean().detach()
        return float(low_pass(y - x, 2).square().mean()), float(similarity)

    free, kept, pushed = (measured(lambda_s=s, lambda_i=i) for s, i in ((0.0, 0.0), (0.0, 1.0), (20.0, 0.0)))
    assert kept[0] < free[0] / 2
    assert pushed[1] < free[1]


# -- all ---------------------------------------------------------------------------------------------------------------

SHORT = [
    ILVROptions(steps=4, factor=2),
    ILVROptions(steps=4, factor=2, sigma0=1.0),
    CycleDiffusionOptions(steps=4),
    EGSDEOptions(steps=4, factor=2, lambda_s=5.0),
]


@pytest.mark.parametrize("options", SHORT)
def test_outputs_depend_on_seed_and_position_alone(options, energy):
    x = images(9)
    whole = run(options, x, energy=energy).outputs
    numbers = torch.tensor([7, 2, 3])
    part = run(options, x[numbers], positions=numbers, energy=energy).outputs
    torch.testing.assert_close(part, whole[numbers], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(options, x, seed=1, energy=energy).outputs, whole, atol=0.1)
    assert not torch.allclose(run(options, x, positions=torch.arange(9) + 1, energy=energy).outputs, whole, atol=0.1)


@pytest.mark.parametrize(("options", "evaluations"), list(zip(SHORT, [4, 4, 8, 4], strict=True)))
def test_evaluations_are_counted(options, evaluations, energy):
    translation = run(options, images(2), energy=energy)
    assert translation.evaluations == evaluations
    assert translation.energy_evaluations == (8 if options.method == "egsde" else 0)


def test_missing_and_unfit_models_are_refused(energy):
    with pytest.raises(InputError, match="cyclediffusion: needs a teacher of the source domain"):
        run(CycleDiffusionOptions(), images(1), source=None)
    with pytest.raises(InputError, match="egsde: needs an energy network"):
        run(EGSDEOptions(), images(1))
    with pytest.raises(InputError, match=r"energy network is for samples of shape \(1, 4, 4\), these are \(1, 8, 8\)"):
        run(EGSDEOptions(), torch.zeros(1, 1, 8, 8), energy=energy)
    with pytest.raises(InputError, match="factor 3"):
        run(ILVROptions(factor=3), images(1))
