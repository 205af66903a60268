"""CycleDiffusion (Wu and De la Torre, arXiv 2210.05559), Algorithm 1: the DPM-Encoder, two teachers.

The encoder draws a chain of the source from q and reads off the noise that the source teacher would have needed, which
the target teacher then takes in its place:

    x_σ0 = x + σ0 z,    x_s ~ q(x_s | x_t, x),    ε_s = (x_s - μ_S(x_t)) / d_s
    y_σ0 = x_σ0,        y_s = μ_T(y_t) + d_s ε_s

with DDIM's step of noise η in variance-exploding form (x_VE = x_VP/α):

    μ(x_t) = D + sqrt(σ_s² - d_s²)/σ_t (x_t - D),    d_s = η σ_s sqrt(1 - σ_s²/σ_t²)

q(x_s | x_t, x) has the same mean with x for D. Both chains go down together, so that no list of noise is kept, and
d_s ε_s is never divided by d_s: the last step, where d_s = 0, carries the residual x - D_S(x_t) over as the others do
theirs. One teacher in both places therefore returns x. Ours differs in the levels, EDM's.
"""

import itertools

import torch

from rdmd_fast.baselines.options import CycleDiffusionOptions
from rdmd_fast.baselines.solvers import Counted, Models, Noise, Translation, level_schedule


def translate(options: CycleDiffusionOptions, models: Models, x: torch.Tensor, noise: Noise) -> Translation:
    """``steps`` evaluations of each teacher."""
    source, target, x = Counted(models.source), Counted(models.target), x.double()
    levels = level_schedule(options, models.target, options.sigma0)
    chain = output = x + levels[0] * noise.start()
    for step, (now, following) in enumerate(itertools.pairwise(levels)):
        deviation = options.eta * following * (1 - (following / now) ** 2).sqrt()
        kept = (following**2 - deviation**2).sqrt() / now
        source_clean, target_clean = source.double(chain, now), target.double(output, now)
        drawn = x + kept * (chain - x) + deviation * noise.step(step)
        residual = drawn - (source_clean + kept * (chain - source_clean))
        output = target_clean + kept * (output - target_clean) + residual
        chain = drawn
    return Translation(output.float(), source.evaluations + target.evaluations)
