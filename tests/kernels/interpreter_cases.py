"""Triton kernels of the loss side under the interpreter, against float64 formulas.

Not collected by itself: the interpreter must be chosen before the kernels are imported, so test_noise_forward.py
runs it in a process of its own.
"""

from types import SimpleNamespace

import pytest
import torch

from rdmd_fast.kernels import _dispatch, philox
from rdmd_fast.kernels.coefficients import ROWS, Coefficients
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.noise_forward import CHUNK, CounterNoise, generator_noise_forward, noise_forward
from rdmd_fast.kernels.rdmd_gradient import COSTS, WEIGHTINGS, generator_gradient

assert _dispatch.INTERPRETED and _dispatch.backend("cpu") == "triton"

# Points, samples smaller than a chunk, several programs of small samples, several chunks with a rest.
SHAPES = [(3, 2), (1, 3), (300, 2), (3, 7, 5, 3), (2, 3, 8, 8), (2, 3, 33, 31), (1, 5000), (1, 4, 64, 64)]
# The interpreter truncates fp32 to bf16: one unit in the last place.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPE_CASES = [(shape, torch.float32) for shape in SHAPES] + [
    (shape, dtype) for shape in ((3, 2), (2, 3, 33, 31)) for dtype in (torch.bfloat16, torch.float16)
]
SEED, STREAM = 2**63 + 2**40 + 5, 2**32 - 3
READING = SimpleNamespace(skip=0.8, scale=-0.4)


def samples(shape, seed, dtype=torch.float32, layout="channels_last"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if len(shape) != 4 or layout == "contiguous":
        return values
    if layout == "sliced":
        return torch.stack((values, values), -1)[..., 0]
    return values.contiguous(memory_format=torch.channels_last)


def table_of(n, seed=0):
    return Coefficients(torch.randn(len(ROWS), n, generator=torch.Generator().manual_seed(seed)))


def noise_of(n):
    return CounterNoise(SEED, STREAM, torch.arange(n) * 3 + 2**33 - 2)


def epsilon_of(noise, like):
    """ε in float64, element by element in (h, w, c) order, from the torch implementation."""
    flat = philox.normal_reference(noise.seed, noise.stream, noise.positions, like[0].numel()).double()
    if like.ndim != 4:
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def row(table, name, like):
    return table.row(name, like).double()


def assert_close(actual, expected, tolerance=None):
    """Relative to each value, and in fp32 to the largest of them: sums of terms that cancel lose digits."""
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    floor = 2e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=floor)


def by_chunk(values):
    """Sums over 1,024 elements each, in element order, by a loop."""
    flat = (values.permute(0, 2, 3, 1) if values.ndim == 4 else values).reshape(len(values), -1)
    return torch.stack([part.sum(1) for part in flat.split(CHUNK, dim=1)], 1)


# -- noise_forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), DTYPE_CASES)
def test_noise_forward_follows_its_equation(shape, dtype):
    y, table, noise = samples(shape, 1, dtype), table_of(shape[0]), noise_of(shape[0])
    network_input, state = noise_forward(y, noise=noise, table=table, dtype=dtype, return_state=True)
    expected = row(table, "alpha", y) * y.double() + row(table, "sigma", y) * epsilon_of(noise, y)
    assert network_input.dtype == dtype and state.dtype == torch.float32
    assert_close(state, expected)
    assert_close(network_input, row(table, "c_in", y) * expected)


@pytest.mark.parametrize(("shape", "dtype"), DTYPE_CASES)
def test_noise_forward_of_a_generator_forms_its_output(shape, dtype):
    f, x, table, noise = samples(shape, 1, dtype), samples(shape, 2), table_of(shape[0]), noise_of(shape[0])
    network_input, y = generator_noise_forward(f, x, reading=READING, noise=noise, table=table)
    clean = 0.8 * x.double() - 0.4 * f.double()
    assert network_input.dtype == dtype and y.dtype == torch.float32
    assert_close(y, clean)
    state = row(table, "alpha", y) * clean + row(table, "sigma", y) * epsilon_of(noise, y)
    assert_close(network_input, row(table, "c_in", y) * state)


@pytest.mark.parametrize("shape", [(1, 3), (300, 2), (3, 7, 5, 3), (2, 3, 33, 31)])
@pytest.mark.parametrize("seed", [1, SEED, torch.tensor([SEED - 2**64])])
def test_noise_forward_draws_the_bits_of_torch(shape, seed):
    rows = torch.zeros(len(ROWS), shape[0])
    rows[ROWS.index("sigma")] = rows[ROWS.index("c_in")] = 1  # nothing but the noise is left
    noise = noise_of(shape[0])._replace(seed=seed)
    drawn, _ = noise_forward(torch.zeros(shape), noise=noise, table=Coefficients(rows))
    integer = seed if isinstance(seed, int) else SEED
    assert torch.equal(drawn.double(), epsilon_of(noise._replace(seed=integer), drawn))


def test_noise_forward_takes_noise_that_was_drawn_ahead():
    y, table = samples((2, 3, 33, 31), 1), table_of(2)
    noise = CounterNoise(0, 0, torch.arange(2), samples(y.shape, 9, layout="contiguous"))
    network_input, _ = noise_forward(y, noise=noise, table=table)
    state = row(table, "alpha", y) * y.double() + row(table, "sigma", y) * noise.drawn.double()
    assert_close(network_input, row(table, "c_in", y) * state)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_noise_forward_does_not_depend_on_strides(layout):
    shape, table, noise = (2, 3, 33, 31), table_of(2), noise_of(2)
    expected = noise_forward(samples(shape, 1), noise=noise, table=table)[0]
    found = noise_forward(samples(shape, 1, layout=layout), noise=noise, table=table)[0]
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)


def test_noise_forward_refuses_shapes_that_do_not_belong_together():
    y, table, noise = samples((2, 6), 1), table_of(2), noise_of(2)
    with pytest.raises(ValueError, match="table"):
        noise_forward(y, noise=noise, table=table_of(3))
    with pytest.raises(ValueError, match="positions"):
        noise_forward(y, noise=noise_of(3), table=table)
    with pytest.raises(ValueError, match="samples are"):
        generator_noise_forward(y, samples((2, 5), 1), reading=READING, noise=noise, table=table)


# -- rdmd_gradient -----------------------------------------------------------------------------------------------------


def inputs(shape, dtype=torch.float32, layout="channels_last"):
    """Arguments of ``generator_gradient`` but for table, noise and options."""
    outputs = {
        name: samples(shape, seed, dtype, layout) for seed, name in enumerate(("f_real", "f_fake", "f_generator"), 1)
    }
    return {**outputs, "x": samples(shape, 4, torch.float32, layout), "reading": READING}


def expected_gradient(f_real, f_fake, y, x, noise, table, weighting, weight, cost="squared_l2", delta=0.1, extra=None):
    """(g + λ c', g, c) in float64."""
    f_real, f_fake, y, x = (each.double() for each in (f_real, f_fake, y, x))
    difference, displacement = f_fake - f_real, y - x
    if weighting == "dmd":
        target = row(table, "target_clean", y) * y + row(table, "target_noise", y) * epsilon_of(noise, y)
        mean = (target - f_real).abs().flatten(1).mean(1).view(-1, *(1,) * (y.ndim - 1))
        score = difference * row(table, "c_out", y).sign() / mean
    else:
        score = difference * row(table, "score_scale", y)
    value, derivative = {
        "squared_l2": (displacement**2, 2 * displacement),
        "l1": (displacement.abs(), displacement.sign()),
        "pseudo_huber": (
            delta**2 * ((1 + (displacement / delta) ** 2).sqrt() - 1),
            displacement / (1 + (displacement / delta) ** 2).sqrt(),
        ),
        "none": (0 * displacement, 0 * displacement),
    }[cost]
    return score + weight * (derivative + (0 if extra is None else extra.double())), score, value


def expected_of_generator(given, **options):
    """``expected_gradient`` at y = 0.8 x - 0.4 F_G."""
    y = 0.8 * given["x"].double() - 0.4 * given["f_generator"].double()
    return expected_gradient(given["f_real"], given["f_fake"], y, given["x"], **options)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("shape", "dtype"), DTYPE_CASES)
def test_rdmd_gradient_of_a_generator_follows_its_equation(shape, weighting, dtype):
    given, drawn = inputs(shape, dtype), {"noise": noise_of(shape[0]), "table": table_of(shape[0])}
    options = {"transport_weight": 0.3, "weighting": weighting, "batch_size": 7}
    gradient, statistics = generator_gradient(**given, **drawn, **options)
    total, score, cost = expected_of_generator(given, **drawn, weighting=weighting, weight=0.3)
    assert gradient.dtype == dtype
    assert_close(gradient, total * -0.4 / 7)
    y = (0.8 * given["x"].double() - 0.4 * given["f_generator"].double()).float().contiguous()
    of_given_y, _ = generator_gradient(**given, **drawn, **options, y=y)
    assert_close(of_given_y, total * -0.4 / 7)
    assert_close(statistics.score_partials, by_chunk(score**2), 2e-6)
    assert_close(statistics.cost_partials, by_chunk(cost), 2e-6)
    assert_close(statistics.score_gradient_square, (score**2).flatten(1).sum(1), 2e-6)
    assert_close(statistics.transport_cost, cost.flatten(1).sum(1), 2e-6)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", SHAPES[3:6])
def test_rdmd_gradient_of_every_cost_with_an_extra_one(shape, cost):
    given = inputs(shape, layout="sliced")
    options = {"cost": cost, "delta": 0.2, "extra": samples(shape, 8, torch.bfloat16)}
    options |= {"noise": noise_of(shape[0]), "table": table_of(shape[0])}
    gradient, statistics = generator_gradient(**given, **options, transport_weight=0.3)
    total, _, value = expected_of_generator(given, **options, weighting="dmd", weight=0.3)
    assert_close(gradient, total * -0.4 / shape[0])
    assert_close(statistics.transport_cost, value.flatten(1).sum(1), 2e-6)


@pytest.mark.parametrize("weighting", ["uniform", "dmd"])
@pytest.mark.parametrize("shape", [(300, 2), (3, 7, 5, 3), (2, 3, 33, 31)])
def test_rdmd_gradient_of_a_transport_weight_by_sample(shape, weighting):
    given, weights = inputs(shape, torch.bfloat16), torch.linspace(0.01, 2, shape[0])
    options = {"noise": noise_of(shape[0]), "table": table_of(shape[0]), "weighting": weighting}

    def gradient(weight):
        return generator_gradient(**given, **options, transport_weight=weight)[0]

    each = weights.double().view(-1, *(1,) * (len(shape) - 1))
    total, _, _ = expected_of_generator(given, **options, weight=each)
    assert_close(gradient(weights), total * -0.4 / shape[0])
    assert torch.equal(gradient(torch.full_like(weights, 0.3)), gradient(0.3))
    assert torch.equal(gradient(weights)[-1], gradient(2.0)[-1])


def test_rdmd_gradient_keeps_exact_restorations_finite_and_nan_visible():
    given, table, noise = inputs((3, 6)) | {"reading": SimpleNamespace(skip=0.0, scale=1.0)}, table_of(3), noise_of(3)
    y = given["f_generator"]
    f_real = (row(table, "target_clean", y) * y.double() + row(table, "target_noise", y) * epsilon_of(noise, y)).float()
    f_real[1, 2] = float("nan")
    gradient, _ = generator_gradient(**given | {"f_real": f_real}, noise=noise, table=table, transport_weight=0.1)
    assert gradient[0].isfinite().all() and gradient[1].isnan().all() and gradient[2].isfinite().all()


# -- denoising_loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), DTYPE_CASES)
def test_denoising_loss_and_gradient_follow_their_equation(shape, dtype):
    output, y, table, noise = samples(shape, 1, dtype), samples(shape, 2), table_of(shape[0]), noise_of(shape[0])
    gradient, losses = denoising_gradient(output, y, noise=noise, table=table, batch_size=5)
    target = row(table, "target_clean", y) * y.double() + row(table, "target_noise", y) * epsilon_of(noise, y)
    difference = output.double() - target
    assert gradient.dtype == dtype and losses.dtype == torch.float32
    assert_close(gradient, 2 / 5 * difference)
    assert_close(losses, difference.square().flatten(1).sum(1), 3e-6)


# -- every one ---------------------------------------------------------------------------------------------------------


def every_output(part, shape, table, noise):
    given = {name: each if name == "reading" else each[part] for name, each in inputs(shape).items()}
    table = Coefficients(table.rows[:, part].contiguous())
    drawn = {"noise": noise._replace(positions=noise.positions[part]), "table": table}
    network_input, y = generator_noise_forward(given["f_generator"], given["x"], reading=READING, **drawn)
    gradient, statistics = generator_gradient(**given, **drawn, transport_weight=0.3, batch_size=9)
    return network_input, y, gradient, *statistics, *denoising_gradient(given["f_fake"], y, **drawn, batch_size=9)


@pytest.mark.parametrize("shape", [(300, 2), (5, 3, 5, 7), (3, 3, 33, 31)])
def test_shared_split_batches_have_the_bits_of_the_whole(shape):
    table, noise = table_of(shape[0]), noise_of(shape[0])
    whole = every_output(slice(None), shape, table, noise)
    parts = [every_output(part, shape, table, noise) for part in (slice(0, 1), slice(1, None))]
    for index, together in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), together)
