import pytest
import torch

from rdmd_fast.diffusion import DiffusionOptions, Reading, coefficients
from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.inject import inject_gradient
from rdmd_fast.kernels.noise_forward import CHUNK, CounterNoise, chunk_sums, generator_noise_forward, noise_forward

SIGMAS = torch.tensor([0.03, 0.4, 6.0], dtype=torch.float64)
TABLE = coefficients(SIGMAS, DiffusionOptions(parameterization="v"))
NOISE = CounterNoise(2**64 - 3, 5, torch.arange(3) + 2**32)


def samples(*shape, seed=0):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def test_kernels_under_the_interpreter(interpreted_cases):
    interpreted_cases("interpreter_cases.py")


def test_generator_form_equals_reading_then_noising():
    f, x = samples(3, 5, 7), samples(3, 5, 7, seed=1)
    reading = Reading.of("teacher", DiffusionOptions(), 1.0)
    network_input, y = generator_noise_forward(f, x, reading=reading, noise=NOISE, table=TABLE)
    expected = reading(lambda *_: f, x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    apart, _ = noise_forward(expected, noise=NOISE, table=TABLE)
    torch.testing.assert_close(network_input, apart, rtol=1e-6, atol=1e-6)


def test_seed_in_a_tensor_draws_the_noise_of_the_integer():
    y = samples(7)
    in_tensor = NOISE._replace(seed=torch.tensor([-3]))
    drawn, expected = (noise_forward(y, noise=noise, table=TABLE)[0] for noise in (in_tensor, NOISE))
    assert torch.equal(drawn, expected)
    with pytest.raises(ValueError, match="seed"):
        noise_forward(y, noise=NOISE._replace(seed=torch.tensor([1.0])), table=TABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_leave_in_channels_last_whatever_their_strides(dtype):
    y = samples(3, 4, 6)
    for layout in (y, y.contiguous(memory_format=torch.channels_last)):
        network_input, state = noise_forward(layout, noise=NOISE, table=TABLE, dtype=dtype, return_state=True)
        assert network_input.dtype == dtype and state.dtype == torch.float32
        assert network_input.is_contiguous(memory_format=torch.channels_last)
        assert state.is_contiguous(memory_format=torch.channels_last)


def test_no_gradient_flows_and_compiled_calls_equal_eager_ones():
    f, x = samples(3, 4, 6).requires_grad_(), samples(3, 4, 6, seed=1)

    def both(f, x, rows):
        drawn = {"noise": NOISE, "table": Coefficients(rows)}
        reading = Reading(0.8, 1.0, 0.4, 0.0)
        network_input, y = generator_noise_forward(f, x, reading=reading, **drawn, dtype=torch.bfloat16)
        return network_input, y, *noise_forward(y, **drawn, return_state=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(f, x, TABLE.rows)
    for expected, found in zip(both(f, x, TABLE.rows), compiled, strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
        assert not expected.requires_grad and not found.requires_grad


@pytest.mark.parametrize("with_source", [True, False])
def test_operator_is_registered_soundly(with_source):
    y = samples(3, 4, 6)
    arguments = y, y + 1 if with_source else None, 0.8, 0.4, torch.bfloat16, True, TABLE.rows, *NOISE.arguments()
    torch.library.opcheck(torch.ops.rdmd_fast.noise_forward.default, arguments)


def test_chunk_sums_follow_element_order():
    image = torch.arange(2.0 * 3 * 20 * 20).view(2, 3, 20, 20)
    flat = image.permute(0, 2, 3, 1).flatten(1)
    expected = torch.stack((flat[:, :CHUNK].sum(1), flat[:, CHUNK:].sum(1)), 1)
    torch.testing.assert_close(chunk_sums(image), expected)


# -- inject_gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injected_gradient_does_what_backpropagation_would(dtype):
    weight = samples(4).to(dtype).requires_grad_()
    gradient = samples(4, seed=1).to(dtype)
    objective = inject_gradient(weight * 2, gradient, loss_scale=1.0)
    assert objective.item() == 0 and objective.ndim == 0
    objective.backward()
    assert torch.equal(weight.grad, 2 * gradient)


def test_injected_gradient_is_scaled_by_what_arrives_or_refuses_it():
    output, gradient = samples(4).requires_grad_(), samples(4, seed=1)
    (inject_gradient(output, gradient) * 0.25).backward()
    torch.testing.assert_close(output.grad, gradient / 4)
    with pytest.raises(RuntimeError, match="promised"):
        (inject_gradient(output, gradient, loss_scale=1.0) * 0.25).backward()
    with pytest.raises(ValueError, match="gradient is"):
        inject_gradient(output, gradient.bfloat16())


def test_injected_gradient_that_holds_the_loss_scale_is_not_scaled_again():
    output, gradient = samples(4).half().requires_grad_(), samples(4, seed=1).half()
    for upstream in (1.0, 2.0**17):  # DeepSpeed's start at ZeRO 0, and elsewhere
        output.grad = None
        (inject_gradient(output, gradient, loss_scale=2.0**17) * upstream).backward()
        assert torch.equal(output.grad, gradient)
    with pytest.raises(RuntimeError, match="promised"):
        (inject_gradient(output, gradient, loss_scale=2.0**17) * 2.0**16).backward()


def test_a_scale_outside_fp16_is_applied_in_fp32():
    output, gradient = samples(4).half().requires_grad_(), torch.full_like(samples(4), 2**-10).half()
    (inject_gradient(output, gradient) * 2.0**17).backward()
    assert torch.equal(output.grad, torch.full_like(gradient, 2**7))
