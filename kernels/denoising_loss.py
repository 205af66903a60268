"""Denoising score matching in the network's own output (EDM, arXiv 2206.00364, Equation 8; RDMD, Equation 7).

    loss_n = (1/c_out²) ‖D(y_t) - y‖² = ‖F - F*‖²,   F* = target_clean y + target_noise ε

summed over a sample's elements. The weight 1/c_out² is EDM's (σ² + σ_data²)/(σ σ_data)². The gradient of the mean
over B samples, 2 (F - F*)/B, is computed in the forward pass, where both operands are at hand.

One launch, reading F and y and writing the gradient, and sums by chunks of 1,024 elements that are added up when the
loss is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import jit, tl
from rdmd_fast.kernels.coefficients import TARGET_CLEAN, TARGET_NOISE, Coefficients
from rdmd_fast.kernels.noise_forward import (
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
    noised_operation,
    tile_pointers,
)

# -- reference ---------------------------------------------------------------------------------------------------------


class _Operands(NamedTuple):
    output: Tensor
    clean: Tensor
    factor: float  # of F - F*: the derivative's 2, 1/B and the loss scale
    table: Coefficients
    noise: CounterNoise


def _reference(given: _Operands) -> tuple[Tensor, Tensor]:
    output, clean, factor, table, noise = given
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
    target = load_coefficient(table, TARGET_CLEAN, row, n) * y + load_coefficient(table, TARGET_NOISE, row, n) * epsilon
    difference = tl.where(mask, prediction - target, 0.0)
    tl.store(gradient + offsets, (difference * factor).to(gradient.dtype.element_ty), mask=mask)
    tl.store(losses + row * chunks + chunk, tl.sum(difference * difference, axis=1), mask=row < n)


# -- operation ---------------------------------------------------------------------------------------------------------


def _shapes(given: _Operands) -> tuple[Tensor, Tensor]:
    output = given.output
    losses = output.new_empty((output.shape[0], chunk_count(output[0].numel())), dtype=torch.float32)
    return empty_in_element_order(output, output.dtype), losses


def _triton(given: _Operands) -> tuple[Tensor, Tensor]:
    output, clean, factor, table, noise = given
    check_shapes(output, table, noise, clean)
    output, clean = in_element_order(output), in_element_order(clean)
    gradient, losses = _shapes(given)
    launch(
        _denoising_kernel, output, gradient, losses, output, clean, table.rows.contiguous(),
        *noise_pointers(noise, output.device), factor,
    )  # fmt: skip
    return gradient, losses


# (factor (F - F*) in the dtype of F, loss by chunk float32 [N, chunks])
_denoising_loss = noised_operation(
    "denoising_loss", _Operands, "(Tensor, Tensor)", triton=_triton, reference=_reference, shapes=_shapes
)


def denoising_gradient(
    output: Tensor,
    clean: Tensor,
    *,
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
    factor = 2.0 * loss_scale / (batch_size or output.shape[0])
    gradient, losses = _denoising_loss(_Operands(output, clean, factor, table, noise))
    return gradient, add_chunks(losses)
