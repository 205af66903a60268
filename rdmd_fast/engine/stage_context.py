"""What both stages of training need of their run, and the step from a known gradient to an engine's backward pass."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from rdmd_fast.diffusion import DiffusionOptions, ForwardProcess
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.engine import loss_scale
from rdmd_fast.engine.update_guard import mark_nonfinite
from rdmd_fast.kernels.inject import inject_gradient
from rdmd_fast.options import Options
from rdmd_fast.randomness import Philox, Stream


class Recorder(Protocol):
    """What a stage tells of its work: see ``monitoring.telemetry.Telemetry``."""

    def phase(self, name: str) -> AbstractContextManager:
        """Time a part of the iteration."""

    def add(self, name: str, per_sample: torch.Tensor) -> None:
        """Add values [N] to the mean of ``name``."""


@dataclass(frozen=True)
class StageContext:
    """A stage's run.

    Attributes:
        philox: key of all randomness.
        layout: which positions of a global batch this rank has.
        device: of networks and samples.
        dtype: of weights and activations.
        telemetry: takes times and per-sample values.
        compiled: whether networks run under torch.compile.
    """

    philox: Philox
    layout: BatchLayout
    device: torch.device
    dtype: torch.dtype
    telemetry: Recorder
    compiled: bool = False

    @property
    def rank_batch(self) -> int:
        """The samples that this rank's loss is the mean of."""
        return self.layout.micro_batch * self.layout.accumulation

    def begin_update(self) -> None:
        """Tell CUDA graphs that an update begins: they replay its passes from the first, over what earlier ones gave.

        Outputs of compiled networks and their parameters' gradients end here, so it is no place between micro-batches,
        whose gradients add up.
        """
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def phase(self, name: str) -> AbstractContextManager:
        return self.telemetry.phase(name)

    def forward_process(
        self,
        sigma: Options,
        diffusion: DiffusionOptions,
        shape: tuple[int, ...],
        *,
        weighting: str = "uniform",
        streams: tuple[Stream, Stream],
    ) -> ForwardProcess:
        """F(x, t) for samples of ``shape``; ``streams`` are those of the noise level and of the noise."""
        batch = self.layout.global_batch
        return ForwardProcess(self.philox, sigma, diffusion, weighting, streams, shape, batch, self.device)


def timed(phase: str) -> Callable:
    """Decorate a stage's method: it is the part ``phase`` of an iteration."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def in_phase(self, *arguments, **keywords):
            with self.context.phase(phase):
                return method(self, *arguments, **keywords)

        return in_phase

    return decorate


def backpropagate(engine, output: torch.Tensor, gradient: torch.Tensor, *losses: torch.Tensor) -> None:
    """Go on from a gradient known at the network's output: the loss scale times that of a mean over the rank's batch.

    Args:
        output: of the network [N, ...]; ``gradient`` is of its shape and dtype.
        losses: of the samples, each [N]: where one is not finite, the update is skipped.
    """
    mark_nonfinite(gradient, *losses)
    engine.backward(inject_gradient(output, gradient, loss_scale(engine)), scale_wrt_gas=False)
