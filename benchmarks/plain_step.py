"""One RDMD iteration in plain PyTorch, as the published distillation code bases are organised: ``benchmarks.step``'s
yardstick.

In the manner of DMD2 and FastGen: each update rolls the generator out for itself, each network is preconditioned on its
own, losses are written in eager fp32, the score difference enters autograd through ½‖y - sg(y - g)‖², networks run in
fp32 or under autocast, gradient norms are read parameter by parameter for logging, Adam has fp32 weights, and the
average of the weights is a loop over them. Adam is as PyTorch chooses it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_kernels import over_samples


class PlainRDMD:
    """The three networks, their optimizers and one iteration over them.

    Args:
        generator, fake_score: raw networks, called (input, c_noise), with fp32 weights.
        teacher: the same, or a denoiser called (x_t, sigma [N]) if ``exact_teacher``.
        config: of the run that ours is built from.
        residual_generator: G(x) = x + F(x) instead of the denoiser at generator_sigma.
    """

    def __init__(
        self,
        generator: nn.Module,
        fake_score: nn.Module,
        teacher: Callable,
        config,
        sigma_data: float,
        exact_teacher: bool = False,
        residual_generator: bool = False,
    ):
        self.generator, self.fake_score, self.teacher = generator, fake_score, teacher
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.options, self.sigma_data = config.rdmd, sigma_data
        self.exact_teacher, self.residual_generator = exact_teacher, residual_generator
        self.device = next(generator.parameters()).device
        self.autocast = config.train.dtype == "bf16"
        self.batch = config.train.global_batch_size
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=options.lr, betas=tuple(options.betas), eps=options.eps)
            for network, options in (
                (generator, self.options.generator_optimizer),
                (fake_score, self.options.fake_optimizer),
            )
        ]
        self.step, self.logged = 0, {}

    def begin_update(self) -> None:
        """Nothing; CUDA graphs would want to know."""

    def iteration(self, draw: Callable[[], Tensor]) -> None:
        """One generator update and ``fake_updates`` of the fake score; ``draw`` gives the next sources."""
        self.generator_update(draw())
        for _ in range(self.options.fake_updates):
            self.fake_update(draw())
        self.update_average()
        self.step += 1

    def generator_update(self, x: Tensor, sigma: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        self.begin_update()
        y = self.translate(x)
        gradient = self.score_gradient(y, sigma, noise)
        # Half the squared distance to a constant has the score gradient as its own.
        distillation = 0.5 * F.mse_loss(y, (y - gradient).detach(), reduction="sum") / len(y)
        transport = F.mse_loss(y, x, reduction="sum") / len(y)
        loss = distillation + self.options.transport_weight * transport
        self.update(0, self.generator, loss)
        self.logged |= {
            "score_gradient_square": gradient.square().sum().item() / len(y), "transport_cost": transport.item(),
        }  # fmt: skip
        return y.detach()

    @torch.no_grad()
    def score_gradient(self, y: Tensor, sigma: Tensor | None, noise: Tensor | None) -> Tensor:
        sigma = self.draw_sigma(self.options.sigma, len(y)) if sigma is None else sigma
        noise = torch.randn_like(y) if noise is None else noise
        state = y + over_samples(sigma, y) * noise
        real = self.teacher(state, sigma) if self.exact_teacher else self.denoise(self.teacher, state, sigma)
        fake = self.denoise(self.fake_score, state, sigma)
        if self.options.weighting == "dmd":
            normalizer = (y - real).abs().mean(dim=tuple(range(1, y.ndim)), keepdim=True)
            return torch.nan_to_num((fake - real) / normalizer)
        weight = 1 / sigma**2 if self.options.weighting == "uniform" else torch.ones_like(sigma)
        return over_samples(weight, y) * (fake - real)

    def fake_update(
        self, x: Tensor, sigma: Tensor | None = None, noise: Tensor | None = None, y: Tensor | None = None
    ) -> None:
        self.begin_update()
        if y is None:
            with torch.no_grad():
                y = self.translate(x)
        fake_sigma = self.options.fake_sigma or self.options.sigma
        sigma = self.draw_sigma(fake_sigma, len(y)) if sigma is None else sigma
        noise = torch.randn_like(y) if noise is None else noise
        denoised = self.denoise(self.fake_score, y + over_samples(sigma, y) * noise, sigma)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        loss = (over_samples(weight, y) * (denoised - y) ** 2).sum() / len(y)
        self.update(1, self.fake_score, loss)
        self.logged["fake_loss"] = loss.item()

    def translate(self, x: Tensor) -> Tensor:
        if self.residual_generator:
            return x + self.network(self.generator, x, torch.zeros(len(x), device=self.device))
        sigma = torch.full((len(x),), self.options.generator_sigma, device=self.device)
        return self.denoise(self.generator, x, sigma)

    def denoise(self, network: nn.Module, state: Tensor, sigma: Tensor) -> Tensor:
        """EDM's D(x_t; σ) (arXiv 2206.00364, Equation 7)."""
        level = over_samples(sigma, state)
        total = (level**2 + self.sigma_data**2).sqrt()
        output = self.network(network, state / total, sigma.log() / 4)
        return (self.sigma_data / total) ** 2 * state + level * self.sigma_data / total * output

    def network(self, network: nn.Module, x: Tensor, c_noise: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = network(x, c_noise)
        return output.float()

    def draw_sigma(self, options, count: int) -> Tensor:
        if options.kind == "lognormal":
            return (options.mean + options.std * torch.randn(count, device=self.device)).exp()
        low, high = math.log(options.sigma_min), math.log(options.sigma_max)
        return (low + (high - low) * torch.rand(count, device=self.device)).exp()

    def update(self, index: int, network: nn.Module, loss: Tensor) -> None:
        self.optimizers[index].zero_grad()
        loss.backward()
        squares = [p.grad.norm().item() ** 2 for p in network.parameters() if p.grad is not None]
        self.logged["generator_norm" if index == 0 else "fake_norm"] = math.sqrt(sum(squares))
        self.optimizers[index].step()

    @torch.no_grad()
    def update_average(self) -> None:
        seen = (self.step + 1) * self.batch
        half_life = min(self.options.ema.half_life, seen * self.options.ema.ramp)
        decay = 0.5 ** (self.batch / half_life)
        for average, parameter in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            average.copy_(parameter.lerp(average, decay))
