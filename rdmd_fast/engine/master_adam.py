"""Adam in fp32 for bf16 weights that are not sharded."""

from collections.abc import Callable, Iterable

import torch


class MasterAdam:
    """fp32 masters of bf16 parameters and the Adam that steps them: an engine's optimizer at ZeRO 0.

    DeepSpeed's own for that case reads every gradient on the host, and takes some ten launches a parameter; this takes
    a handful for all of them, and the host waits for nothing.

    Args:
        parameters: fp32; they are cast in place, after their masters were copied from them.
        adam_of: makes the optimizer of the masters.

    Attributes:
        fp16_groups, fp32_groups: parameters and masters, named as in DeepSpeed's optimizers (see ``fp32_masters``).
        optimizer: Adam, whose parameters are the masters.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        adam_of: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    ):
        parameters = list(parameters)
        masters = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
        self.fp16_groups, self.fp32_groups = [parameters], [masters]
        self.optimizer = adam_of(masters)

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Take the parameters' gradients, where there are some; leave the parameters at their masters' new values."""
        stepped = [
            (parameter, master)
            for parameter, master in zip(self.fp16_groups[0], self.fp32_groups[0], strict=True)
            if parameter.grad is not None
        ]
        if not stepped:
            return
        parameters, masters = map(list, zip(*stepped, strict=True))
        gradients = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(gradients, [parameter.grad for parameter in parameters])
        for parameter, master, gradient in zip(parameters, masters, gradients, strict=True):
            parameter.grad, master.grad = None, gradient  # one of the two is enough to hold
        self.optimizer.step()
        for master in masters:
            master.grad = None
        torch._foreach_copy_(parameters, masters)
