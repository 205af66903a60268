"""The teacher stage: denoising score matching on the target domain (EDM, arXiv 2206.00364, Section 5)."""

from collections.abc import Callable

import torch
from pydantic import Field

from rdmd_fast.diffusion import DiffusionOptions, LogNormalSigma, SigmaOptions
from rdmd_fast.engine.ema import EMAOptions
from rdmd_fast.engine.engine import loss_scale, take_step
from rdmd_fast.engine.options import OptimizerOptions
from rdmd_fast.engine.stage_context import StageContext, backpropagate, timed
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.noise_forward import noise_forward
from rdmd_fast.options import Options
from rdmd_fast.randomness import Stream


class TeacherStageOptions(Options):
    """Training of the teacher."""

    sigma: SigmaOptions = Field(default_factory=LogNormalSigma, description="distribution of σ̃ (EDM)")
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="dropout while training; unset: the network's own. Fine-tuning on few images wants more (EDM: 0.05 "
        "for FFHQ's 70,000 images, 0.25 for AFHQv2's 15,000)",
    )
    ema: EMAOptions = Field(default_factory=lambda: EMAOptions(half_life=500_000.0))


class TeacherStage:
    """One network and one update of it at a time.

    Args:
        network: DeepSpeed engine of a raw network.
        target: has ``batch(positions)`` and ``shape``.
        labels: maps positions, int64 [N], to one-hot rows [N, classes]; None for a network without classes.
    """

    def __init__(
        self,
        options: TeacherStageOptions,
        diffusion: DiffusionOptions,
        network,
        target,
        labels: Callable[[torch.Tensor], torch.Tensor | None],
        context: StageContext,
    ):
        self.network, self.target, self.labels, self.context = network, target, labels, context
        self.process = context.forward_process(
            options.sigma, diffusion, target.shape, streams=(Stream.TEACHER_SIGMA, Stream.TEACHER_NOISE)
        )

    def iteration(self, step: int) -> None:
        """Denoise the targets at positions step · batch …; ``step`` counts from 0."""
        self.context.begin_update()
        for micro in range(self.context.layout.accumulation):
            y, class_labels, table, noise = self._draw(step, micro)
            with self.context.phase("losses"):
                network_input, _ = noise_forward(y, noise=noise, table=table, dtype=self.context.dtype)
            output = self._forward(network_input, table.c_noise, class_labels)
            with self.context.phase("losses"):
                # of (1/c_out²) ‖D(y_t) - y‖² / B with respect to F
                gradient, losses = denoising_gradient(
                    output, y, noise=noise, table=table,
                    batch_size=self.context.rank_batch, loss_scale=loss_scale(self.network),
                )  # fmt: skip
            self._backward(output, gradient, losses)
            self.context.telemetry.add("loss", losses)
            self._step()

    @timed("data")
    def _draw(self, step: int, micro: int) -> tuple:
        """(y, one-hot rows or None, table at t, ε) of a micro-batch."""
        positions = self.context.layout.positions(step * self.context.layout.global_batch, micro)
        return self.target.batch(positions), self.labels(positions), *self.process.draw(positions, micro)

    @timed("forward")
    def _forward(self, *arguments: torch.Tensor | None) -> torch.Tensor:
        return self.network(*arguments)

    @timed("backward")
    def _backward(self, *arguments: torch.Tensor) -> None:
        backpropagate(self.network, *arguments)

    @timed("optimizer")
    def _step(self) -> None:
        take_step(self.network, "teacher")

    def warm_up(self) -> bool:
        """Nothing comes before the first iteration."""
        return False

    def counters(self) -> dict[str, int]:
        return {}

    def load_counters(self, counters: dict[str, int]) -> None:
        """A teacher's position is its step."""
