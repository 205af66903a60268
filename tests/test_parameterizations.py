"""One network in the form of each parameterisation: RDMD's first iterations must not tell them apart."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rdmd_fast.diffusion import DiffusionOptions, LogNormalSigma, Reading, denoise
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.stage_context import StageContext
from rdmd_fast.networks.song_unet import SongUNet
from rdmd_fast.randomness import Philox
from rdmd_fast.rdmd import RDMD, Networks, RDMDOptions

EDM = DiffusionOptions()
FORMS = ["edm", "epsilon", "v", "flow"]
ITERATIONS = 4


class Converted(nn.Module):
    """An EDM network as another form predicts, by the definitions of the forms and not by the coefficient table:

    epsilon = (x_t - alpha D) / sigma,  v = alpha epsilon - sigma D,  flow velocity = epsilon - D, where x_t enters as
    it is and alpha = 1 / sqrt(1 + s^2) (epsilon, v) or 1 / (1 + s) (flow), sigma = s alpha.
    """

    def __init__(self, network: nn.Module, form: str):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, network_input, c_noise, class_labels=None):
        if self.form == "edm":
            return self.network(network_input, c_noise, class_labels)
        level = (4 * c_noise.double()).exp()
        s = level.view(-1, 1, 1, 1)
        alpha = 1 / (1 + s) if self.form == "flow" else 1 / (1 + s**2).sqrt()
        dtype = next(self.network.parameters()).dtype
        state = network_input.double()
        denoised = denoise(self.network, (state / alpha).to(dtype), level, EDM, class_labels, dtype).double()
        epsilon = (state - alpha * denoised) / (s * alpha)
        output = {"epsilon": epsilon, "v": alpha * epsilon - s * alpha * denoised, "flow": epsilon - denoised}
        return output[self.form].to(network_input.dtype)


class Engine:
    """What RDMD asks of a DeepSpeed engine, around Adam; keeps every update's gradient."""

    def __init__(self, module: nn.Module):
        self.module, self.gradients = module, []
        self.guard = SimpleNamespace(before_step=lambda: None, after_step=lambda: None)
        self.optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.0, 0.99), eps=1e-30)

    def __call__(self, *arguments):
        return self.module(*arguments)

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def fp16_enabled(self):
        return False

    def is_gradient_accumulation_boundary(self):
        return True

    def step(self):
        gradient = [parameter.grad.flatten() for parameter in self.module.parameters()]
        self.gradients.append(torch.cat(gradient).double())
        self.optimizer.step()
        self.optimizer.zero_grad()


def network() -> SongUNet:
    """The shape of the digits' network, with weights of which none is near zero, as after training."""
    torch.manual_seed(0)
    made = SongUNet(8, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    return made


def run(form: str, weighting: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of G and of the fake score in the first iterations."""
    diffusion = DiffusionOptions(parameterization=form)
    teacher, fake_score, generator = (Converted(network(), form) for _ in range(3))
    with torch.no_grad():  # G and fake score have left the teacher, or their difference would be zero
        for module, seed in ((fake_score, 1), (generator, 2)):
            torch.manual_seed(seed)
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    source = SimpleNamespace(shape=(3, 8, 8), batch=lambda positions: images[positions % 8])
    telemetry = SimpleNamespace(phase=lambda name: contextlib.nullcontext(), add=lambda *_: None)
    # The fake score's loss is that of its form, c_out² times another's; at one noise level Adam cancels the factor.
    options = RDMDOptions(weighting=weighting, fake_sigma=LogNormalSigma(mean=-0.7, std=1e-9))
    engines = Engine(generator), Engine(fake_score)
    rdmd = RDMD(
        options, diffusion, Reading.of("teacher", diffusion, 1.0), Networks(*engines, teacher), source,
        StageContext(Philox(7), BatchLayout(8, 8, 1, 0, 1), torch.device("cpu"), torch.float32, telemetry),
    )  # fmt: skip
    for step in range(ITERATIONS):
        rdmd.iteration(step)
    return engines[0].gradients, [gradient / gradient.norm() for gradient in engines[1].gradients]


@pytest.fixture(scope="module")
def reference():
    return {weighting: run("edm", weighting) for weighting in ("sigma2", "dmd")}


@pytest.mark.parametrize("weighting", ["sigma2", "dmd"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_first_iterations_have_the_gradients_of_edms_form(form, weighting, reference):
    for mine, expected in zip(run(form, weighting), reference[weighting], strict=True):
        assert len(mine) == ITERATIONS
        for gradient, exact in zip(mine, expected, strict=True):
            assert (gradient - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_converted_network_denoises_as_the_original(form):
    original, diffusion = network().double(), DiffusionOptions(parameterization=form)
    state = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    with torch.no_grad():
        expected = denoise(original, state, sigma, EDM, dtype=torch.float64)
        actual = denoise(Converted(original, form), state, sigma, diffusion, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
