"""DeepSpeed's optimizers and ZeRO-3's order of modules, without the waits for the device that they do not need.

DeepSpeed 0.19 finds the norm of gradients tensor by tensor, copies numbers to the device with the host waiting, and in
fp16 asks for every tensor whether it is finite. ZeRO-3 records the modules of a pass to gather their parameters ahead;
a pass without gradients is half of one with, which then leaves the record behind: nothing is gathered ahead any more,
and each pass begins with broadcasts.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def avoid_waits(engine) -> None:
    """Give an initialised engine, of any ZeRO stage, functions in place of DeepSpeed's that wait less."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage:
        optimizer.get_grad_norm_direct = lambda gradients, *_, **__: _global_square(optimizer, gradients).sqrt()
    if stage == 3:
        _record_whole_passes(optimizer.parameter_offload.get_param_coordinator())
    if not engine.fp16_enabled():
        return
    if not stage:  # gradients are the same on all ranks already
        optimizer.overflow_checker.has_overflow = lambda parameters, **_: bool(
            _nonfinite(parameter.grad for parameter in parameters)
        )
    elif stage < 3:
        optimizer.has_overflow_partitioned_grads_serial = lambda: _nonfinite(
            each for group in optimizer.averaged_gradients.values() for each in group
        )


def _square(gradients: Iterable[Tensor | None]) -> Tensor:
    """Sum of squares, fp32 on the device; not finite where an element is not."""
    norms = torch._foreach_norm([each for each in gradients if each is not None], dtype=torch.float32)
    return torch.stack(norms).square().sum()


def _global_square(optimizer, partitions: Iterable[Tensor | None]) -> Tensor:
    """The same of gradients of which each rank has a part."""
    square = _square(partitions)
    dist.all_reduce(square, group=optimizer.dp_process_group)
    return square


def _nonfinite(gradients: Iterable[Tensor | None]) -> Tensor:
    """Whether an element is not finite, bool [1] on the device."""
    return _square(gradients).isfinite().logical_not().reshape(1)


def _record_whole_passes(coordinator) -> None:
    """Have ZeRO-3 record passes with gradients alone; one without is a part of these."""
    reset_step = coordinator.reset_step

    def reset_and_pass_over() -> None:
        reset_step()
        if coordinator.is_record_trace() and not torch.is_grad_enabled():
            coordinator._invalidate_trace()

    coordinator.reset_step = reset_and_pass_over
