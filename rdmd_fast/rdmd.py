"""Regularized Distribution Matching Distillation (arXiv 2406.14762, Algorithm 1), one iteration at a time.

    L(θ) = ∫ ω(t) KL(p_θ,t ‖ p_T,t) dt + λ E c(x, G_θ(x))

An iteration is one generator update and then ``fake_updates`` updates of the fake score, of which the first reuses
the generator's outputs.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from rdmd_fast.costs import CostOptions, FeatureCost
from rdmd_fast.diffusion import DiffusionOptions, LogNormalSigma, Reading, SigmaOptions
from rdmd_fast.engine.ema import EMAOptions
from rdmd_fast.engine.engine import loss_scale, take_step
from rdmd_fast.engine.options import OptimizerOptions
from rdmd_fast.engine.stage_context import StageContext, backpropagate, timed
from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.noise_forward import CounterNoise, generator_noise_forward, noise_forward
from rdmd_fast.kernels.rdmd_gradient import GradientStatistics, generator_gradient
from rdmd_fast.options import Options
from rdmd_fast.randomness import Stream
from rdmd_fast.transport_weight import BatchWeight, TransportWeight, TransportWeights


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


class Networks(NamedTuple):
    """The three networks.

    Attributes:
        generator: DeepSpeed engine of a raw network.
        fake_score: another; a plain callable where its score has a closed form.
        teacher: a raw network, or a callable like one: ``(network_input, c_noise, class_labels)``.
    """

    generator: Callable
    fake_score: Callable
    teacher: Callable


class Generated(NamedTuple):
    """Outputs y = G(x) of a micro-batch [N, ...] in data units, and the λ that they were made with."""

    y: torch.Tensor
    weight: BatchWeight


class RDMD:
    """One iteration over the three networks. Where λ is a range, each sample has its own, told to G and fake score.

    Args:
        reading: how the generator's raw output F_G is read: G(x) = skip x + scale F_G.
        source: has ``batch(positions)`` and ``shape``.
        class_label: one-hot row [1, classes] of the target class; None for networks without classes.
        feature_cost: of features of x and y, beside the elementwise cost.
    """

    def __init__(
        self,
        options: RDMDOptions,
        diffusion: DiffusionOptions,
        reading: Reading,
        networks: Networks,
        source,
        context: StageContext,
        *,
        class_label: torch.Tensor | None = None,
        feature_cost: FeatureCost | None = None,
    ):
        self.options, self.reading, self.source, self.context = options, reading, source, context
        self.generator, self.fake_score, self.teacher = networks
        self.feature_cost = feature_cost
        self.learned_fake = options.fake_score == "learned"
        self.fake_updates_done = 0
        layout, device = context.layout, context.device
        self.class_labels = None if class_label is None else class_label.expand(layout.micro_batch, -1)
        self.generator_c_noise = torch.full((layout.micro_batch,), reading.c_noise, device=device)
        self.transport_weights = TransportWeights(options.transport_weight, context.philox, layout.global_batch, device)
        self.generator_process = context.forward_process(
            options.sigma, diffusion, source.shape,
            weighting=options.weighting, streams=(Stream.GENERATOR_SIGMA, Stream.GENERATOR_NOISE),
        )  # fmt: skip
        self.fake_process = context.forward_process(
            options.fake_sigma or options.sigma, diffusion, source.shape,
            streams=(Stream.FAKE_SIGMA, Stream.FAKE_NOISE),
        )  # fmt: skip

    # -- Algorithm 1 ---------------------------------------------------------------------------------------------------

    def iteration(self, step: int) -> None:
        """Update the generator once, then the fake score ``fake_updates`` times; ``step`` counts from 0."""
        generated = self.update_generator(step)
        if not self.learned_fake:
            self.fake_updates_done += 1
            return
        for update in range(self.options.fake_updates):
            self.update_fake_score(generated if update == 0 else None)

    def update_generator(self, step: int) -> list[Generated]:
        """Descend L(θ); returns what G made, by micro-batch."""
        self.context.begin_update()
        generated = []
        for micro in range(self.context.layout.accumulation):
            x, weight, table, noise = self._draw(step, micro)
            f_generator = self._generate(x, weight)
            network_input, y = self._noise_generated(f_generator, x, table, noise)  # y = G(x), y_t = α y + σ ε
            f_real = self._real_score(network_input, table)
            f_fake = self._fake_score(network_input, table, weight)
            feature_cost, feature_gradient = self._feature_cost(x, y)
            with self.context.phase("losses"):
                # dL/dy = (ω (α²/σ²) (D_fake(y_t) - D_real(y_t)) + λ ∂c(x, y)/∂y) / B,  dL/dF_G = scale dL/dy
                gradient, statistics = generator_gradient(
                    f_real=f_real, f_fake=f_fake, f_generator=f_generator, x=x, y=y,
                    reading=self.reading, noise=noise, table=table,
                    weighting=self.options.weighting, transport_weight=weight.value,
                    cost=self.options.cost.elementwise, delta=self.options.cost.delta, extra=feature_gradient,
                    batch_size=self.context.rank_batch, loss_scale=loss_scale(self.generator),
                )  # fmt: skip
            costs = self._record(statistics, feature_cost, x[0].numel())
            self._backward_generator(f_generator, gradient, *costs)
            self._step(self.generator, "generator")
            generated.append(Generated(y, weight))
        return generated

    def update_fake_score(self, generated: list[Generated] | None = None) -> None:
        """Denoise what G made, at fresh t and ε; None lets it make more, from fresh sources."""
        self.context.begin_update()
        for micro in range(self.context.layout.accumulation):
            table, noise = self._draw_fake_noise(micro)
            if generated is None:
                network_input, y, weight = self._rollout(micro, table, noise)
            else:
                y, weight = generated[micro]
                network_input = self._noise(y, table, noise)
            f_fake = self._trained_fake_score(network_input, table, weight)
            with self.context.phase("losses"):
                # of (1/c_out²) ‖D_fake(y_t) - y‖² / B with respect to F_fake
                gradient, losses = denoising_gradient(
                    f_fake, y, noise=noise, table=table,
                    batch_size=self.context.rank_batch, loss_scale=loss_scale(self.fake_score),
                )  # fmt: skip
            self._backward_fake(f_fake, gradient, losses)
            self.context.telemetry.add("fake_loss", losses)
            self._step(self.fake_score, "fake_score")
        self.fake_updates_done += 1

    def warm_up(self) -> bool:
        """One fake-score update ahead of the first iteration; False once they are done."""
        if not self.learned_fake or self.fake_updates_done >= self.options.fake_warmup:
            return False
        self.update_fake_score()
        return True

    # -- data ----------------------------------------------------------------------------------------------------------

    @timed("data")
    def _draw(self, step: int, micro: int) -> tuple[torch.Tensor, BatchWeight, Coefficients, CounterNoise]:
        """(x, λ, table at t, ε) of the generator's update."""
        positions = self.context.layout.positions(step * self.context.layout.global_batch, micro)
        return *self._sources(micro), *self.generator_process.draw(positions, micro)

    @timed("data")
    def _draw_fake_noise(self, micro: int) -> tuple[Coefficients, CounterNoise]:
        return self.fake_process.draw(self._fake_positions(micro), micro)

    @timed("data")
    def _draw_sources(self, micro: int) -> tuple[torch.Tensor, BatchWeight]:
        return self._sources(micro)

    def _sources(self, micro: int) -> tuple[torch.Tensor, BatchWeight]:
        """Sources of the coming fake update and their λ: the generator's update shares them, fresh rollouts follow."""
        positions = self._fake_positions(micro)
        return self.source.batch(positions), self.transport_weights.draw(positions, micro)

    def _fake_positions(self, micro: int) -> torch.Tensor:
        return self.context.layout.positions(self.fake_updates_done * self.context.layout.global_batch, micro)

    # -- networks ------------------------------------------------------------------------------------------------------

    @timed("generator_forward")
    def _generate(self, x: torch.Tensor, weight: BatchWeight) -> torch.Tensor:
        """Raw output F_G of the generator's network; G(x) = skip x + scale F_G is formed where it is used."""
        network_input = torch.empty_like(x, dtype=self.context.dtype)
        torch.mul(x, self.reading.input_scale, out=network_input)  # scaled and cast in one pass
        return self.generator(network_input, self.generator_c_noise, self.class_labels, **weight.inputs)

    @torch.no_grad()
    def _rollout(self, micro: int, table: Coefficients, noise: CounterNoise) -> tuple:
        """(the fake score's input, y = G(x), its λ) of fresh sources."""
        x, weight = self._draw_sources(micro)
        f_generator = self._generate(x, weight)
        return *self._noise_generated(f_generator, x, table, noise), weight

    @timed("teacher")
    @torch.no_grad()
    def _real_score(self, network_input: torch.Tensor, table: Coefficients) -> torch.Tensor:
        return self.teacher(network_input, table.c_noise, self.class_labels)

    @timed("fake_score")
    @torch.no_grad()
    def _fake_score(self, network_input: torch.Tensor, table: Coefficients, weight: BatchWeight) -> torch.Tensor:
        return self.fake_score(network_input, table.c_noise, self.class_labels, **weight.inputs)

    @timed("fake_forward")
    def _trained_fake_score(self, network_input, table: Coefficients, weight: BatchWeight) -> torch.Tensor:
        return self.fake_score(network_input, table.c_noise, self.class_labels, **weight.inputs)

    @timed("generator_backward")
    def _backward_generator(self, *arguments: torch.Tensor) -> None:
        backpropagate(self.generator, *arguments)

    @timed("fake_backward")
    def _backward_fake(self, *arguments: torch.Tensor) -> None:
        backpropagate(self.fake_score, *arguments)

    @timed("optimizer")
    def _step(self, engine, name: str) -> None:
        take_step(engine, name)

    # -- noise and costs -----------------------------------------------------------------------------------------------

    @timed("losses")
    def _noise_generated(self, f_generator, x, table: Coefficients, noise: CounterNoise) -> tuple[torch.Tensor, ...]:
        """(network input at y_t, y = G(x)) in one pass."""
        return generator_noise_forward(
            f_generator, x, reading=self.reading, noise=noise, table=table, dtype=self.context.dtype
        )

    @timed("losses")
    def _noise(self, y: torch.Tensor, table: Coefficients, noise: CounterNoise) -> torch.Tensor:
        network_input, _ = noise_forward(y, noise=noise, table=table, dtype=self.context.dtype)
        return network_input

    def _feature_cost(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The features' cost of each sample, and the derivative of its weighted form with respect to y; if there is."""
        if self.feature_cost is None:
            return None, None
        with self.context.phase("feature_cost"):
            cost, derivative = self.feature_cost(x, y)
            return cost, derivative.mul_(self.options.cost.feature_weight)

    def _record(self, statistics: GradientStatistics, feature_cost, elements: int) -> tuple[torch.Tensor, ...]:
        """Record an update's per-sample values; returns (‖g‖², c(x, y)), each [N]."""
        score_gradient_square, transport_cost = statistics.score_gradient_square, statistics.transport_cost
        add = self.context.telemetry.add
        if feature_cost is not None:
            transport_cost = transport_cost + self.options.cost.feature_weight * feature_cost
            add("feature_cost", feature_cost)
        add("score_gradient_square", score_gradient_square)
        add("transport_cost", transport_cost)
        add("transport_cost_per_element", transport_cost / elements)
        return score_gradient_square, transport_cost

    # -- resuming ------------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        return {"fake_updates": self.fake_updates_done}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.fake_updates_done = counters["fake_updates"]
