"""Forward process fused with the network's input scaling.

    x_t   = F(y, t) = α y + σ ε                    (RDMD, arXiv 2406.14762, Section 3; EDM has α = 1)
    input = c_in x_t = (c_in α) y + (c_in σ) ε

ε is a pure function of (seed, stream, sample position, element): see philox.py. Whoever needs it again draws it
again instead of storing it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .coefficients import Coefficients
from .philox import normal


class CounterNoise(NamedTuple):
    """Standard normal noise named by its counters.

    Attributes:
        seed: 64-bit key of the run.
        stream: 32-bit word that keeps the uses of randomness apart.
        positions: int64 [N], each sample's position in its stream since the run began.
        drawn: float32 [N, ...] of the samples' shape where it was drawn ahead (toys, in large blocks), else None.
    """

    seed: int
    stream: int
    positions: torch.Tensor
    drawn: torch.Tensor | None = None

    def values(self, like: torch.Tensor) -> torch.Tensor:
        """The noise as float32 in the shape of ``like``; images count their elements in (h, w, c) order."""
        if self.drawn is not None:
            return self.drawn
        shape = like.shape
        flat = normal(self.seed, self.stream, self.positions.to(like.device), like[0].numel())
        if like.ndim != 4:
            return flat.view(shape)
        return flat.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


def noise_forward(
    y: torch.Tensor,
    noise: CounterNoise,
    table: Coefficients,
    dtype: torch.dtype | None = None,
    return_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Noise ``y`` and scale it for the network.

    Args:
        y: clean samples [N, ...], any floating dtype, data units.
        noise: where ε comes from.
        table: coefficients of the N samples.
        dtype: dtype of the network input; that of ``y`` if None.
        return_state: also return x_t as float32.

    Returns:
        (network input [N, ...] in ``dtype``, x_t or None).
    """
    epsilon = noise.values(y)
    clean = y.float()
    c_in, alpha, sigma = (table.row(name, y) for name in ("c_in", "alpha", "sigma"))
    network_input = (c_in * alpha * clean).addcmul_(c_in * sigma, epsilon).to(dtype or y.dtype)
    state = (alpha * clean).addcmul_(sigma, epsilon) if return_state else None
    return network_input, state
