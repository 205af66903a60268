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

from rdmd_fast.costs import CostOptions, FeatureCost
from rdmd_fast.diffusion import DiffusionOptions, ForwardProcess, LogNormalSigma, Reading, SigmaOptions
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.ema import EMAOptions
from rdmd_fast.engine.engine import loss_scale, take_step
from rdmd_fast.engine.options import OptimizerOptions
from rdmd_fast.engine.update_guard import poison
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.inject import inject_gradient
from rdmd_fast.kernels.noise_forward import generator_noise_forward, noise_forward
from rdmd_fast.kernels.rdmd_gradient import generator_gradient
from rdmd_fast.options import Options
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.transport_weight import Drawn, TransportWeight, TransportWeights


class RDMDOptions(Options):
    """The distillation."""

    transport_weight: TransportWeight = Field(
        0.05,
        description="λ, weight of the transport cost (paper: 0 to 1); or {log_uniform: [low, high]}, one generator for "
        "every λ between them",
    )
    cost: CostOptions = Field(default_factory=CostOptions)
    generator_sigma: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
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
    fake_updates: int = Field(
        1, ge=1, le=10_000, description="fake-score updates by iteration (paper alternates 1:1; DMD2: 5)"
    )
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
    callable), ``teacher`` is a raw network or a callable like one: ``(network_input, c_noise, class_labels)``. Where λ
    is a range, each sample has its own, and generator and fake score are told it.
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
        feature_cost: FeatureCost | None = None,
    ):
        self.options, self.reading, self.layout = options, reading, layout
        self.generator, self.fake_score, self.teacher, self.source = generator, fake_score, teacher, source
        self.device, self.dtype, self.telemetry = device, dtype, telemetry
        self.feature_cost = feature_cost
        self.learned_fake = options.fake_score == "learned"
        self.fake_updates_done = 0
        self.class_labels = None if class_label is None else class_label.expand(layout.micro_batch, -1)
        self.generator_c_noise = torch.full((layout.micro_batch,), reading.c_noise, device=device)
        self.rank_batch = layout.micro_batch * layout.accumulation  # the samples that this rank's loss is the mean of
        batch = layout.global_batch
        self.transport_weights = TransportWeights(options.transport_weight, philox, batch, device)
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
        self._fake_update()
        return True

    def iteration(self, step: int) -> None:
        """One generator update, then the fake score's; ``step`` counts from 0."""
        outputs = self._generator_update(step)
        if not self.learned_fake:
            self.fake_updates_done += 1
            return
        for update in range(self.options.fake_updates):
            self._fake_update(outputs if update == 0 else None)

    def _generator_update(self, step: int) -> list[tuple[torch.Tensor, Drawn]]:
        """One update of G; returns its outputs y = G(x) and their λ, one batch a micro-batch."""
        outputs, reading = [], self.reading
        for micro in range(self.layout.accumulation):
            with self.telemetry.phase("data"):
                x, weight = self._sources(micro)
                table, noise = self.generator_process.draw(
                    self.layout.positions(step * self.layout.global_batch, micro), micro
                )
            with self.telemetry.phase("generator_forward"):
                f_generator = self._generate(x, weight)
            with self.telemetry.phase("losses"), torch.no_grad():
                network_input, y = generator_noise_forward(
                    f_generator, x, reading.skip, reading.scale, noise, table, self.dtype
                )
            with self.telemetry.phase("teacher"), torch.no_grad():
                f_real = self.teacher(network_input, table.c_noise, self.class_labels)
            with self.telemetry.phase("fake_score"), torch.no_grad():
                f_fake = self.fake_score(network_input, table.c_noise, self.class_labels, **weight.inputs)
            feature_cost, extra = self._feature_cost(x, y)
            with self.telemetry.phase("losses"), torch.no_grad():
                gradient, statistics = generator_gradient(
                    f_real, f_fake, f_generator, x, reading.skip, reading.scale, noise, table,
                    weight.value, self.options.weighting,
                    self.options.cost.elementwise, self.options.cost.delta, extra=extra, batch_size=self.rank_batch,
                    y=y, loss_scale=loss_scale(self.generator),
                )  # fmt: skip
            outputs.append((y, weight))
            with self.telemetry.phase("generator_backward"):
                score_gradient_square, transport_cost = statistics.score_gradient_square, statistics.transport_cost
                if feature_cost is not None:
                    transport_cost = transport_cost + self.options.cost.feature_weight * feature_cost
                self._backward(self.generator, f_generator, gradient, score_gradient_square, transport_cost)
            self.telemetry.add("score_gradient_square", score_gradient_square)
            self.telemetry.add("transport_cost", transport_cost)
            if feature_cost is not None:
                self.telemetry.add("feature_cost", feature_cost)
            self.telemetry.add("transport_cost_per_element", transport_cost / x[0].numel())
            self._step(self.generator, "generator")
        return outputs

    def _feature_cost(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The features' cost of each sample, and the derivative of its weighted form with respect to y; if there is."""
        if self.feature_cost is None:
            return None, None
        with self.telemetry.phase("feature_cost"):
            cost, derivative = self.feature_cost(x, y)
            return cost, derivative.mul_(self.options.cost.feature_weight)

    def _fake_update(self, outputs: list[tuple[torch.Tensor, Drawn]] | None = None) -> None:
        """One update of the fake score on the generator's outputs; None makes them from fresh sources."""
        first = self.fake_updates_done * self.layout.global_batch
        for micro in range(self.layout.accumulation):
            with self.telemetry.phase("data"):
                table, noise = self.fake_process.draw(self.layout.positions(first, micro), micro)
            if outputs is None:
                network_input, y, weight = self._rollout(micro, table, noise)
            else:
                y, weight = outputs[micro]
                with self.telemetry.phase("losses"):
                    network_input, _ = noise_forward(y, noise, table, self.dtype)
            with self.telemetry.phase("fake_forward"):
                f_fake = self.fake_score(network_input, table.c_noise, self.class_labels, **weight.inputs)
            with self.telemetry.phase("losses"):
                gradient, losses = denoising_gradient(
                    f_fake, y, noise, table, self.rank_batch, loss_scale(self.fake_score)
                )
            with self.telemetry.phase("fake_backward"):
                self._backward(self.fake_score, f_fake, gradient, losses)
            self.telemetry.add("fake_loss", losses)
            self._step(self.fake_score, "fake_score")
        self.fake_updates_done += 1

    def _backward(self, engine, output: torch.Tensor, gradient: torch.Tensor, *losses: torch.Tensor) -> None:
        """Backpropagate a gradient known at the network's output: the loss scale times a mean over the rank's batch."""
        poison(gradient, *losses)
        engine.backward(inject_gradient(output, gradient, loss_scale(engine)), scale_wrt_gas=False)

    def _step(self, engine, name: str) -> None:
        with self.telemetry.phase("optimizer"):
            take_step(engine, name)

    def _sources(self, micro: int) -> tuple[torch.Tensor, Drawn]:
        """Sources of the coming fake update and their λ: the generator's update shares them, fresh rollouts follow."""
        positions = self.layout.positions(self.fake_updates_done * self.layout.global_batch, micro)
        return self.source.batch(positions), self.transport_weights.draw(positions, micro)

    def _generate(self, x: torch.Tensor, weight: Drawn) -> torch.Tensor:
        """Raw output F_G of the generator's network; G(x) = skip x + scale F_G is formed where it is used."""
        network_input = torch.empty_like(x, dtype=self.dtype)
        torch.mul(x, self.reading.input_scale, out=network_input)  # scaled and cast in one pass
        return self.generator(network_input, self.generator_c_noise, self.class_labels, **weight.inputs)

    @torch.no_grad()
    def _rollout(self, micro: int, table, noise) -> tuple[torch.Tensor, torch.Tensor, Drawn]:
        """(the fake score's input, y = G(x), its λ) of fresh sources."""
        with self.telemetry.phase("data"):
            x, weight = self._sources(micro)
        with self.telemetry.phase("generator_forward"):
            f_generator = self._generate(x, weight)
        skip, scale = self.reading.skip, self.reading.scale
        with self.telemetry.phase("losses"):
            return *generator_noise_forward(f_generator, x, skip, scale, noise, table, self.dtype), weight

    def counters(self) -> dict[str, int]:
        return {"fake_updates": self.fake_updates_done}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.fake_updates_done = counters["fake_updates"]
