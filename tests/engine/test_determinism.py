import json

import pytest
import torch
from torch.nn import functional as F

from rdmd_fast.networks.unet_layers import repeat_pixels
from rdmd_fast.processes.entry import system_input_error


@pytest.fixture
def strict():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def repeat_and_its_gradient(x, gradient):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = repeat_pixels(x)
    (at_x,) = torch.autograd.grad(y, x, gradient)
    return y.detach(), at_x


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_repeated_alike_in_both_modes(layout, strict):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).to(memory_format=layout)
    gradient = torch.randn(2, 3, 8, 10, generator=generator, dtype=torch.float64)
    y, at_x = repeat_and_its_gradient(x, gradient)
    torch.testing.assert_close(y, F.interpolate(x, scale_factor=2, mode="nearest"), rtol=0, atol=0)
    torch.testing.assert_close(at_x, 4 * F.avg_pool2d(gradient, 2), rtol=1e-14, atol=1e-14)
    assert y.is_contiguous(memory_format=torch.channels_last)


RUN = """
import json, os, sys, torch
from torch._inductor import config
from rdmd_fast.trainer import main

assert main(["--config", "configs/toy/gaussian_to_8gaussians.yaml", *sys.argv[1:]]) == 0
flags = [
    torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
    torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled(), config.deterministic,
]
print(json.dumps([*flags, os.environ.get("CUBLAS_WORKSPACE_CONFIG")]))
"""


def test_a_run_with_the_switch_sets_what_pytorch_documents(fork_python, tmp_path):
    options = ["train.steps=1", "rdmd.fake_warmup=0", "validation.every=0", "telemetry.tensorboard=false"]
    child = fork_python(RUN, f"run_dir={tmp_path}/run", "train.deterministic=true", *options)
    said, errors = child.finish()
    assert child.wait(60) == 0, errors
    assert json.loads(said.splitlines()[-1]) == [True, False, False, False, True, ":4096:8"]


def test_an_operation_without_such_a_form_is_named(strict):
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    assert str(system_input_error(raised.value)).startswith("train.deterministic: put_ has no form that adds in one")
