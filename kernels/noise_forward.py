"""Forward process fused with the network's input scaling, and before it the generator's output.

    y     = skip x + scale F_G(x)                  the generator as its network is read (EDM, arXiv 2206.00364, Eq. 7)
    x_t   = F(y, t) = α y + σ ε                    (RDMD, arXiv 2406.14762, Section 3; EDM has α = 1)
    input = c_in x_t = (c_in α) y + (c_in σ) ε

ε is a pure function of (seed, stream, sample position, element): see philox.py. Whoever needs it again draws it
again instead of storing it.

Memory: ``noise_forward`` reads y and writes the input; ``generator_noise_forward`` reads F_G and x and writes the
input and y. One launch each. Every sample is cut into chunks of 1,024 elements, one to a program; small samples share
a program. The cut depends on the sample's size alone, so that sums by chunk (rdmd_gradient.py, denoising_loss.py) do
not depend on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, jit, tl, triton
from rdmd_fast.kernels._static import StaticCase
from rdmd_fast.kernels.coefficients import Coefficients
from rdmd_fast.kernels.philox import (
    check_key,
    interleave4,
    normal,
    philox_normal4,
    seed_arguments,
    seed_of_arguments,
    seed_tensor,
)

CHUNK = 1024  # elements of a sample that one program handles and one partial sum covers


class CounterNoise(NamedTuple):
    """Standard normal noise named by its counters.

    Attributes:
        seed: 64-bit key of the run, or those bits as int64 [1] on the samples' device: a captured CUDA graph reads
            them, and the positions, anew at each replay.
        stream: 32-bit word that keeps the uses of randomness apart.
        positions: int64 [N], each sample's position in its stream since the run began; on the samples' device.
        drawn: float32 [N, ...] of the samples' shape where it was drawn ahead (toys, in large blocks), else None.
    """

    seed: int | Tensor
    stream: int
    positions: Tensor
    drawn: Tensor | None = None

    def values(self, like: Tensor) -> Tensor:
        """The noise as float32 in the shape of ``like``; images count their elements in (h, w, c) order."""
        if self.drawn is not None:
            return self.drawn
        shape = like.shape
        flat = normal(self.seed, self.stream, self.positions.to(like.device), like[0].numel())
        if like.ndim != 4:
            return flat.view(shape)
        return flat.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)

    def arguments(self) -> tuple[int, Tensor | None, int, Tensor, Tensor | None]:
        """(seed, seed tensor, stream, positions, drawn): what an operator's schema can hold."""
        return *seed_arguments(self.seed, self.stream), self.positions, self.drawn

    @classmethod
    def of_arguments(cls, seed, seed_tensor, stream, positions, drawn) -> CounterNoise:
        return cls(seed_of_arguments(seed, seed_tensor), stream, positions, drawn)


# -- layout ------------------------------------------------------------------------------------------------------------


def in_element_order(samples: Tensor | None) -> Tensor | None:
    """The samples with their memory in element order: channels_last for images [N, C, H, W], row-major otherwise.

    A tensor that lies so already is returned as it is; any other strides cost one copy, here and nowhere else.
    """
    if samples is None:
        return None
    return samples.contiguous(memory_format=torch.channels_last if samples.ndim == 4 else torch.contiguous_format)


def empty_in_element_order(like: Tensor, dtype: torch.dtype) -> Tensor:
    memory_format = torch.channels_last if like.ndim == 4 else torch.contiguous_format
    return torch.empty_like(like, dtype=dtype, memory_format=memory_format)


def chunk_count(elements: int) -> int:
    """Partial sums a sample of ``elements`` elements has."""
    return -(-elements // CHUNK)


def tile_of(elements: int) -> tuple[int, int]:
    """(samples, elements of each) that a program handles: 1,024 in all, never more than one chunk of a sample."""
    width = max(4, min(CHUNK, triton.next_power_of_2(elements)))
    return CHUNK // width, width


def chunk_sums(values: Tensor) -> Tensor:
    """Sums over chunks of 1,024 elements in element order: [N, ...] to [N, chunks]."""
    flat = (values.permute(0, 2, 3, 1) if values.ndim == 4 else values).flatten(1)
    chunks = chunk_count(flat.shape[1])
    if chunks > 1:
        flat = torch.nn.functional.pad(flat, (0, chunks * CHUNK - flat.shape[1])).unflatten(1, (chunks, CHUNK))
        return flat.sum(2)
    return flat.sum(1, keepdim=True)


def add_chunks(partials: Tensor) -> Tensor:
    """Sums of samples [N] from those of their chunks [N, chunks]."""
    return partials[:, 0] if partials.shape[1] == 1 else partials.sum(1)


# -- reference ---------------------------------------------------------------------------------------------------------


def generator_output(f_generator: Tensor, x: Tensor, skip: float, scale: float) -> Tensor:
    """y = skip x + scale F_G, float32."""
    return torch.add(skip * x.float(), f_generator.float(), alpha=scale)


def _reference(clean, x, table, noise, skip, scale, dtype, return_state) -> list[Tensor]:
    y = clean.float() if x is None else generator_output(clean, x, skip, scale)
    epsilon = noise.values(y)
    c_in, alpha, sigma = (table.row(name, y) for name in ("c_in", "alpha", "sigma"))
    outputs = [(c_in * alpha * y).addcmul_(c_in * sigma, epsilon).to(dtype)]
    if x is not None:
        outputs.append(y)
    if return_state:
        outputs.append((alpha * y).addcmul_(sigma, epsilon))
    return [in_element_order(output) for output in outputs]


# -- kernel ------------------------------------------------------------------------------------------------------------


@jit
def load_coefficient(table, INDEX: tl.constexpr, row, n):
    """Row INDEX of the table (order of coefficients.ROWS) for the samples ``row``: [rows, 1]."""
    return tl.load(table + INDEX * n + row, mask=row < n, other=0.0)[:, None]


@jit
def tile_pointers(n, count, chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's samples [ROWS], its chunk, and offsets and mask [ROWS, WIDTH] of their elements."""
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    offsets = (row * count + chunk.to(tl.int64) * WIDTH)[:, None] + lane[None, :]
    mask = (row < n)[:, None] & (lane < count - chunk * WIDTH)[None, :]
    return row, chunk, offsets, mask


@jit
def load_samples(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def load_clean(clean, x, skip, scale, offsets, mask):
    """y: read from ``clean``, or of the generator whose raw output ``clean`` is, where x is given."""
    value = load_samples(clean, offsets, mask)
    if x is not None:
        value = skip * load_samples(x, offsets, mask) + scale * value
    return value


@jit
def noise_tile(seed, stream, positions, drawn, row, chunk, offsets, mask, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ε [ROWS, WIDTH] of this program's elements, with the bits of philox.normal."""
    if drawn is not None:
        epsilon = tl.load(drawn + offsets, mask=mask, other=0.0)
    else:
        position = tl.load(positions + row, mask=row < n, other=0)[:, None]
        block = chunk * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
        key = tl.load(seed)
        n0, n1, n2, n3 = philox_normal4(key, stream, position & 0xFFFFFFFF, position >> 32, block)
        epsilon = tl.reshape(interleave4(n0, n1, n2, n3), [ROWS, WIDTH])
    return epsilon


@jit(do_not_specialize=["stream", "n", "chunks"])
def _noise_forward_kernel(
    network_input, y, state, clean, x, table, seed, positions, drawn,
    stream, skip, scale, n, count, chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, chunk, offsets, mask = tile_pointers(n, count, chunks, ROWS, WIDTH)
    value = load_clean(clean, x, skip, scale, offsets, mask)
    if y is not None:
        tl.store(y + offsets, value, mask=mask)
    epsilon = noise_tile(seed, stream, positions, drawn, row, chunk, offsets, mask, n, ROWS, WIDTH)
    alpha, sigma = load_coefficient(table, 0, row, n), load_coefficient(table, 1, row, n)
    c_in = load_coefficient(table, 4, row, n)
    scaled = c_in * alpha * value + c_in * sigma * epsilon
    tl.store(network_input + offsets, scaled.to(network_input.dtype.element_ty), mask=mask)
    if state is not None:
        tl.store(state + offsets, alpha * value + sigma * epsilon, mask=mask)


# -- launcher ----------------------------------------------------------------------------------------------------------


def launch(kernel, like: Tensor, *arguments, **constants) -> None:
    """Run a kernel over the elements of ``like`` [N, ...]; its last arguments are n, count, chunks, ROWS, WIDTH."""
    n, count = like.shape[0], like[0].numel()
    if not n * count:
        return
    rows, width = tile_of(count)
    chunks = chunk_count(count)
    with torch.cuda.device_of(like):
        # Unfused multiply and add: the noise has the same bits everywhere. 8 elements a thread: 16 bytes of bf16.
        kernel[(triton.cdiv(n, rows) * chunks,)](
            *arguments, n, count, chunks, ROWS=rows, WIDTH=width, **constants, num_warps=4, enable_fp_fusion=False
        )


def check_shapes(like: Tensor, table: Coefficients, noise: CounterNoise | None, *samples: Tensor | None) -> None:
    """Kernels trust shapes blindly.

    Raises:
        ValueError: a tensor is not of the samples' shape or device, or the table or noise not of their number.
    """
    for tensor in (*samples, noise and noise.drawn):
        if tensor is not None and (tensor.shape != like.shape or tensor.device != like.device):
            raise ValueError(
                f"samples are {list(like.shape)} on {like.device} and {list(tensor.shape)} on {tensor.device}"
            )
    if table.rows.shape[1] != like.shape[0] or table.rows.device != like.device:
        raise ValueError(f"{like.shape[0]} samples on {like.device}, table {list(table.rows.shape)}")
    if noise is not None and noise.positions.numel() != like.shape[0]:
        raise ValueError(f"{like.shape[0]} samples, {noise.positions.numel()} positions of noise")


def noise_pointers(noise: CounterNoise, device: torch.device) -> tuple:
    """(seed, positions, drawn, stream) as the kernels take them."""
    check_key(noise.seed, noise.stream)
    positions = noise.positions.to(device, torch.int64, non_blocking=True).contiguous()
    return seed_tensor(noise.seed, device), positions, in_element_order(noise.drawn), noise.stream


def _triton(clean, x, table, noise, skip, scale, dtype, return_state) -> list[Tensor]:
    check_shapes(clean, table, noise, x)
    clean, x = in_element_order(clean), in_element_order(x)
    outputs = _empty_outputs(clean, x, dtype, return_state)
    y = outputs[1] if x is not None else None
    state = outputs[-1] if return_state else None
    launch(
        _noise_forward_kernel, clean, outputs[0], y, state, clean, x, table.rows.contiguous(),
        *noise_pointers(noise, clean.device), skip, scale,
    )  # fmt: skip
    return outputs


# -- operation ---------------------------------------------------------------------------------------------------------


def _empty_outputs(clean, x, dtype, return_state) -> list[Tensor]:
    dtypes = [dtype] + [torch.float32] * ((x is not None) + return_state)
    return [empty_in_element_order(clean, each) for each in dtypes]


def _forward(clean, x, table, noise, skip, scale, dtype, return_state) -> list[Tensor]:
    implementation = _triton if backend(clean.device) == "triton" else _reference
    return implementation(clean, x, table, noise, skip, scale, dtype, return_state)


# Opaque to torch.compile on purpose: a compiler that fuses multiply and add would change the noise.
@torch.library.custom_op("rdmd_fast::noise_forward", mutates_args=())
def _noise_forward_op(
    clean: Tensor,
    x: Tensor | None,
    table: Tensor,
    seed: int,
    seed_tensor: Tensor | None,
    stream: int,
    positions: Tensor,
    drawn: Tensor | None,
    skip: float,
    scale: float,
    dtype: torch.dtype,
    return_state: bool,
) -> list[Tensor]:
    noise = CounterNoise.of_arguments(seed, seed_tensor, stream, positions, drawn)
    return _forward(clean, x, Coefficients(table), noise, skip, scale, dtype, return_state)


@_noise_forward_op.register_fake
def _(clean, x, table, seed, seed_tensor, stream, positions, drawn, skip, scale, dtype, return_state):
    return _empty_outputs(clean, x, dtype, return_state)


@torch.no_grad()
def _dispatch(clean, x, table, noise, skip, scale, dtype, return_state) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return _noise_forward_op(clean, x, table.rows, *noise.arguments(), skip, scale, dtype, return_state)
    return _forward(clean, x, table, noise, skip, scale, dtype, return_state)


def noise_forward(
    y: Tensor,
    noise: CounterNoise,
    table: Coefficients,
    dtype: torch.dtype | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Noise ``y`` and scale it for the network. No gradient flows.

    Args:
        y: clean samples [N, ...], any floating dtype, data units.
        noise: where ε comes from.
        table: coefficients of the N samples.
        dtype: dtype of the network input; that of ``y`` if None.
        return_state: also return x_t as float32.

    Returns:
        (network input [N, ...] in ``dtype``, x_t or None); images in channels_last.
    """
    outputs = _dispatch(y, None, table, noise, 0.0, 1.0, dtype or y.dtype, return_state)
    return outputs[0], outputs[1] if return_state else None


def generator_noise_forward(
    f_generator: Tensor,
    x: Tensor,
    skip: float,
    scale: float,
    noise: CounterNoise,
    table: Coefficients,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y = skip x + scale F_G, noised and scaled for the network, in one pass. No gradient flows.

    Args:
        f_generator: raw output of the generator's network [N, ...], any floating dtype.
        x: the sources it was made from [N, ...], data units.
        skip, scale: how that network is read as a generator.
        noise: where ε comes from.
        table: coefficients of the N samples.
        dtype: dtype of the network input; that of ``f_generator`` if None.

    Returns:
        (network input [N, ...] in ``dtype``, y float32 [N, ...]); images in channels_last.
    """
    network_input, y = _dispatch(f_generator, x, table, noise, skip, scale, dtype or f_generator.dtype, False)
    return network_input, y


# -- ahead-of-time cases -----------------------------------------------------------------------------------------------

# Samples that reach every branch of tile_of: a point, an image of 8x8, one of 64x64.
STATIC_SAMPLES = {"2": 2, "3x8x8": 192, "3x64x64": 12288}


def static_case(name: str, kernel, elements: int, types: dict[str, str], constants: dict, vectors=True) -> StaticCase:
    """A kernel that ``launch`` runs, at samples of ``elements``; an argument typed None is absent."""
    rows, width = tile_of(elements)
    signature = {argument: kind or "constexpr" for argument, kind in types.items()}
    signature |= {"n": "i32", "count": "i32", "chunks": "i32", "ROWS": "constexpr", "WIDTH": "constexpr"}
    signature |= {argument: "constexpr" for argument in constants}
    absent = {argument: None for argument, kind in types.items() if kind is None}
    aligned = [argument for argument, kind in types.items() if kind and kind.startswith("*")]
    if elements % 16 == 0:
        aligned.append("count")
    return StaticCase(
        name,
        kernel,
        {argument: signature[argument] for argument in kernel.arg_names},
        {"ROWS": rows, "WIDTH": width, **absent, **constants},
        tuple(aligned),
        num_warps=4,
        vector_pointers=vectors and elements % 16 == 0,
    )


NOISE_TYPES = {"seed": "*i64", "positions": "*i64", "drawn": None, "stream": "i32"}
READING_TYPES = {"skip": "fp32", "scale": "fp32"}


def static_cases() -> list[StaticCase]:
    """Each sample size, from y and from F_G, in fp32, bf16 and fp16; once with x_t, once with noise drawn ahead."""
    common = {"table": "*fp32", **NOISE_TYPES, **READING_TYPES, "y": None, "state": None, "x": None}
    variants = {
        "fp32": {"clean": "*fp32", "network_input": "*fp32"},
        "bf16": {"clean": "*fp32", "network_input": "*bf16"},
        "fp16": {"clean": "*fp32", "network_input": "*fp16"},
        "bf16-state": {"clean": "*fp32", "network_input": "*bf16", "state": "*fp32"},
        "bf16-drawn": {"clean": "*fp32", "network_input": "*bf16", "drawn": "*fp32"},
        "generator-fp32": {"clean": "*fp32", "network_input": "*fp32", "x": "*fp32", "y": "*fp32"},
        "generator-bf16": {"clean": "*bf16", "network_input": "*bf16", "x": "*fp32", "y": "*fp32"},
    }
    cases = []
    for shape, elements in STATIC_SAMPLES.items():
        for variant, types in variants.items():
            if shape == "3x64x64" or variant in ("bf16", "generator-bf16"):
                name = f"noise_forward/{variant}/{shape}"
                cases.append(static_case(name, _noise_forward_kernel, elements, {**common, **types}, {}))
    return cases
