"""A gradient that is known already enters autograd here.

For an output F of a network and G = dL/dF, the scalar S = 0 with dS/dF := G stands for the loss: ``S.backward()``
does what backpropagation of L would do from F on. No surrogate such as (F · G).sum() is formed, no pass is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, gradient, loss_scale):
        ctx.save_for_backward(gradient)
        ctx.loss_scale = loss_scale
        return torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        if ctx.loss_scale is None:
            # In fp32: a loss scale may lie outside the gradient's own range.
            return (gradient.float() * upstream).to(gradient.dtype), None, None
        # On a GPU to look would be to wait for the device; the CPU's tests see the same callers.
        visible = not upstream.is_cuda and not torch.compiler.is_compiling()
        if visible and float(upstream) not in (1.0, ctx.loss_scale):
            raise RuntimeError(f"loss scale {ctx.loss_scale} was promised, {float(upstream)} arrives")
        return gradient, None, None


def inject_gradient(output: Tensor, gradient: Tensor, loss_scale: float | None = None) -> Tensor:
    """A scalar whose backward pass hands ``gradient`` to ``output``.

    Args:
        output: [N, ...], part of an autograd graph.
        gradient: dL/d output, of its shape, dtype and device.
        loss_scale: promise that ``gradient`` holds this factor already: it is passed on as it is. ``backward`` may
            start with it or with 1 (DeepSpeed 0.19 forgets fp16's at ZeRO 0), but with no other number.
            None: the gradient is multiplied by what arrives, a pass over memory.

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
    return _InjectGradient.apply(output, gradient.detach(), loss_scale)
