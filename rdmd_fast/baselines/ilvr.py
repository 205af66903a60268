"""ILVR (Choi et al., arXiv 2108.02938), Algorithm 1: a chain from noise whose low frequencies are the source's.

    x'_s ~ p(x_s | x_t),    y_s = x + σ_s z,    x_s = x'_s + φ_N(y_s - x'_s)

with DDPM's ancestral step for p. φ_N is linear, so that the paper's equations, which are for x_VP, hold for
x_VE = x_VP/α as they stand. Substitution goes on in every step to a level s of at least ``stop`` (the paper's range of
conditioning steps): with stop = 0 to the last one, whose output has the source's φ_N. Ours differs in φ_N
(``low_pass``) and in the levels, EDM's; ``sigma0`` is not the paper's.
"""

import itertools

import torch

from rdmd_fast.baselines.options import ILVROptions
from rdmd_fast.baselines.solvers import (
    Counted,
    Models,
    Noise,
    Translation,
    level_schedule,
    low_pass,
    reverse_deviation,
    reverse_mean,
)


def translate(options: ILVROptions, models: Models, x: torch.Tensor, noise: Noise) -> Translation:
    """``steps`` evaluations."""
    target, x = Counted(models.target), x.double()
    levels = level_schedule(options, models.target, options.sigma0)
    state = levels[0] * noise.start() + (0 if options.sigma0 is None else x)
    for step, (now, following) in enumerate(itertools.pairwise(levels)):
        mean = reverse_mean(state, target.double(state, now), now, following)
        state = mean + reverse_deviation(now, following, "ancestral") * noise.step(step)
        if following >= options.stop:
            state = state + low_pass(x + following * noise.reference(step) - state, options.factor)
    return Translation(state.float(), target.evaluations)
