"""Denoising score matching in the network's own output (EDM, arXiv 2206.00364, Equation 8; RDMD, Equation 7).

    loss_n = (1/c_out²) ‖D(y_t) - y‖² = ‖F - F*‖²,   F* = target_clean y + target_noise ε

summed over a sample's elements. The weight 1/c_out² is EDM's (σ² + σ_data²)/(σ σ_data)². The gradient
2 (F - F*) is computed in the forward pass, where both operands are at hand.
"""

from __future__ import annotations

import torch

from .coefficients import Coefficients
from .noise_forward import CounterNoise


class _DenoisingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, clean, epsilon, table):
        target = table.row("target_clean", clean) * clean.float()
        target.addcmul_(table.row("target_noise", clean), epsilon)
        difference = output.float() - target
        ctx.save_for_backward(difference)
        ctx.output_dtype = output.dtype
        return difference.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx, loss_gradient):
        (difference,) = ctx.saved_tensors
        scale = (2 * loss_gradient).view(-1, *(1,) * (difference.ndim - 1))
        return (difference * scale).to(ctx.output_dtype), None, None, None


def denoising_loss(output: torch.Tensor, clean: torch.Tensor, noise: CounterNoise, table: Coefficients) -> torch.Tensor:
    """Per-sample loss of a network output, differentiable in it.

    Args:
        output: raw network output F [N, ...] for the noised samples, any floating dtype.
        clean: clean samples y [N, ...], data units; no gradient flows to them.
        noise: the noise that made y_t.
        table: coefficients of the N samples.

    Returns:
        float32 [N]: sums over each sample's elements.
    """
    return _DenoisingLoss.apply(output, clean.detach(), noise.values(clean), table)
