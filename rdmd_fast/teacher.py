"""The teacher stage: denoising score matching on the target domain (EDM, arXiv 2206.00364, Section 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field

from rdmd_fast.diffusion import DiffusionOptions, ForwardProcess, LogNormalSigma, SigmaOptions
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.ema import EMAOptions
from rdmd_fast.engine.engine import loss_scale, take_step
from rdmd_fast.engine.options import OptimizerOptions
from rdmd_fast.engine.update_guard import poison
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.inject import inject_gradient
from rdmd_fast.kernels.noise_forward import noise_forward
from rdmd_fast.options import Options
from rdmd_fast.randomness import Philox, Stream


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
    """One network and one update of it at a time; ``network`` is a DeepSpeed engine of a raw network."""

    def __init__(
        self,
        options: TeacherStageOptions,
        diffusion: DiffusionOptions,
        network,
        target,
        philox: Philox,
        layout: BatchLayout,
        device,
        dtype,
        telemetry,
        labels: Callable[[torch.Tensor], torch.Tensor | None],
    ):
        """``labels`` maps positions, int64 [N], to one-hot rows [N, classes]; None for a network without classes."""
        self.network, self.target, self.layout = network, target, layout
        self.dtype, self.telemetry, self.labels = dtype, telemetry, labels
        self.process = ForwardProcess(
            philox, options.sigma, diffusion, "uniform",
            (Stream.TEACHER_SIGMA, Stream.TEACHER_NOISE), target.shape, layout.global_batch, device,
        )  # fmt: skip

    def iteration(self, step: int) -> None:
        """One update on the targets at positions step · batch …; ``step`` counts from 0."""
        for micro in range(self.layout.accumulation):
            with self.telemetry.phase("data"):
                positions = self.layout.positions(step * self.layout.global_batch, micro)
                y, class_labels = self.target.batch(positions), self.labels(positions)
                table, noise = self.process.draw(positions, micro)
            with self.telemetry.phase("losses"):
                network_input, _ = noise_forward(y, noise, table, self.dtype)
            with self.telemetry.phase("forward"):
                output = self.network(network_input, table.c_noise, class_labels)
            with self.telemetry.phase("losses"):
                rank_batch = self.layout.micro_batch * self.layout.accumulation
                scale = loss_scale(self.network)
                gradient, losses = denoising_gradient(output, y, noise, table, rank_batch, scale)
            with self.telemetry.phase("backward"):
                poison(gradient, losses)
                # The gradient is of the mean over the rank's batch, and holds the loss scale.
                self.network.backward(inject_gradient(output, gradient, scale), scale_wrt_gas=False)
            self.telemetry.add("loss", losses)
            with self.telemetry.phase("optimizer"):
                take_step(self.network, "teacher")

    def warm_up(self) -> bool:
        """Nothing comes before the first iteration."""
        return False

    def counters(self) -> dict[str, int]:
        return {}

    def load_counters(self, counters: dict[str, int]) -> None:
        """A teacher's position is its step."""
