"""SDEdit and DDIB against closed forms between Gaussians, where every conditional law is known."""

import pytest
import torch

from rdmd_fast.baselines import DDIBOptions, Models, SDEditOptions, parse_options, translate
from rdmd_fast.errors import InputError
from rdmd_fast.networks.analytic import GaussianMixtureDenoiser
from rdmd_fast.randomness import Philox, Stream

MANY = 10_000


def gaussian(deviation, mean=(0.0, 0.0)):
    return GaussianMixtureDenoiser(torch.tensor([mean]), torch.tensor([deviation**2]))


def points(count, deviation=1.0, seed=3):
    return deviation * Philox(seed).normal(Stream.EVALUATION, torch.arange(count), (2,))


def run(options, x, target, source=None, seed=0, positions=None):
    positions = torch.arange(len(x)) if positions is None else positions
    return translate(options, Models(target, source), x, Philox(seed), positions)


@pytest.mark.parametrize("solver", ["sde", "ancestral", "ode"])
def test_sdedit_from_hardly_any_noise_is_the_identity(solver):
    x = points(100)
    options = SDEditOptions(sigma0=1e-3, sigma_min=1e-4, steps=10, solver=solver)
    torch.testing.assert_close(run(options, x, gaussian(1.5)).outputs, x, atol=6e-3, rtol=0)


@pytest.mark.parametrize("solver", ["sde", "ancestral"])
def test_sdedit_between_gaussians_has_the_law_of_the_reverse_sde(solver):
    """Started from u = x + σ0 z, the reverse SDE ends in N(D(u), s² σ0² / (s² + σ0²)), as the posterior does."""
    s, sigma0, mean = 1.5, 2.0, (0.8, -0.4)
    x = points(MANY)
    options = SDEditOptions(sigma0=sigma0, steps=200, solver=solver)
    y = run(options, x, gaussian(s, mean)).outputs.double()
    gain = s**2 / (s**2 + sigma0**2)
    variance = gain**2 * (1 + sigma0**2) + gain * sigma0**2
    torch.testing.assert_close(y.mean(0), (1 - gain) * torch.tensor(mean).double(), atol=0.04, rtol=0)
    # 200 steps leave 0.02 too much (sde) or 0.05 too little (ancestral) of 2.09.
    torch.testing.assert_close(torch.cov(y.T), variance * torch.eye(2).double(), atol=0.12, rtol=0)
    shared = torch.cov(torch.cat((x.double(), y), 1).T)[:2, 2:]
    torch.testing.assert_close(shared, gain * torch.eye(2).double(), atol=0.03, rtol=0)


@pytest.mark.parametrize(("solver", "ratio"), [("sde", 1.0), ("ancestral", 0.0)])
def test_a_single_step_leaves_the_denoised_start_and_the_noise_of_its_solver(solver, ratio):
    """Euler-Maruyama adds sqrt(σ0² - 0) z in the step to 0, the posterior nothing."""
    x = points(MANY)
    y = run(SDEditOptions(sigma0=0.5, steps=1, solver=solver), x, gaussian(1.0)).outputs.double()
    gain = 1 / (1 + 0.25)
    expected = gain**2 * (1 + 0.25) + ratio * 0.25
    torch.testing.assert_close(torch.cov(y.T), expected * torch.eye(2).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize("solver", ["sde", "ancestral", "ode"])
def test_sdedit_from_much_noise_forgets_the_source_and_samples_the_target(solver):
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    target = GaussianMixtureDenoiser(means, torch.tensor([0.25, 0.25]), torch.tensor([0.25, 0.75]))
    x = points(MANY) + 3
    y = run(SDEditOptions(sigma0=80.0, steps=60, solver=solver), x, target).outputs.double()
    mean = torch.tensor([1.0, 0.75]).double()
    spread = means.double() - mean
    covariance = 0.25 * torch.eye(2).double() + (torch.tensor([0.25, 0.75]).double() * spread.T) @ spread
    torch.testing.assert_close(y.mean(0), mean, atol=0.12, rtol=0)
    torch.testing.assert_close(torch.cov(y.T), covariance, atol=0.1 if solver == "ode" else 0.3, rtol=0)


@pytest.mark.parametrize("sigma0", [None, 0.8])
def test_ddib_between_gaussians_is_the_affine_map_and_its_error_falls_as_heuns(sigma0):
    """(x_σ - m) / sqrt(s² + σ²) is constant along the ODE; as σ0 grows the map tends to m2 + (s2 / s1) x."""
    s1, s2, mean, level = 0.7, 1.5, torch.tensor([2.0, -1.0]), sigma0 or 80.0
    x = points(500, s1)
    latent = x * (s1**2 + level**2) ** 0.5 / s1
    expected = mean + (latent - mean) * s2 / (s2**2 + level**2) ** 0.5
    if sigma0 is None:
        torch.testing.assert_close(expected, mean + x * s2 / s1, atol=0.06, rtol=0)
    errors = []
    for steps in (48, 96, 192):
        y = run(DDIBOptions(steps=steps, sigma0=sigma0), x, gaussian(s2, mean.tolist()), gaussian(s1)).outputs
        errors.append(float((y - expected).abs().max()))
    assert errors[-1] < 0.01
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


def test_ddib_with_one_teacher_returns_its_input():
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    teacher = GaussianMixtureDenoiser(means, torch.tensor([0.25, 0.5]))
    x = points(500)
    errors = [
        float((run(DDIBOptions(steps=steps, sigma0=20.0), x, teacher, teacher).outputs - x).abs().mean())
        for steps in (25, 100)
    ]
    assert errors[1] < min(1e-3, errors[0] / 4)


@pytest.mark.parametrize(("options", "evaluations"), [
    (SDEditOptions(steps=7), 7),
    (SDEditOptions(steps=7, solver="ancestral"), 7),
    (SDEditOptions(steps=7, solver="ode"), 13),
    (DDIBOptions(steps=7), 12 + 13),
])  # fmt: skip
def test_evaluations_are_those_that_the_docstrings_state(options, evaluations):
    calls = []

    def counting(state, level):
        calls.append(len(state))
        return gaussian(1.0)(state, level)

    assert run(options, points(5), counting, counting).evaluations == len(calls) == evaluations


@pytest.mark.parametrize(
    "options", [SDEditOptions(steps=5), SDEditOptions(steps=5, solver="ode"), DDIBOptions(steps=5)]
)
def test_outputs_depend_on_seed_and_position_alone(options):
    x, teachers = points(9), (gaussian(1.5), gaussian(0.7))
    whole = run(options, x, *teachers).outputs
    numbers = torch.tensor([7, 2, 3])
    torch.testing.assert_close(run(options, x[numbers], *teachers, positions=numbers).outputs, whole[numbers])
    if options.method == "sdedit":
        assert not torch.allclose(run(options, x, *teachers, seed=1).outputs, whole, atol=0.1)
        assert not torch.allclose(run(options, x, *teachers, positions=torch.arange(9) + 1).outputs, whole, atol=0.1)


@pytest.mark.parametrize(("values", "said"), [
    ({"method": "sdedit", "sigma": 1.0}, "sdedit: unknown option sigma, it takes steps, sigma_min"),
    ({"method": "sdedit", "sigma0": -1.0}, "sdedit: sigma0: input should be greater than 0, found -1.0"),
    ({"method": "sdedit", "solver": "euler"}, "sdedit: solver: input should be 'sde', 'ancestral' or 'ode'"),
    ({"method": "pix2pix"}, "'pix2pix': name one of sdedit, ilvr, egsde, ddib, cyclediffusion"),
    ({}, "None: name one of"),
])  # fmt: skip
def test_wrong_options_are_named(values, said):
    with pytest.raises(InputError, match=said):
        parse_options(values)


def test_options_that_need_more_than_is_there_are_refused():
    with pytest.raises(InputError, match="ddib: needs a teacher of the source domain"):
        run(DDIBOptions(), points(2), gaussian(1.0))
    with pytest.raises(InputError, match=r"sdedit: sigma0 0\.001 must be above sigma_min 0\.002"):
        run(SDEditOptions(sigma0=1e-3), points(2), gaussian(1.0))
