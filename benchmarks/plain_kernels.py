"""The same arithmetic in plain PyTorch, as a careful user would write it from the equations: the baseline.

The turns follow DMD2's formulation (arXiv 2405.14867; DMD, arXiv 2311.18828, Equations 7 and 8): each network is
preconditioned by itself, losses are fp32, the gradient enters autograd through ½‖y - sg(y - g)‖².
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_DATA = 0.5  # EDM


def over_samples(values: Tensor, like: Tensor) -> Tensor:
    """[N] shaped to broadcast over the samples of ``like`` [N, ...]."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def denoiser(network: Callable[[Tensor], Tensor], state: Tensor, sigma: Tensor) -> Tensor:
    """D(x_t; σ) of EDM (arXiv 2206.00364, Equation 7) in fp32, around a network in bf16. ``sigma`` is [N]."""
    sigma = over_samples(sigma, state)
    scale = (sigma**2 + SIGMA_DATA**2).sqrt()
    output = network((state / scale).to(torch.bfloat16))
    return (SIGMA_DATA / scale) ** 2 * state + sigma * SIGMA_DATA / scale * output.float()


def generator_turn(
    generator: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    fake_score: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    transport_weight: float,
    epsilon: Tensor | None = None,
) -> None:
    """Forward and backward of one generator update with the ``dmd`` weighting, generator_sigma 1, squared L2 cost.

    Args:
        generator, teacher, fake_score: raw networks, bf16 [N, ...] to bf16 [N, ...].
        x: sources, float32 [N, ...].
        sigma: float32 [N], data units.
        transport_weight: λ.
        epsilon: the noise, float32 like ``x``; drawn if None.
    """
    y = denoiser(generator, x, torch.ones_like(sigma))
    with torch.no_grad():
        epsilon = torch.randn_like(y) if epsilon is None else epsilon
        state = y + over_samples(sigma, y) * epsilon
        residual_real = y - denoiser(teacher, state, sigma)
        residual_fake = y - denoiser(fake_score, state, sigma)
        normalizer = residual_real.abs().mean(dim=tuple(range(1, y.ndim)), keepdim=True)
        gradient = torch.nan_to_num((residual_real - residual_fake) / normalizer)
        target = y - gradient
    distillation = 0.5 * F.mse_loss(y, target, reduction="sum")
    transport = F.mse_loss(y, x, reduction="sum")
    ((distillation + transport_weight * transport) / len(x)).backward()


def fake_turn(
    fake_score: Callable[[Tensor], Tensor], y: Tensor, sigma: Tensor, epsilon: Tensor | None = None
) -> Tensor:
    """Forward and backward of one fake-score update on outputs ``y``, float32 [N, ...]; returns the loss."""
    epsilon = torch.randn_like(y) if epsilon is None else epsilon
    denoised = denoiser(fake_score, y + over_samples(sigma, y) * epsilon, sigma)
    weight = over_samples((sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2, y)
    loss = (weight * (denoised - y) ** 2).sum() / len(y)
    loss.backward()
    return loss.detach()


def noise_forward(y: Tensor, alpha: Tensor, sigma: Tensor, c_in: Tensor, epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    """c_in (α y + σ ε) in the network's dtype; coefficients broadcast over the samples."""
    return (c_in * (alpha * y + sigma * epsilon)).to(dtype)


def rdmd_gradient(
    f_real: Tensor,
    f_fake: Tensor,
    y: Tensor,
    x: Tensor,
    score_scale: Tensor,
    c_out: Tensor,
    target: Tensor | None,
    transport_weight: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dF_G, ‖g‖² and transport cost a sample), squared L2 cost; ``dmd`` where ``target`` = F* is given.

    Shorter than DMD2's: the two network outputs are subtracted, not the denoised images.
    """
    difference = f_fake.float() - f_real.float()
    if target is not None:
        residual = (target - f_real.float()).abs().mean(dim=tuple(range(1, y.ndim)), keepdim=True)
        score_scale = c_out.sign() / residual
    score_gradient = score_scale * difference
    displacement = y - x
    gradient = (scale / len(y)) * (score_gradient + 2 * transport_weight * displacement)
    statistics = score_gradient.square().flatten(1).sum(1), displacement.square().flatten(1).sum(1)
    return gradient.to(f_real.dtype), *statistics


def denoising_gradient(
    output: Tensor, clean: Tensor, target_clean: Tensor, target_noise: Tensor, epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of the mean loss in the dtype of F, ‖F - F*‖² a sample)."""
    difference = output.float() - (target_clean * clean + target_noise * epsilon)
    return (2 / len(clean) * difference).to(output.dtype), difference.square().flatten(1).sum(1)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + addend) (1 + scale) + shift), as U-Nets write it. scale, shift, addend are [N, C]."""
    if addend is not None:
        x = x + addend[:, :, None, None].to(x.dtype)
    normed = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        normed = torch.addcmul(shift[:, :, None, None].to(x.dtype), normed, 1 + scale[:, :, None, None].to(x.dtype))
    return F.silu(normed)


def ema_update(averages: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """average += weight (source - average), tensor by tensor."""
    for average, source in zip(averages, sources, strict=True):
        average.lerp_(source, weight)


def image_normalize(images: Tensor, dtype: torch.dtype, flip: Tensor | None = None) -> Tensor:
    """u / 127.5 - 1; ``flip`` is bool [N], which images to mirror."""
    normalized = (images.float() / 127.5 - 1).to(dtype)
    if flip is None:
        return normalized
    return torch.where(flip[:, None, None, None], normalized.flip(3), normalized)
