import pytest
import torch

from rdmd_fast.diffusion import DiffusionOptions, Reading, coefficients
from rdmd_fast.kernels import _dispatch
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.ema_update import ema_update
from rdmd_fast.kernels.group_norm_silu import branching_group_norm_silu, group_norm_silu
from rdmd_fast.kernels.image_normalize import image_normalize
from rdmd_fast.kernels.noise_forward import CounterNoise, generator_noise_forward, noise_forward
from rdmd_fast.kernels.philox import normal
from rdmd_fast.kernels.rdmd_gradient import generator_gradient
from rdmd_fast.kernels.scaled_residual import scaled_residual


def every_operation(device):
    """Results and gradients of each operation, a flat list."""
    samples = torch.ones(2, 8, 4, 6, device=device).contiguous(memory_format=torch.channels_last)
    table = coefficients(torch.ones(2, dtype=torch.float64), DiffusionOptions())
    drawn = {"table": table._replace(rows=table.rows.to(device))}
    drawn["noise"] = CounterNoise(0, 0, torch.arange(2, device=device))
    reading = Reading(0.8, 1.0, -0.4, 0.0)
    results = noise_forward(samples, **drawn, dtype=torch.bfloat16, return_state=True)
    results += generator_noise_forward(samples, samples, reading=reading, **drawn)
    gradient, statistics = generator_gradient(
        f_real=samples, f_fake=samples, f_generator=samples.bfloat16(), x=samples, reading=reading, **drawn,
        transport_weight=0.1,
    )  # fmt: skip
    results += gradient, *statistics, *denoising_gradient(samples.bfloat16(), samples, **drawn)
    results += (normal(0, 0, drawn["noise"].positions, 5),)
    images = torch.ones(2, 3, 4, 6, dtype=torch.uint8, device=device)
    results += (image_normalize(images, torch.bfloat16, drawn["noise"]),)
    average = [torch.ones(3, device=device)]
    ema_update(average, average, 0.1)
    x, weight, bias = (part.detach().requires_grad_() for part in (samples, samples[0, :, 0, 0], samples[0, :, 0, 0]))
    past = branching_group_norm_silu(x, weight, bias, 4, 1e-5)
    total = scaled_residual(group_norm_silu(past[0], weight, bias, 4, 1e-5), past[1], 0.5)
    return [*results, *average, total, *torch.autograd.grad(total, (x, weight, bias), samples)]


def test_shapes_are_those_of_the_results():
    results = every_operation("cpu")
    for setting in ("triton", "auto"):
        with pytest.MonkeyPatch.context() as patch, _dispatch.using("shapes"):
            patch.setenv("RDMD_KERNELS", setting)
            found = every_operation("meta")
            assert _dispatch.backend("cpu") == "shapes" and not _dispatch.computes()
        for result, shape in zip(results, found, strict=True):
            assert shape.is_meta and (shape.shape, shape.dtype) == (result.shape, result.dtype)
            assert shape.stride() == result.stride()
    assert _dispatch.backend("cpu") == "reference" and _dispatch.computes()


def test_unknown_settings_are_refused(monkeypatch):
    for setting in ("fast", "shapes"):
        monkeypatch.setenv("RDMD_KERNELS", setting)
        with pytest.raises(RuntimeError, match="set it to auto, triton or reference"):
            _dispatch.backend("cpu")
