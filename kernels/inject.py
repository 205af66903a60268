"""A gradient that is known already enters autograd here.

For an output F of a network and G = dL/dF, the scalar S = 0 with dS/dF := G stands for the loss: ``S.backward()``
does what backpropagation of L would do from F on. No surrogate such as (F · G).sum() is formed, no pass is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, gradient, unit_upstream):
        ctx.save_for_backward(gradient)
        ctx.unit_upstream = unit_upstream
        return torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        if not ctx.unit_upstream:
            return gradient * upstream.to(gradient.dtype), None, None
        # On a GPU to look would be to wait for the device; the CPU's tests see the same callers.
        if not upstream.is_cuda and not torch.compiler.is_compiling() and float(upstream) != 1:
            raise RuntimeError(f"unit_upstream was promised, but the backward pass arrives with {float(upstream)}")
        return gradient, None, None


def inject_gradient(output: Tensor, gradient: Tensor, unit_upstream: bool = False) -> Tensor:
    """A scalar whose backward pass hands ``gradient`` to ``output``.

    Args:
        output: [N, ...], part of an autograd graph.
        gradient: dL/d output, of its shape, dtype and device.
        unit_upstream: promise that ``backward`` starts with 1, no scale of losses or accumulation: the gradient
            is passed on as it is. Otherwise it is multiplied first, a pass over memory.

    Returns:
        float32 zero, 0-d.

    Raises:
        ValueError: shape, dtype or device differ.
        RuntimeError: in the backward pass on the CPU, where the promise is broken.
    """
    if (output.shape, output.dtype, output.device) != (gradient.shape, gradient.dtype, gradient.device):
        raise ValueError(
            f"gradient is {gradient.dtype} {list(gradient.shape)} on {gradient.device}, the output "
            f"{output.dtype} {list(output.shape)} on {output.device}"
        )
    return _InjectGradient.apply(output, gradient.detach(), unit_upstream)
