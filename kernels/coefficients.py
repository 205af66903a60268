"""The per-sample coefficient table that every fused operation reads.

Any diffusion network F is read as a denoiser of the state x_t = α y + σ ε,

    D(x_t) = c_skip x_t + c_out F(c_in x_t; c_noise),

and EDM, ε-, v- and flow-matching networks differ in these numbers only. Two further rows follow from them. The
regression target of F for a clean sample y is

    F* = (y - c_skip x_t) / c_out = target_clean y + target_noise ε,

with target_clean = (1 - c_skip α) / c_out and target_noise = -c_skip σ / c_out. Kept as rows of their own they are
computed in float64, where 1 - c_skip α does not cancel, and x_t need not be formed to obtain a loss.

The last row, score_scale = ω (α²/σ²) c_out, turns F_fake - F_real into the KL gradient of the RDMD objective.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from rdmd_fast.kernels._dispatch import tl

ROWS = (
    "alpha",
    "sigma",
    "c_skip",
    "c_out",
    "c_in",
    "c_noise",
    "target_clean",
    "target_noise",
    "score_scale",
)
# The rows by name for kernels, which read no globals but constexprs.
ALPHA, SIGMA, C_OUT, C_IN = (tl.constexpr(ROWS.index(name)) for name in ("alpha", "sigma", "c_out", "c_in"))
TARGET_CLEAN, TARGET_NOISE = tl.constexpr(ROWS.index("target_clean")), tl.constexpr(ROWS.index("target_noise"))
SCORE_SCALE = tl.constexpr(ROWS.index("score_scale"))


class Reading(Protocol):
    """How the raw output F_G of a generator's network is read: y = skip x + scale F_G."""

    @property
    def skip(self) -> float: ...

    @property
    def scale(self) -> float: ...


class Coefficients(NamedTuple):
    """Nine coefficients for each of N samples, one row each (the order of ``ROWS``).

    Attributes:
        rows: float32 [9, N], contiguous, on the device of the samples.
    """

    rows: torch.Tensor

    @classmethod
    def from_float64(cls, alpha, sigma, c_skip, c_out, c_in, c_noise, omega, device="cpu") -> Coefficients:
        """Build the table from float64 CPU tensors [N], rounding once."""
        score_scale = omega * (alpha / sigma) ** 2 * c_out
        target_clean = (1 - c_skip * alpha) / c_out
        target_noise = -c_skip * sigma / c_out
        rows = torch.stack(
            (alpha, sigma, c_skip, c_out, c_in, c_noise, target_clean, target_noise, score_scale)
        ).float()
        if torch.device(device).type == "cuda":
            # A pinned source makes the copy asynchronous: the host runs on.
            rows = rows.pin_memory().to(device, non_blocking=True)
        return cls(rows)

    def row(self, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """One coefficient as [N], or shaped to broadcast over the samples of ``like`` [N, ...]."""
        values = self.rows[ROWS.index(name)]
        return values if like is None else values.view(-1, *(1,) * (like.ndim - 1))

    @property
    def c_noise(self) -> torch.Tensor:
        """float32 [N]: what the network receives as its noise level."""
        return self.row("c_noise")
