"""Denoising score matching in the network's own output (EDM, arXiv 2206.00364, Equation 8; RDMD, Equation 7).

    loss_n = (1/c_out²) ‖D(y_t) - y‖² = ‖F - F*‖²,   F* = target_clean y + target_noise ε

summed over a sample's elements. The weight 1/c_out² is EDM's (σ² + σ_data²)/(σ σ_data)². The gradient of the mean
over B samples, 2 (F - F*)/B, is computed in the forward pass, where both operands are at hand.

One launch, reading F and y and writing the gradient, and sums by chunks of 1,024 elements that are added up when the
loss is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, jit, tl
from rdmd_fast.kernels._static import StaticCase
from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.noise_forward import (
    NOISE_TYPES,
    STATIC_SAMPLES,
    CounterNoise,
    add_chunks,
    check_shapes,
    chunk_count,
    chunk_sums,
    empty_in_element_order,
    in_element_order,
    launch,
    load_coefficient,
    load_samples,
    noise_pointers,
    noise_tile,
    static_case,
    tile_pointers,
)

# -- reference ---------------------------------------------------------------------------------------------------------


def _reference(output, clean, table, noise, factor) -> tuple[Tensor, Tensor]:
    target = table.row("target_clean", clean) * clean.float()
    target.addcmul_(table.row("target_noise", clean), noise.values(clean))
    difference = output.float() - target
    return in_element_order((difference * factor).to(output.dtype)), chunk_sums(difference.square())


# -- kernel ------------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["stream", "n", "chunks"])
def _denoising_kernel(
    gradient, losses, output, clean, table, seed, positions, drawn,
    stream, factor, n, count, chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, chunk, offsets, mask = tile_pointers(n, count, chunks, ROWS, WIDTH)
    prediction = load_samples(output, offsets, mask)
    y = load_samples(clean, offsets, mask)
    epsilon = noise_tile(seed, stream, positions, drawn, row, chunk, offsets, mask, n, ROWS, WIDTH)
    target = load_coefficient(table, 6, row, n) * y + load_coefficient(table, 7, row, n) * epsilon
    difference = tl.where(mask, prediction - target, 0.0)
    tl.store(gradient + offsets, (difference * factor).to(gradient.dtype.element_ty), mask=mask)
    tl.store(losses + row * chunks + chunk, tl.sum(difference * difference, axis=1), mask=row < n)


# -- launcher ----------------------------------------------------------------------------------------------------------


def _triton(output, clean, table, noise, factor) -> tuple[Tensor, Tensor]:
    check_shapes(output, table, noise, clean)
    output, clean = in_element_order(output), in_element_order(clean)
    gradient, losses = _empty_outputs(output)
    launch(
        _denoising_kernel, output, gradient, losses, output, clean, table.rows.contiguous(),
        *noise_pointers(noise, output.device), factor,
    )  # fmt: skip
    return gradient, losses


# -- operation ---------------------------------------------------------------------------------------------------------


def _empty_outputs(output) -> tuple[Tensor, Tensor]:
    losses = output.new_empty((output.shape[0], chunk_count(output[0].numel())), dtype=torch.float32)
    return empty_in_element_order(output, output.dtype), losses


def _loss(output, clean, table, noise, factor) -> tuple[Tensor, Tensor]:
    implementation = _triton if backend(output.device) == "triton" else _reference
    return implementation(output, clean, table, noise, factor)


# Opaque to torch.compile on purpose: a compiler that fuses multiply and add would change the noise.
@torch.library.custom_op("rdmd_fast::denoising_loss", mutates_args=())
def _loss_op(
    output: Tensor,
    clean: Tensor,
    table: Tensor,
    seed: int,
    seed_tensor: Tensor | None,
    stream: int,
    positions: Tensor,
    drawn: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    noise = CounterNoise.of_arguments(seed, seed_tensor, stream, positions, drawn)
    return _loss(output, clean, Coefficients(table), noise, factor)


@_loss_op.register_fake
def _(output, *arguments):
    return _empty_outputs(output)


@torch.no_grad()
def _dispatch(output, clean, table, noise, factor) -> tuple[Tensor, Tensor]:
    """(factor (F - F*) in the dtype of F, loss by chunk float32 [N, chunks])."""
    if torch.compiler.is_compiling():
        return _loss_op(output, clean, table.rows, *noise.arguments(), factor)
    return _loss(output, clean, table, noise, factor)


def denoising_gradient(
    output: Tensor,
    clean: Tensor,
    noise: CounterNoise,
    table: Coefficients,
    batch_size: int | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradient of the mean loss, and each sample's loss, in one pass. No gradient flows.

    Args:
        output: raw network output F [N, ...] for the noised samples, any floating dtype.
        clean: clean samples y [N, ...], data units.
        noise: the noise that made y_t.
        table: coefficients of the N samples.
        batch_size: B, the samples that the loss is the mean of; N if None.
        loss_scale: factor of the gradient, applied in fp32 before it is rounded: in fp16 a mean's gradient
            would else vanish.

    Returns:
        (loss_scale dL/dF [N, ...] in the dtype of F, images in channels_last; losses float32 [N], sums over elements).
    """
    gradient, losses = _dispatch(output, clean, table, noise, 2.0 * loss_scale / (batch_size or output.shape[0]))
    return gradient, add_chunks(losses)


class _DenoisingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, clean, table, noise):
        gradient, losses = _dispatch(output, clean, Coefficients(table), noise, 2.0)
        ctx.save_for_backward(gradient)
        return add_chunks(losses)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        upstream = upstream.view(-1, *(1,) * (gradient.ndim - 1))
        return (gradient * upstream).to(gradient.dtype), None, None, None


def denoising_loss(output: Tensor, clean: Tensor, noise: CounterNoise, table: Coefficients) -> Tensor:
    """Each sample's loss, differentiable in the network's output; for the mean, ``denoising_gradient`` saves a pass.

    Arguments as ``denoising_gradient``.

    Returns:
        float32 [N]: sums over each sample's elements.
    """
    return _DenoisingLoss.apply(output, clean.detach(), table.rows, noise)


# -- ahead-of-time cases -----------------------------------------------------------------------------------------------


def static_cases() -> list[StaticCase]:
    """Each sample size and dtype of the network."""
    common = {"losses": "*fp32", "clean": "*fp32", "table": "*fp32", **NOISE_TYPES, "factor": "fp32"}
    cases = []
    for shape, elements in STATIC_SAMPLES.items():
        for kind in ("fp32", "bf16", "fp16"):
            if shape == "3x64x64" or kind == "bf16":
                types = {**common, "gradient": f"*{kind}", "output": f"*{kind}"}
                cases.append(static_case(f"denoising_loss/{kind}/{shape}", _denoising_kernel, elements, types, {}))
    return cases
