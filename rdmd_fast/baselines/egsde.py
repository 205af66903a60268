"""EGSDE (Zhao et al., arXiv 2207.06635), Algorithm 1: SDEdit whose score loses the gradient of two energies.

    x_σ0 = x + σ0 z,    y_s = y_t + (σ_t² - σ_s²) (score(y_t) - ∇E(y_t, x, t)) + sqrt(σ_t² - σ_s²) z
    E = λ_s E_s + λ_i E_i

E_s, the realism expert, is the cosine similarity of the features of y_t and x_t at each place, averaged over places:
features that tell the domains apart are pushed away from the source's. E_i, the faithful expert, is
‖φ_N(α y_t) - φ_N(α x_t)‖². Both take one noised source x_t = x + σ_t z a step for the paper's expectation.

The paper's states are x_VP = α x_VE with α = 1/sqrt(1 + σ²), and so is our E_i: with y_VE = y_VP/α the drift
β ∇_VP E dt becomes exactly (σ_t² - σ_s²) ∇_VE E, so that λ_s and λ_i mean what they do in the paper. E_i is a sum over
elements and grows with the image; the paper's λ_i is for 256×256. Ours differs in the levels (EDM's), in φ_N
(``low_pass``) and in the classifier (see ``energy``). The weights at 0 leave SDEdit, bit for bit.
"""

import torch

from rdmd_fast.baselines.options import EGSDEOptions
from rdmd_fast.baselines.solvers import Counted, Models, Noise, Translation, level_schedule, low_pass, reverse_sde


def translate(options: EGSDEOptions, models: Models, x: torch.Tensor, noise: Noise) -> Translation:
    """``steps`` evaluations, and twice as many of the energy network if lambda_s > 0."""
    target, x = Counted(models.target), x.double()
    levels = level_schedule(options, models.target, options.sigma0)

    def energy_gradient(step: int, y: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        source = x + level * noise.reference(step)
        gradient = torch.zeros_like(y)
        if options.lambda_s:
            gradient += options.lambda_s * realism_gradient(models.energy, y, source, level)
        if options.lambda_i:
            gradient += options.lambda_i * faithful_gradient(y, source, level, options.factor)
        return gradient

    start = x + levels[0] * noise.start()
    guide = energy_gradient if options.lambda_s or options.lambda_i else None
    state = reverse_sde(target, start, levels, options.solver, noise, guide)
    return Translation(state.float(), target.evaluations, 2.0 * options.steps if options.lambda_s else 0.0)


def realism(energy, y: torch.Tensor, source: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """E_s of states y and noised sources at ``level``, [N]: in [-1, 1], in the energy network's dtype."""
    features = energy.features(y, level), energy.features(source, level)
    return torch.nn.functional.cosine_similarity(*features, dim=1).mean((1, 2))


@torch.enable_grad()
def realism_gradient(energy, y: torch.Tensor, source: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """∇_y E_s, float64 [N, C, H, W]."""
    y = y.detach().to(energy.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(realism(energy, y, source, level).sum(), y)
    return gradient.double()


def faithful(y: torch.Tensor, source: torch.Tensor, level: torch.Tensor, factor: int) -> torch.Tensor:
    """E_i, [N]."""
    return low_pass(y - source, factor).square().sum((1, 2, 3)) / (1 + level**2)


def faithful_gradient(y: torch.Tensor, source: torch.Tensor, level: torch.Tensor, factor: int) -> torch.Tensor:
    """∇_y E_i = 2 α² φ_N(y - x_t), since φ_N is an orthogonal projection."""
    return 2 * low_pass(y - source, factor) / (1 + level**2)
