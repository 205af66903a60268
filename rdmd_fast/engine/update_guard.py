"""Updates that would spoil a network are left out: of a loss or gradient that is not finite, and of a spike.

The decision is a number on the device, the same on every rank since the global gradient norm is, and the fused Adam
leaves everything as it is where ``found_inf`` is 1: parameters, moments and its count of steps. The host learns of it
when a line of metrics is due or a checkpoint is written, so nothing here waits for the device in between.

    skip an update where  ‖g‖² is not finite
                      or  ln ‖g‖ > ln(spike_factor) + the running mean of ln ‖g‖ over accepted updates
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from rdmd_fast.engine.fp32_masters import master_shards
from rdmd_fast.errors import InputError
from rdmd_fast.options import Options


class GuardOptions(Options):
    """Which updates are left out, and when that ends the run."""

    max_skipped_in_row: int = Field(
        10,
        ge=1,
        description="updates of one engine skipped in a row that end the run, seen at the next line of metrics or "
        "checkpoint; fp16's loss scaling has its own end, the lowest scale (ours)",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="skip updates whose gradient norm is more than this times its running geometric mean; unset: never "
        "(ours)",
    )
    spike_half_life: float = Field(
        100.0, gt=0, description="updates after which a norm's share in that mean halves (ours)"
    )
    spike_warmup: int = Field(100, ge=1, description="accepted updates before any can be a spike (ours)")


class UpdateGuard:
    """Watches the updates of one engine; its numbers are equal on all ranks.

    Args:
        engine: of DeepSpeed, initialised.
        adam: the fused torch Adam that it steps in the end; it leaves out and clips updates as it is told here.
        clip: largest norm of a gradient, 0 for any.
    """

    def __init__(
        self, options: GuardOptions, engine, adam: torch.optim.Optimizer, device: torch.device, clip: float = 0.0
    ):
        self.options, self.engine = options, engine
        # DeepSpeed finds the norm while stepping, but without ZeRO; there fp16 does, and keeps the loss scale in.
        self._plain = not (engine.zero_optimization() or engine.fp16_enabled())
        self._norm_is_scaled = engine.fp16_enabled() and not engine.zero_optimization()
        self._numbers = torch.zeros(6, dtype=torch.float64, device=device)
        self.skipped, self.spikes, self.in_row, self.accepted, self._log_sum, self._weight = self._numbers
        self._longest = torch.zeros((), dtype=torch.float64, device=device)
        self.norm = torch.full((), math.nan, device=device)  # of the latest update, before clipping
        # Where Adam runs: on the host with offload_optimizer, and a copy would not have ended when Adam reads it.
        self._skip = torch.zeros((), device=master_shards(engine)[0].device)
        self._decided = True
        adam.found_inf = self._skip
        self._clip = clip
        if clip:
            self._divisor = torch.ones_like(self._skip)
            adam.grad_scale = self._divisor  # the fused kernels divide by it
        adam.register_step_pre_hook(self._before_adam)

    # -- an update, no host synchronisation ------------------------------------------------------------------------

    def before_step(self) -> None:
        """Gradients are reduced but not yet clipped or applied."""
        self._decided = False
        self._scale = float(self.engine.optimizer.loss_scale) if self._norm_is_scaled else 1.0
        if self._plain:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norms = torch._foreach_norm(gradients, dtype=torch.float32)
            self._decide(torch.linalg.vector_norm(torch.stack(norms)))

    def _before_adam(self, *_) -> None:
        """DeepSpeed has the norm and is about to step, once for each of its parameter groups."""
        if not self._decided:
            norm = self.engine.optimizer._global_grad_norm
            if not isinstance(norm, Tensor):
                norm = torch.full_like(self.norm, norm)
            self._decide(norm / self._scale)

    def after_step(self) -> None:
        """DeepSpeed may have skipped the update before it came to Adam, on every rank alike."""
        if not self._decided:
            self._decided = True
            self.norm.fill_(math.nan)
            self._skip.fill_(1)
            self._count(in_row=not self.engine.fp16_enabled())

    def _decide(self, norm: Tensor) -> None:
        self._decided = True
        self.norm.copy_(norm)
        # The square, since Adam's second moment is one: where that overflows, a weight would stand still for ever.
        accepted = self.norm.square() < math.inf  # false of NaN
        if self.options.spike_factor is not None:
            accepted &= ~self._spike(accepted)
        self._skip.copy_(~accepted)
        if self._clip:
            self._divisor.copy_((norm / self._clip).clamp_min(1))
        self._count()

    def _spike(self, finite: Tensor) -> Tensor:
        """Whether this norm stands out; if not, it joins the running mean. A gradient of zero does neither."""
        counts = finite & (self.norm > 0)
        log = torch.where(counts, self.norm, 1.0).double().log()
        limit = self._log_sum / self._weight.clamp_min(1e-12) + math.log(self.options.spike_factor)
        spike = counts & (self.accepted >= self.options.spike_warmup) & (log > limit)
        joins = (counts & ~spike).double()
        share = joins * (1 - 0.5 ** (1 / self.options.spike_half_life))
        self._log_sum.lerp_(log, share)
        self._weight.lerp_(torch.ones_like(share), share)
        self.accepted.add_(joins)
        self.spikes.add_(spike)
        return spike

    def _count(self, in_row: bool = True) -> None:
        self.skipped.add_(self._skip)
        if in_row:
            self.in_row.add_(1).mul_(self._skip)
            torch.maximum(self._longest, self.in_row, out=self._longest)

    # -- metrics, at intervals -------------------------------------------------------------------------------------

    def metrics(self, name: str) -> dict[str, float]:
        """For metrics.jsonl: updates skipped so far, and the latest gradient norm if it is a number.

        Raises:
            InputError: too many updates were skipped in a row, on every rank alike.
        """
        numbers = torch.stack((self._longest, self.skipped, self.spikes, self.norm.double())).tolist()
        longest, skipped, spikes, norm = numbers
        if longest >= self.options.max_skipped_in_row:
            raise InputError(
                f"{name}: {longest:.0f} updates in a row were skipped, their loss or gradient was not finite"
                f"{' or a spike' if spikes else ''}; the last checkpoint stays: resume with a lower learning rate, or "
                "look for bad samples (train.guard.max_skipped_in_row)"
            )
        metrics = {f"skipped_updates/{name}": int(skipped)}
        if self.options.spike_factor is not None:
            metrics[f"skipped_spikes/{name}"] = int(spikes)
        if math.isfinite(norm):
            metrics[f"grad_norm/{name}"] = norm
        return metrics

    # -- resuming --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to decide alike: float64 [6] on the CPU, equal on all ranks."""
        return {"numbers": self._numbers.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing in ``state`` means a fresh start."""
        if "numbers" in state:
            self._numbers.copy_(state["numbers"])
            self._longest.copy_(self.in_row)


class Guards:
    """The guards of a run's engines, by name."""

    def __init__(self, engines: dict[str, object]):
        self._guards: dict[str, UpdateGuard] = {name: engine.guard for name, engine in engines.items()}

    def metrics(self, interval: float = 0.0) -> dict[str, float]:
        """The keys of a line of metrics.jsonl.

        Raises:
            InputError: an engine skipped too many updates in a row, on every rank alike.
        """
        return {key: value for name, guard in self._guards.items() for key, value in guard.metrics(name).items()}

    def before_save(self, world) -> None:
        """A collective call.

        Raises:
            InputError: too many updates were skipped in a row, or parameters are not finite; not to be saved.
        """
        self.metrics()
        for name, guard in self._guards.items():
            if world.any(not _finite(guard.engine)):
                raise InputError(
                    f"{name}: its weights are not finite, nothing is saved; the last checkpoint stays: resume with a "
                    "lower learning rate"
                )

    def state(self) -> dict[str, Tensor]:
        return {
            f"guard.{name}.{key}": value for name, guard in self._guards.items() for key, value in guard.state().items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, guard in self._guards.items():
            prefix = f"guard.{name}."
            guard.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def _finite(engine) -> bool:
    largest = torch._foreach_norm([shard for shard in master_shards(engine) if shard.numel()], ord=math.inf)
    return not largest or bool(torch.stack(largest).isfinite().all())


def mark_nonfinite(gradient: Tensor, *losses: Tensor) -> None:
    """Make one element of ``gradient`` NaN where a loss is not finite: the gradient norm then says so on every rank.

    Args:
        gradient: [N, …], in place.
        losses: of the samples, each [N].
    """
    first = gradient[(0,) * gradient.ndim]
    for per_sample in losses:
        first.add_(per_sample.sum(), alpha=0)
