import pytest
import torch

from rdmd_fast.costs import CostOptions, transport_cost
from rdmd_fast.diffusion import DiffusionOptions, Reading, coefficients
from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.noise_forward import CounterNoise
from rdmd_fast.kernels.rdmd_gradient import generator_gradient

SIGMAS = torch.tensor([0.03, 0.4, 1.0, 6.0], dtype=torch.float64)
READING = Reading(0.8, 1.0, -0.4, 0.0)
OUTPUT_ITSELF = Reading(0.0, 1.0, 1.0, 0.0)  # y = F_G


def batch(shape, seed=0, reading=OUTPUT_ITSELF):
    """What ``generator_gradient`` takes but for table and λ."""
    random = torch.Generator().manual_seed(seed)
    f_real, f_fake, f_generator, x, epsilon = (torch.randn(len(SIGMAS), *shape, generator=random) for _ in range(5))
    noise = CounterNoise(0, 0, torch.arange(len(SIGMAS)), epsilon)
    given = {"f_real": f_real, "f_fake": f_fake, "f_generator": f_generator, "x": x}
    return {**given, "noise": noise, "reading": reading}


def explicit_gradient(f_real, f_fake, y, epsilon, table, weighting, sigma):
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
    given = batch(shape)
    y, x = given["f_generator"], given["x"]
    table = coefficients(SIGMAS, DiffusionOptions(parameterization=kind), weighting)
    gradient, statistics = generator_gradient(**given, table=table, transport_weight=0.3, weighting=weighting)
    score = explicit_gradient(given["f_real"], given["f_fake"], y, given["noise"].drawn, table, weighting, SIGMAS)
    expected = (score + 0.3 * 2 * (y - x).double()) / len(SIGMAS)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(
        statistics.score_gradient_square.double(), score.square().flatten(1).sum(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(statistics.transport_cost, (y - x).square().flatten(1).sum(1))


@pytest.mark.parametrize("cost", ["squared_l2", "l1", "pseudo_huber"])
def test_cost_gradient_is_the_derivative_of_the_reported_cost(cost):
    given = batch((4,))
    given["f_fake"] = given["f_real"]  # equal scores leave the transport term alone
    y, x = given["f_generator"], given["x"]
    table = coefficients(SIGMAS, DiffusionOptions())
    gradient, statistics = generator_gradient(
        **given, table=table, transport_weight=0.7, weighting="uniform", cost=cost, delta=0.2
    )
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
    given = batch((4,))
    y, table = given["f_generator"], coefficients(SIGMAS, DiffusionOptions())
    given["f_real"] = table.row("target_clean", y) * y + table.row("target_noise", y) * given["noise"].drawn
    gradient, _ = generator_gradient(**given, table=table, transport_weight=0.1)
    assert gradient.isfinite().all()


def test_noise_is_drawn_again_from_its_counters():
    from rdmd_fast.randomness import Philox, Stream

    given = batch((3, 4, 4))
    table = coefficients(SIGMAS, DiffusionOptions(), "dmd")
    positions = torch.arange(7, 7 + len(SIGMAS))
    counters = CounterNoise(11, int(Stream.GENERATOR_NOISE), positions)
    drawn = counters._replace(drawn=Philox(11).normal(Stream.GENERATOR_NOISE, positions, (3, 4, 4)))
    options = {"table": table, "transport_weight": 0.1}
    again, once = (generator_gradient(**{**given, "noise": noise}, **options)[0] for noise in (counters, drawn))
    assert torch.equal(again, once)


@pytest.mark.parametrize("weighting", ["uniform", "sigma2", "dmd"])
def test_generator_form_is_the_chain_rule_through_its_reading(weighting):
    given, of_y = batch((3, 20, 20), reading=READING), batch((3, 20, 20))
    of_y["f_generator"] = 0.8 * given["x"] - 0.4 * given["f_generator"]
    extra = torch.randn_like(given["x"])
    table = coefficients(SIGMAS, DiffusionOptions(), weighting)
    options = {"table": table, "transport_weight": 0.3, "weighting": weighting, "batch_size": 9}
    by_y, by_y_statistics = generator_gradient(**of_y, **options, extra=extra)
    found, statistics = generator_gradient(**given, **options, extra=extra)
    torch.testing.assert_close(found, -0.4 * by_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.transport_cost, by_y_statistics.transport_cost)
    assert statistics.cost_partials.shape == (4, 2)
    without, _ = generator_gradient(**of_y, **options)
    torch.testing.assert_close(by_y - without, 0.3 * extra / 9, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "sigma2", "dmd"])
@pytest.mark.parametrize("shape", [(2,), (3, 5, 7)])
def test_every_sample_has_the_gradient_of_its_own_transport_weight(shape, weighting):
    given = batch(shape, reading=READING)
    x = given["x"]
    weights, extra = torch.tensor([0.01, 2.0, 0.3, 0.0]), torch.randn_like(x)
    table = coefficients(SIGMAS, DiffusionOptions(), weighting)

    def gradient(weight):
        return generator_gradient(
            **given, table=table, transport_weight=weight, weighting=weighting, extra=extra, batch_size=9
        )

    found, statistics = gradient(weights)
    for sample, weight in enumerate(weights.tolist()):
        alone, same = gradient(weight)
        assert torch.equal(found[sample], alone[sample])
        assert torch.equal(gradient(torch.full_like(weights, weight))[0], alone)
        assert torch.equal(statistics.transport_cost, same.transport_cost)
    y = 0.8 * x.double() - 0.4 * given["f_generator"].double()
    score = explicit_gradient(
        given["f_real"], given["f_fake"], y.float(), given["noise"].drawn, table, weighting, SIGMAS
    )
    each = weights.double().view(-1, *(1,) * len(shape))
    expected = -0.4 / 9 * (score + each * (2 * (y - x.double()) + extra.double()))
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5)


def test_transport_weights_that_do_not_fit_the_samples_are_refused():
    table = coefficients(SIGMAS, DiffusionOptions())
    for weights in (torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.float64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"transport_weight.*float32 \[4\]"):
            generator_gradient(**batch((4,)), table=table, transport_weight=weights)


@pytest.mark.parametrize("weighting", ["uniform", "dmd"])
def test_loss_scale_enters_before_the_gradient_is_rounded_to_fp16(weighting):
    given = batch((3, 20, 20), reading=READING)
    table = coefficients(SIGMAS, DiffusionOptions(), weighting)
    options = {"table": table, "transport_weight": 0.3, "weighting": weighting, "batch_size": 2**28}
    exact, _ = generator_gradient(**given, **options)
    given["f_generator"] = given["f_generator"].half()
    lost, _ = generator_gradient(**given, **options)
    kept, _ = generator_gradient(**given, **options, loss_scale=2.0**20)
    assert lost.dtype == kept.dtype == torch.float16
    assert (lost == 0).float().mean() > 0.5
    # f_generator itself is rounded to fp16, which reaches the transport cost.
    torch.testing.assert_close(kept.float() / 2**20, exact, rtol=2e-3, atol=2e-3 * float(exact.abs().mean()))


def test_unknown_weighting_and_cost_are_refused():
    given = {**batch((4,)), "table": coefficients(SIGMAS, DiffusionOptions()), "transport_weight": 0.1}
    with pytest.raises(ValueError, match="weighting 'none'"):
        generator_gradient(**given, weighting="none")
    with pytest.raises(ValueError, match="cost 'l3'"):
        generator_gradient(**given, cost="l3")


@pytest.mark.parametrize("weight", [0.3, torch.tensor([0.01, 2.0, 0.3, 0.0])], ids=["number", "by-sample"])
def test_compiled_calls_equal_eager_ones(weight):
    given = batch((3, 5, 7))
    noise = given["noise"]

    def gradient(f_real, f_fake, f_generator, x, rows):
        result, statistics = generator_gradient(
            f_real=f_real, f_fake=f_fake, f_generator=f_generator, x=x, reading=READING, noise=noise,
            table=Coefficients(rows), transport_weight=weight, cost="pseudo_huber",
        )  # fmt: skip
        return result, statistics.transport_cost, statistics.score_gradient_square

    rows = coefficients(SIGMAS, DiffusionOptions()).rows
    arguments = given["f_real"], given["f_fake"], given["f_generator"].bfloat16(), given["x"], rows
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(*arguments)
    for expected, found in zip(gradient(*arguments), compiled, strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 3, 4])], ids=["number", "by-sample"])
def test_operator_is_registered_soundly(weights):
    given = batch((3, 20, 20))
    samples = given["f_generator"].bfloat16(), given["x"], None, given["f_real"], given["f_fake"], None, weights
    options = 0.3, "dmd", "l1", 0.1, 0.25, 0.8, 0.4
    table_and_noise = coefficients(SIGMAS, DiffusionOptions()).rows, *given["noise"].arguments()
    torch.library.opcheck(torch.ops.rdmd_fast.rdmd_gradient.default, (*samples, *options, *table_and_noise))
