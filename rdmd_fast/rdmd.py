"""Regularized Distribution Matching Distillation (arXiv 2406.14762, Algorithm 1), one iteration at a time.

    L(θ) = ∫ ω(t) KL(p_θ,t ‖ p_T,t) dt + λ E c(x, G_θ(x))

An iteration is one generator update and then ``fake_updates`` updates of the fake score, of which the first reuses
the generator's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from .costs import CostOptions
from .diffusion import DiffusionOptions, ForwardProcess, LogNormalSigma, Reading, SigmaOptions
from .distributed import BatchLayout, EMAOptions, OptimizerOptions
from .kernels.denoising_loss import denoising_loss
from .kernels.noise_forward import noise_forward
from .kernels.rdmd_gradient import rdmd_gradient
from .options import Options
from .randomness import Philox, Stream


class RDMDOptions(Options):
    """The distillation."""

    transport_weight: float = Field(0.05, ge=0, description="λ, weight of the transport cost (paper: 0 to 1)")
    cost: CostOptions = Field(default_factory=CostOptions)
    generator_sigma: float = Field(
        1.0,
        gt=0,
        description="noise level σ̃ at which the teacher's network is read as generator, data units (paper)",
    )
    weighting: Literal["uniform", "sigma2", "dmd"] = Field(
        "dmd",
        description="ω: uniform 1, sigma2 σ̃², dmd normalises by each sample's residual (DMD2; outside the theorem)",
    )
    sigma: SigmaOptions = Field(
        default_factory=LogNormalSigma,
        description="distribution of σ̃ in the generator's update (EDM's training one)",
    )
    fake_sigma: SigmaOptions | None = Field(
        None,
        description="distribution of σ̃ in the fake score's update; unset: that of the generator's (ours)",
    )
    fake_score: Literal["learned", "closed_form"] = Field(
        "learned",
        description="closed_form: exact, for affine generators of Gaussian sources (theory checks, ours)",
    )
    fake_updates: int = Field(1, ge=1, description="fake-score updates by iteration (paper alternates 1:1; DMD2: 5)")
    fake_warmup: int = Field(
        0,
        ge=0,
        description="fake-score updates before the first iteration, for a fake score that starts untrained (ours)",
    )
    generator_optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    fake_optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    ema: EMAOptions = Field(default_factory=EMAOptions)


class RDMD:
    """The three networks and one iteration over them.

    ``generator`` and ``fake_score`` are DeepSpeed engines of raw networks (a closed-form fake score is a plain
    callable), ``teacher`` is a raw network or a callable like one: ``(network_input, c_noise, class_labels)``.
    """

    def __init__(
        self,
        options: RDMDOptions,
        diffusion: DiffusionOptions,
        reading: Reading,
        generator,
        fake_score,
        teacher: Callable,
        source,
        philox: Philox,
        layout: BatchLayout,
        device: torch.device,
        dtype: torch.dtype,
        telemetry,
        class_label: torch.Tensor | None = None,
    ):
        self.options, self.reading, self.layout = options, reading, layout
        self.generator, self.fake_score, self.teacher, self.source = generator, fake_score, teacher, source
        self.device, self.dtype, self.telemetry = device, dtype, telemetry
        self.learned_fake = options.fake_score == "learned"
        self.fake_updates_done = 0
        self.class_labels = None if class_label is None else class_label.expand(layout.micro_batch, -1)
        batch = layout.global_batch
        self.generator_process = ForwardProcess(
            philox, options.sigma, diffusion, options.weighting,
            (Stream.GENERATOR_SIGMA, Stream.GENERATOR_NOISE), source.shape, batch, device,
        )  # fmt: skip
        self.fake_process = ForwardProcess(
            philox, options.fake_sigma or options.sigma, diffusion, "uniform",
            (Stream.FAKE_SIGMA, Stream.FAKE_NOISE), source.shape, batch, device,
        )  # fmt: skip

    def warm_up(self) -> bool:
        """One fake-score update ahead of the first iteration; False once they are done."""
        if not self.learned_fake or self.fake_updates_done >= self.options.fake_warmup:
            return False
        self._fake_update(self._rollout())
        return True

    def iteration(self, step: int) -> None:
        """One generator update, then the fake score's; ``step`` counts from 0."""
        outputs = self._generator_update(step)
        if not self.learned_fake:
            self.fake_updates_done += 1
            return
        for update in range(self.options.fake_updates):
            self._fake_update(outputs if update == 0 else self._rollout())

    def _generator_update(self, step: int) -> list[torch.Tensor]:
        outputs = []
        for micro in range(self.layout.accumulation):
            with self.telemetry.phase("data"):
                x = self._sources(micro)
                table, noise = self.generator_process.draw(
                    self.layout.positions(step * self.layout.global_batch, micro), micro
                )
            with self.telemetry.phase("generator_forward"):
                y = self.reading(self.generator, x, self.class_labels, self.dtype)
            outputs.append(y.detach())
            with self.telemetry.phase("scores"), torch.no_grad():
                network_input, _ = noise_forward(outputs[-1], noise, table, self.dtype)
                f_real = self.teacher(network_input, table.c_noise, self.class_labels)
                f_fake = self.fake_score(network_input, table.c_noise, self.class_labels)
                gradient, statistics = rdmd_gradient(
                    f_real, f_fake, outputs[-1], x, noise, table,
                    self.options.transport_weight, self.options.weighting,
                    self.options.cost.kind, self.options.cost.delta,
                )  # fmt: skip
            with self.telemetry.phase("generator_backward"):
                # The gradient with respect to y is known: a linear surrogate carries it into the network.
                self.generator.backward((y * gradient).sum())
            self.telemetry.add("score_gradient_square", statistics.score_gradient_square)
            self.telemetry.add("transport_cost", statistics.transport_cost)
            self.telemetry.add("transport_cost_per_element", statistics.transport_cost / y[0].numel())
            self._step(self.generator, "generator")
        return outputs

    def _fake_update(self, outputs: list[torch.Tensor]) -> None:
        first = self.fake_updates_done * self.layout.global_batch
        for micro, y in enumerate(outputs):
            table, noise = self.fake_process.draw(self.layout.positions(first, micro), micro)
            with self.telemetry.phase("fake_forward"):
                network_input, _ = noise_forward(y, noise, table, self.dtype)
                output = self.fake_score(network_input, table.c_noise, self.class_labels)
                loss = denoising_loss(output, y, noise, table)
            with self.telemetry.phase("fake_backward"):
                self.fake_score.backward(loss.mean())
            self.telemetry.add("fake_loss", loss.detach())
            self._step(self.fake_score, "fake_score")
        self.fake_updates_done += 1

    def _step(self, engine, name: str) -> None:
        with self.telemetry.phase("optimizer"):
            if engine.is_gradient_accumulation_boundary():
                self.telemetry.before_step(name, engine)
            engine.step()

    def _sources(self, micro: int) -> torch.Tensor:
        """Sources of the coming fake update: the generator's update shares them, and fresh rollouts follow on."""
        first = self.fake_updates_done * self.layout.global_batch
        return self.source.batch(self.layout.positions(first, micro))

    @torch.no_grad()
    def _rollout(self) -> list[torch.Tensor]:
        """G of fresh sources, one output a micro-batch."""
        outputs = []
        for micro in range(self.layout.accumulation):
            with self.telemetry.phase("data"):
                x = self._sources(micro)
            with self.telemetry.phase("generator_forward"):
                outputs.append(self.reading(self.generator, x, self.class_labels, self.dtype))
        return outputs

    def counters(self) -> dict[str, int]:
        return {"fake_updates": self.fake_updates_done}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.fake_updates_done = counters["fake_updates"]
