"""DDIB, dual diffusion implicit bridges (Su et al., arXiv 2203.08382), Algorithm 1.

    latent = ODESolve(x; source teacher, 0 → σ0),    y = ODESolve(latent; target teacher, σ0 → 0)

of the probability-flow ODE dx/dσ = (x - D)/σ, by EDM's Heun rule (the paper: DDIM's). The ODE's slope at σ = 0 is 0,
so that encoding begins with x at the lowest level; decoding ends as EDM's sampler does. The paper's σ0 is the noisiest
level; a lower one makes latents that still hold the source's coarse form.
"""

import torch

from rdmd_fast.baselines.options import DDIBOptions
from rdmd_fast.baselines.solvers import Counted, Models, Noise, Translation, level_schedule
from rdmd_fast.samplers import heun_solve


def translate(options: DDIBOptions, models: Models, x: torch.Tensor, noise: Noise) -> Translation:
    """2 (steps - 1) evaluations of the source teacher, 2 steps - 1 of the target's."""
    source, target = Counted(models.source), Counted(models.target)
    levels = level_schedule(options, models.target, options.sigma0)
    latent = heun_solve(source, x, levels[:-1].flip(0))
    state = heun_solve(target, latent, levels)
    return Translation(state.float(), source.evaluations + target.evaluations)
