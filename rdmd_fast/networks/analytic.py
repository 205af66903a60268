"""Exact denoisers of Gaussians and Gaussian mixtures, in the variance-exploding form x = x0 + sigma eps.

For x0 ~ N(mu, C) and S = C + sigma^2 I, the posterior mean is E[x0 | x] = mu + C S^-1 (x - mu); for a mixture
it is the average of the components' posterior means, weighted by w_k N(x; mu_k, S_k). By Tweedie's formula it
equals x + sigma^2 grad log p_sigma(x) (Efron 2011).

All is computed in fp64: at sigma = 1e-3 the log weights reach 1e7, whose fp32 rounding alone would move the
mixture weights. In fp64 the distances can come from one matrix product, which is fast too.
"""

import math

import torch
from torch import Tensor, nn

from rdmd_fast.errors import InputError


def gaussian_denoiser(x: Tensor, sigma: Tensor | float, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[x0 | x0 + sigma eps = x] for x0 ~ N(mean, covariance), differentiable in every argument.

    The fake score of a linear generator y = A x + b on N(m, C) is this at N(A m + b, A C A^T).

    Args:
        x: [N, D].
        sigma: noise level in data units, > 0, [N] or a scalar.
        mean: [D].
        covariance: [D, D], symmetric and positive semi-definite (not checked).

    Returns:
        [N, D] in x's dtype.
    """
    variance = noise_variance(sigma, x)
    mean, covariance = mean.double(), covariance.double()
    deviation = x.double() - mean
    if x.shape[1] == 2:
        # Cayley-Hamilton in 2-D, no cancellation: C (C + s I)^-1 = (det C I + s C) / (s^2 + s tr C + det C).
        determinant = covariance[0, 0] * covariance[1, 1] - covariance[0, 1] * covariance[1, 0]
        trace = covariance[0, 0] + covariance[1, 1]
        shrunk = determinant * deviation + variance * (deviation @ covariance)
        shrunk = shrunk / (determinant + variance * (trace + variance))
    elif torch.is_grad_enabled() and covariance.requires_grad:
        # The gradient of eigh is undefined at equal eigenvalues, which A = r I has.
        noisy = covariance + variance[..., None] * torch.eye(len(mean), dtype=torch.float64, device=x.device)
        noisy = noisy.expand(len(x), -1, -1)
        shrunk = deviation - variance * torch.linalg.solve(noisy, deviation[..., None])[..., 0]
    else:
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        gain = eigenvalues / (eigenvalues + variance)
        shrunk = (gain * (deviation @ eigenvectors)) @ eigenvectors.t()
    return (mean + shrunk).to(x.dtype)


class GaussianMixtureDenoiser(nn.Module):
    """E[x0 | x0 + sigma eps = x] for a mixture of K Gaussians: an exact teacher for the toys.

    Buffers are fp64; keep them so (`.to(device)` is fine, `.bfloat16()` rounds the means).

    Args:
        means: [K, D].
        covariances: [K, D, D] positive semi-definite, or [K] variances >= 0 of isotropic components.
        weights: [K], non-negative; normalised here. None means equal weights.

    Raises:
        InputError: if shapes disagree or a weight or covariance is negative.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None):
        super().__init__()
        means, covariances = torch.as_tensor(means).double(), torch.as_tensor(covariances).double()
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        check_mixture(means, covariances, weights)
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        self.register_buffer("weights", weights.double() / weights.double().sum())
        self.isotropic = covariances.ndim == 1
        self.prepare()
        self.register_load_state_dict_post_hook(lambda module, _: module.prepare())

    def prepare(self) -> None:
        """Derive what `forward` reads from the covariances; runs again when a state dict is loaded."""
        if self.isotropic:
            # One common variance spares N x K logarithms, the dearest operation in fp64.
            shared = bool((self.covariances == self.covariances[0]).all())
            self.register_buffer("variances", self.covariances[:1] if shared else self.covariances, persistent=False)
            return
        eigenvalues, eigenvectors = torch.linalg.eigh(self.covariances)
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0), persistent=False)
        self.register_buffer("eigenvectors", eigenvectors, persistent=False)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Denoise x.

        Args:
            x: [N, D].
            sigma: noise level in data units, > 0, [N] or a scalar.
            class_labels: ignored.

        Returns:
            [N, D] in x's dtype.
        """
        variance = noise_variance(sigma, x)
        denoise = self.denoise_isotropic if self.isotropic else self.denoise_general
        return denoise(x.double(), variance).to(x.dtype)

    def denoise_isotropic(self, x: Tensor, variance: Tensor) -> Tensor:
        total = self.variances + variance  # [N, K], or [N, 1] if all variances are equal
        # log(w_k N(x; mu_k, total)), built in place: fresh fp64 [N, K] memory costs more than the arithmetic.
        logits = torch.addmm(-0.5 * self.means.square().sum(1), x, self.means.t())
        logits.sub_(0.5 * x.square().sum(1, keepdim=True)).div_(total)
        logits.add_(self.weights.log()).sub_(0.5 * x.shape[1] * total.log())
        posterior = logits.softmax(1)
        pull = variance / total  # the share of the way from x to a mean
        if pull.shape[1] == 1:
            return torch.lerp(x, posterior @ self.means, pull)
        pull = posterior * pull
        return x * (1 - pull.sum(1, keepdim=True)) + pull @ self.means

    def denoise_general(self, x: Tensor, variance: Tensor) -> Tensor:
        components, dim = self.means.shape
        if components == 1 and dim == 2:
            return gaussian_denoiser(x, variance.sqrt(), self.means[0], self.covariances[0])
        basis = self.eigenvectors.permute(1, 0, 2).reshape(dim, components * dim)
        offsets = torch.einsum("kd,kde->ke", self.means, self.eigenvectors).flatten()
        coordinates = torch.addmm(-offsets, x, basis).view(-1, components, dim)  # [N, K, D] in each eigenbasis
        total = self.eigenvalues + variance[..., None]
        logits = self.weights.log() - 0.5 * (total.log() + coordinates.square() / total).sum(2)
        posterior = logits.softmax(1)
        shrunk = posterior[..., None] * (self.eigenvalues / total) * coordinates
        return posterior @ self.means + shrunk.flatten(1) @ basis.t()


def noise_variance(sigma: Tensor | float, x: Tensor) -> Tensor:
    """sigma^2 in fp64 on x's device, [N, 1] or [1, 1]."""
    return torch.as_tensor(sigma, dtype=torch.float64, device=x.device).square().reshape(-1, 1)


def check_mixture(means: Tensor, covariances: Tensor, weights: Tensor) -> None:
    if means.ndim != 2 or len(means) == 0:
        raise InputError(f"Gaussian mixture: means have shape {list(means.shape)}: give [components, dim]")
    components, dim = means.shape
    if list(covariances.shape) not in ([components], [components, dim, dim]):
        raise InputError(
            f"Gaussian mixture: covariances have shape {list(covariances.shape)}: give [{components}] "
            f"variances or [{components}, {dim}, {dim}] matrices"
        )
    if list(weights.shape) != [components] or not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise InputError(f"Gaussian mixture: weights must be {components} non-negative numbers, not all zero")
    if covariances.ndim == 1:
        valid = (covariances >= 0).all()
    else:
        size = covariances.abs().amax()
        symmetric = (covariances - covariances.mT).abs().amax() <= 1e-6 * size
        valid = symmetric and torch.linalg.eigvalsh(covariances).amin() >= -1e-6 * size
    if not valid:
        raise InputError(
            "Gaussian mixture: a covariance is negative or not symmetric: give positive semi-definite ones"
        )
