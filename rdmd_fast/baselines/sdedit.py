"""SDEdit (Meng et al., arXiv 2108.01073), Algorithm 1: the variance-exploding SDE.

    x_σ0 = x + σ0 z,    then for falling levels    x_s = x_t + (σ_t² - σ_s²) score(x_t) + sqrt(σ_t² - σ_s²) z

with score = (D(x_t) - x_t)/σ_t² of the target teacher. Ours differs in the levels: EDM's instead of equal steps of t
in a geometric σ(t). ``ancestral`` and ``ode`` are not the paper's.
"""

import torch

from rdmd_fast.baselines.options import SDEditOptions
from rdmd_fast.baselines.solvers import Counted, Models, Noise, Translation, level_schedule, reverse_sde
from rdmd_fast.samplers import heun_solve


def translate(options: SDEditOptions, models: Models, x: torch.Tensor, noise: Noise) -> Translation:
    """``steps`` evaluations, 2 steps - 1 with ``ode``."""
    target = Counted(models.target)
    levels = level_schedule(options, models.target, options.sigma0)
    state = x.double() + levels[0] * noise.start()
    if options.solver == "ode":
        state = heun_solve(target, state, levels)
    else:
        state = reverse_sde(target, state, levels, options.solver, noise)
    return Translation(state.float(), target.evaluations)
