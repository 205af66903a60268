"""Exact denoisers in the place of a raw network: ``score(network_input, c_noise, class_labels)`` returns F.

An analytic denoiser returns D; F = (D - c_skip x_t) / c_out makes it one of the family, so that the rdmd stage sees
no difference. All of it is float64: the difference of two scores at small σ̃ is divided by σ̃².
"""

from collections.abc import Callable

import torch

from rdmd_fast.diffusion import DiffusionOptions


class AnalyticScore(torch.nn.Module):
    """F of ``denoiser(x, sigma) -> D`` (variance-exploding form) under EDM's parameterisation.

    ``forward`` takes the scaled input [N, D] and c_noise = ln(σ̃)/4 [N], and returns F float64 [N, D].
    """

    def __init__(self, denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], diffusion: DiffusionOptions):
        super().__init__()
        if diffusion.parameterization != "edm":
            raise ValueError("an analytic teacher is read in edm's parameterisation")
        self.denoiser, self.sigma_data = denoiser, diffusion.sigma_data

    def forward(self, network_input: torch.Tensor, c_noise: torch.Tensor, class_labels=None) -> torch.Tensor:
        sigma = (4 * c_noise.double()).exp()
        level = (sigma**2 + self.sigma_data**2).sqrt()[:, None]
        state = network_input.double() * level
        denoised = self.denoiser(state, sigma).double()
        c_skip, c_out = (self.sigma_data / level) ** 2, sigma[:, None] * self.sigma_data / level
        return (denoised - c_skip * state) / c_out
