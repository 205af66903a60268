"""Decoded bytes to network input, with the horizontal flip of data augmentation.

    x = (u - 127.5) / 127.5        u in {0, ..., 255},  x in [-1, 1], both ends exact

u - 127.5 is exact in fp32 and the product with fp32(1/127.5) is rounded once, so all devices agree to the bit. A
sample is flipped where the lowest bit of its counter's first Philox word is set: see philox.py.

Images stay uint8 until they are on the device: a quarter of the bytes of fp32 cross the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, jit, tl, triton
from rdmd_fast.kernels.philox import seed_arguments, seed_of_arguments, seed_tensor, words

if TYPE_CHECKING:
    from rdmd_fast.kernels.noise_forward import CounterNoise

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SCALE = 1 / 127.5
TILE = 4096


def image_normalize_reference(images: Tensor, dtype: torch.dtype, flip: CounterNoise | None = None) -> Tensor:
    """``image_normalize`` in plain torch, on any device; ``images`` is channels_last."""
    if flip is not None:
        seed = int(flip.seed) & (1 << 64) - 1 if isinstance(flip.seed, Tensor) else flip.seed
        flipped = words(seed, flip.stream, flip.positions.to(images.device), 1) & 1 == 1
        images = torch.where(flipped[:, :, None, None], images.flip(3), images)
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(torch.float32).sub_(127.5).mul_(SCALE).to(dtype)


@jit(do_not_specialize=["stream", "units", "chunks"])
def _image_normalize_kernel(
    images, out, seed, positions, stream, units, chunks, UNIT: tl.constexpr, FLIP: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, (program % chunks).to(tl.int32)
    size = units * UNIT  # the factor UNIT proves the alignment that wide accesses need
    element = chunk * TILE + tl.arange(0, TILE)
    mask = element < size
    images += sample * size
    out += sample * size
    if FLIP:
        position = tl.load(positions + sample)
        lo, hi = position.to(tl.uint32), (position >> 32).to(tl.uint32)
        first = tl.zeros([1], tl.uint32)
        word, _, _, _ = tl.philox(tl.load(seed), first, first + tl.cast(stream, tl.uint32), first + lo, first + hi)
        if tl.sum(word & 1) == 1:
            in_row = element % (WIDTH * CHANNELS)
            column = in_row // CHANNELS
            source = element + (WIDTH - 1 - 2 * column) * CHANNELS
            byte = tl.load(images + source, mask=mask, other=0)
        else:
            byte = tl.load(images + element, mask=mask, other=0)
    else:
        byte = tl.load(images + element, mask=mask, other=0)
    value = (byte.to(tl.float32) - 127.5) * (1 / 127.5)
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


def _constants(shape: tuple[int, ...], flip: bool) -> tuple[dict, int, int]:
    """(constexprs, rows, elements a row): a row is a sample where each may flip, else part of the whole batch."""
    n, channels, height, width = shape
    rows, size = n, channels * height * width
    if not flip:
        # Flat over the batch; split only where 32-bit offsets would not reach.
        rows, size = (1, n * size) if n * size < 1 << 30 else (n, size)
        channels = width = 1
    constants = {"UNIT": min(16, size & -size), "FLIP": flip, "WIDTH": width, "CHANNELS": channels, "TILE": TILE}
    return constants, rows, size


def image_normalize_triton(images: Tensor, dtype: torch.dtype, flip: CounterNoise | None = None) -> Tensor:
    """``image_normalize`` by Triton; ``images`` is channels_last."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype {dtype}: the kernel writes one of {list(DTYPES)}; set RDMD_KERNELS=reference")
    out = _shape(images, dtype)
    if not out.numel():
        return out
    constants, rows, size = _constants(images.shape, flip is not None)
    chunks = triton.cdiv(size, TILE)
    counters = None, None, 0
    if flip is not None:
        positions = flip.positions.to(images.device, torch.int64).contiguous()
        counters = seed_tensor(flip.seed, images.device), positions, int(flip.stream)
    with torch.cuda.device_of(images):
        _image_normalize_kernel[(rows * chunks,)](
            images, out, *counters, size // constants["UNIT"], chunks, **constants, num_warps=4, enable_fp_fusion=False
        )
    return out


def _normalize(images: Tensor, dtype: torch.dtype, flip: CounterNoise | None) -> Tensor:
    implementations = {"triton": image_normalize_triton, "reference": image_normalize_reference, "shapes": _shape}
    return implementations[backend(images.device)](images, dtype, flip)


def _shape(images: Tensor, dtype: torch.dtype, *flip) -> Tensor:
    return torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)


@torch.library.custom_op("rdmd_fast::image_normalize", mutates_args=())
def _image_normalize_op(
    images: Tensor, dtype: torch.dtype, seed: int, seed_tensor: Tensor | None, stream: int, positions: Tensor | None
) -> Tensor:
    from rdmd_fast.kernels.noise_forward import CounterNoise

    flip = None if positions is None else CounterNoise(seed_of_arguments(seed, seed_tensor), stream, positions)
    return _normalize(images.contiguous(memory_format=torch.channels_last), dtype, flip)


_image_normalize_op.register_fake(_shape)


def image_normalize(images: Tensor, dtype: torch.dtype = torch.float32, flip: CounterNoise | None = None) -> Tensor:
    """Map bytes to [-1, 1].

    Args:
        images: uint8 [N, C, H, W], channels_last; other layouts are copied first.
        dtype: floating dtype of the result; the value is computed in fp32 and rounded once.
        flip: seed, stream and positions (int64 [N]) of the counters that decide which samples are mirrored left to
            right, each with probability 1/2; None mirrors none.

    Returns:
        ``dtype`` [N, C, H, W], channels_last.

    Raises:
        TypeError: ``images`` is not uint8, or the kernel does not write ``dtype``.
        ValueError: ``images`` is not 4-D, or its samples are not as many as positions.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, want torch.uint8")
    if images.ndim != 4 or (flip is not None and flip.positions.shape != images.shape[:1]):
        positions = None if flip is None else list(flip.positions.shape)
        raise ValueError(f"images are {list(images.shape)}, positions {positions}: want [N, C, H, W] and [N]")
    images = images.contiguous(memory_format=torch.channels_last)
    if torch.compiler.is_compiling():
        counters = (0, None, 0, None) if flip is None else (*seed_arguments(flip.seed, flip.stream), flip.positions)
        return _image_normalize_op(images, dtype, *counters)
    return _normalize(images, dtype, flip)
