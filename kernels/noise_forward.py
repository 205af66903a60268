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

from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import backend, jit, tl, triton
from rdmd_fast.kernels.coefficients import ALPHA, C_IN, SIGMA, Coefficients, Reading
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


def _reference(given: _Operands) -> list[Tensor]:
    y = given.clean.float() if given.x is None else generator_output(given.clean, given.x, given.skip, given.scale)
    epsilon = given.noise.values(y)
    c_in, alpha, sigma = (given.table.row(name, y) for name in ("c_in", "alpha", "sigma"))
    outputs = [(c_in * alpha * y).addcmul_(c_in * sigma, epsilon).to(given.dtype)]
    if given.x is not None:
        outputs.append(y)
    if given.return_state:
        outputs.append((alpha * y).addcmul_(sigma, epsilon))
    return [in_element_order(output) for output in outputs]


# -- kernel ------------------------------------------------------------------------------------------------------------


@jit
def load_coefficient(table, INDEX: tl.constexpr, row, n):
    """Row INDEX of the table, one of coefficients.py's constants, for the samples ``row``: [rows, 1]."""
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
    alpha, sigma = load_coefficient(table, ALPHA, row, n), load_coefficient(table, SIGMA, row, n)
    c_in = load_coefficient(table, C_IN, row, n)
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


# -- operation ---------------------------------------------------------------------------------------------------------

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", torch.dtype: "ScalarType", float: "float", bool: "bool", str: "str",
}  # fmt: skip
_TABLE_AND_NOISE = "Tensor table, SymInt seed, Tensor? seed_tensor, SymInt stream, Tensor positions, Tensor? drawn"


def noised_operation(name: str, operands: type, returns: str, **implementations: Callable) -> Callable:
    """Make an operation that draws its noise anew, and that torch.compile sees as one opaque node.

    Opaque on purpose: a compiler that fuses multiply and add would change the noise.

    Args:
        name: of the node, in the namespace ``rdmd_fast``.
        operands: a NamedTuple that begins with the samples whose device decides, and ends in ``table`` and ``noise``.
        returns: what comes back, in the language of operators' schemas.
        implementations: ``triton``, ``reference`` and ``shapes``, functions of the operands; the last makes the results
            and leaves them as they are, and reads neither table nor noise.

    Returns:
        A function of the operands. No gradient flows.
    """
    fields = [f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in list(get_type_hints(operands).items())[:-2]]

    def run(given):
        return implementations[backend(given[0].device)](given)

    def run_flat(*flat):
        rest, (table, *noise) = flat[:-6], flat[-6:]
        return run(operands(*rest, Coefficients(table), CounterNoise.of_arguments(*noise)))

    schema = f"({', '.join(fields)}, {_TABLE_AND_NOISE}) -> {returns}"
    node = torch.library.custom_op(f"rdmd_fast::{name}", run_flat, mutates_args=(), schema=schema)
    node.register_fake(lambda *flat: implementations["shapes"](operands(*flat[:-6], None, None)))

    @torch.no_grad()
    def operation(given):
        if torch.compiler.is_compiling():
            return node(*given[:-2], given.table.rows, *given.noise.arguments())
        return run(given)

    return operation


class _Operands(NamedTuple):
    """Operands of ``noise_forward``; with sources x, ``clean`` is the raw output of a generator's network."""

    clean: Tensor
    x: Tensor | None
    skip: float
    scale: float
    dtype: torch.dtype
    return_state: bool
    table: Coefficients
    noise: CounterNoise


def _shapes(given: _Operands) -> list[Tensor]:
    dtypes = [given.dtype] + [torch.float32] * ((given.x is not None) + given.return_state)
    return [empty_in_element_order(given.clean, each) for each in dtypes]


def _triton(given: _Operands) -> list[Tensor]:
    check_shapes(given.clean, given.table, given.noise, given.x)
    clean, x, outputs = in_element_order(given.clean), in_element_order(given.x), _shapes(given)
    y = outputs[1] if x is not None else None
    state = outputs[-1] if given.return_state else None
    launch(
        _noise_forward_kernel, clean, outputs[0], y, state, clean, x, given.table.rows.contiguous(),
        *noise_pointers(given.noise, clean.device), given.skip, given.scale,
    )  # fmt: skip
    return outputs


_noise_forward = noised_operation(
    "noise_forward", _Operands, "Tensor[]", triton=_triton, reference=_reference, shapes=_shapes
)


def noise_forward(
    y: Tensor, *, noise: CounterNoise, table: Coefficients, dtype: torch.dtype | None = None, return_state: bool = False
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
    outputs = _noise_forward(_Operands(y, None, 0.0, 1.0, dtype or y.dtype, return_state, table, noise))
    return outputs[0], outputs[1] if return_state else None


def generator_noise_forward(
    f_generator: Tensor,
    x: Tensor,
    *,
    reading: Reading,
    noise: CounterNoise,
    table: Coefficients,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Form y = skip x + scale F_G, noise it and scale it for the network, in one pass. No gradient flows.

    Args:
        f_generator: raw output of the generator's network [N, ...], any floating dtype.
        x: the sources it was made from [N, ...], data units.
        reading: how that network is read as a generator.
        noise: where ε comes from.
        table: coefficients of the N samples.
        dtype: dtype of the network input; that of ``f_generator`` if None.

    Returns:
        (network input [N, ...] in ``dtype``, y float32 [N, ...]); images in channels_last.
    """
    dtype = dtype or f_generator.dtype
    network_input, y = _noise_forward(
        _Operands(f_generator, x, reading.skip, reading.scale, dtype, False, table, noise)
    )
    return network_input, y
