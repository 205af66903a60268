"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011) and normals of the same bits anywhere.

A counter is four 32-bit words. One round is, with the 64-bit products p0 = M0 c0 and p1 = M1 c2,

    (c0, c1, c2, c3) <- (hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0)),   (k0, k1) += (W0, W1)

and there are ten. Element j of the sample at position i of a stream is lane j mod 4 of the counter
(j // 4, stream, low half of i, high half of i), with the 64-bit seed as key. Nothing else enters: no rank,
batch size, device or block size.

Words become normals by Box-Muller, words (0, 1) into lanes 0, 1 and words (2, 3) into lanes 2, 3:

    u = fp32(w0) 2^-32 + 2^-33 in (0, 1],   radius = sqrt(-2 ln u)
    quadrant q = w1 >> 30,   a = (w1 mod 2^30 - 2^29) pi/2^31 in [-pi/4, pi/4]
    (lane 0, lane 1) = radius (cos, sin)(q pi/2 + a)

ln, sin and cos are the polynomials of Cephes (Moshier; logf, sinf, cosf) in fp32, in one fixed order of
roundings with no fused multiply-add, and the square root is rounded correctly. So CPU, interpreter and GPU
agree to the bit.
"""

import functools
import math

import torch
from torch import Tensor

from rdmd_fast.kernels._dispatch import INTERPRETED, backend, jit, tl, triton

_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def check_key(seed: int | Tensor, stream: int = 0) -> None:
    """Raises ValueError for a seed or stream out of range, or a seed that is no int64 [1]."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed is {seed.dtype} {list(seed.shape)}, want an int or torch.int64 [1]")
    elif not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is outside [0, 2**64)")
    if not 0 <= stream <= _WORD:
        raise ValueError(f"stream {stream} is outside [0, 2**32)")


@functools.lru_cache(maxsize=64)
def _cached_seed(seed: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([_signed(seed)], device=device)


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The 64 bits of a seed as int64 [1] on ``device``, where kernels read it; made once for each integer."""
    return seed if isinstance(seed, Tensor) else _cached_seed(seed, device)


def seed_arguments(seed: int | Tensor, stream: int) -> tuple[int, Tensor | None, int]:
    """A checked seed and stream as (signed seed, seed tensor or None, stream): what an operator's schema can hold."""
    check_key(seed, stream)
    return (0, seed, int(stream)) if isinstance(seed, Tensor) else (_signed(seed), None, int(stream))


def seed_of_arguments(signed: int, tensor: Tensor | None) -> int | Tensor:
    """The seed behind ``seed_arguments``."""
    return signed & (1 << 64) - 1 if tensor is None else tensor


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of each counter.

    Args:
        counter: four int64 tensors of words in [0, 2**32), of shapes that broadcast together.
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of words in [0, 2**32), of the broadcast shape.

    Raises:
        ValueError: ``seed`` is outside [0, 2**64).
    """
    check_key(seed)
    k0, k1 = seed & _WORD, seed >> 32
    c0, c1, c2, c3 = counter
    # Products wrap to 64 bits; the mask drops the copies of the sign that the shift brings in. The same mask
    # comes later for c1 and c3, so these carry junk in their high halves until the end.
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _draw(seed: int, stream: int, positions: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of counters 0 .. blocks - 1 of each position: four int64 [N, blocks]."""
    check_key(seed, stream)
    block = torch.arange(blocks, device=positions.device)[None]
    position = positions.to(torch.int64)[:, None]
    counter = block, torch.full_like(block, stream), position & _WORD, (position >> 32) & _WORD
    return philox4x32(counter, seed)


def words(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """The first ``count`` 32-bit words of each position.

    Args:
        seed: in [0, 2**64).
        stream: in [0, 2**32).
        positions: int64 [N].
        count: words a position, up to 2**34.

    Returns:
        int64 [N, count] in [0, 2**32), on the device of ``positions``.
    """
    lanes = torch.stack(_draw(seed, stream, positions, -(-count // 4)), dim=-1)
    return lanes.flatten(1)[:, :count].contiguous()


def uniform64(seed: int, stream: int, positions: Tensor, count: int = 1) -> Tensor:
    """Uniform numbers in the open interval (0, 1), each of 53 bits from words 2j and 2j + 1.

    Returns:
        float64 [N, count] on the device of ``positions``.
    """
    pairs = words(seed, stream, positions, 2 * count).unflatten(1, (count, 2))
    integers = (pairs[..., 0] >> 5 << 26) | (pairs[..., 1] >> 6)
    return integers.double().clamp_(min=0.5).mul_(2.0**-53)


def _horner(x: Tensor, leading: float, *coefficients: float) -> Tensor:
    value = x * leading
    for coefficient in coefficients[:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])


def _log(u: Tensor) -> Tensor:
    """Cephes logf of positive normal fp32 numbers: u = 2^e (1 + x) with 1 + x in [sqrt(1/2), sqrt(2))."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).view(torch.float32).sub_(1.0)
    e = exponent.float()
    z = x * x
    y = _horner(
        x,
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
    y.mul_(x).mul_(z).add_(e * -2.12194440e-4).sub_(z.mul_(0.5)).add_(x)
    return y.add_(e.mul_(0.693359375))


def _sine_cosine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Cephes sinf and cosf of fp32 angles in [-pi/4, pi/4]."""
    z = angle * angle
    sine = _horner(z, -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1).mul_(z).mul_(angle).add_(angle)
    cosine = _horner(z, 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
    cosine.mul_(z).mul_(z).sub_(z.mul_(0.5)).add_(1.0)
    return sine, cosine


def _box_muller(radius_word: Tensor, angle_word: Tensor, out: Tensor) -> None:
    """Write the two normals of each pair of int64 words [...] to fp32 ``out`` [..., 2]."""
    log = _log(radius_word.float().mul_(2.0**-32).add_(2.0**-33))
    # The square root of torch is not rounded correctly in fp32 on the CPU; in fp64, rounded once more, it is.
    radius = log.mul_(-2.0).double().sqrt_().float()
    angle_word = angle_word.int()
    offset = (angle_word & 0x3FFFFFFF).sub_(1 << 29)
    sine, cosine = _sine_cosine(offset.float().mul_(math.pi / 2**31))
    odd = (angle_word & (1 << 30)) != 0
    # A quarter turn maps (cos, sin) to (-sin, cos): odd quadrants swap. The sign of sin is bit 31 of the
    # word, that of cos the same bit a quarter turn on.
    first = torch.where(odd, sine, cosine).mul_(radius)
    second = torch.where(odd, cosine, sine).mul_(radius)
    sign = -(1 << 31)
    second.view(torch.int32).bitwise_xor_(angle_word & sign)
    first.view(torch.int32).bitwise_xor_(angle_word.add_(1 << 30).bitwise_and_(sign))
    out[..., 0], out[..., 1] = first, second


def normal_reference(seed: int | Tensor, stream: int, positions: Tensor, count: int) -> Tensor:
    """``normal`` in plain torch, on any device; a seed in a tensor is read by the host."""
    seed = int(seed) & (1 << 64) - 1 if isinstance(seed, Tensor) else seed
    blocks = -(-count // 4)
    out = positions.new_empty((positions.numel(), blocks, 2, 2), dtype=torch.float32)
    w0, w1, w2, w3 = _draw(seed, stream, positions, blocks)
    _box_muller(w0, w1, out[:, :, 0])
    if count > 2:
        _box_muller(w2, w3, out[:, :, 1])
    return out.flatten(1)[:, :count].contiguous()


@jit
def _philox_log(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = x * x
    y = x * 7.0376836292e-2 - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z + e * -2.12194440e-4
    return y - z * 0.5 + x + e * 0.693359375


@jit
def _philox_box_muller(radius_word, angle_word):
    log = _philox_log(radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10)
    radius = tl.sqrt_rn(log * -2.0)
    offset = (angle_word & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    angle = offset.to(tl.float32) * 1.4629180792671596e-9
    z = angle * angle
    sine = z * -1.9515295891e-4 + 8.3321608736e-3
    sine = (sine * z - 1.6666654611e-1) * z * angle + angle
    cosine = z * 2.443315711809948e-5 - 1.388731625493765e-3
    cosine = (cosine * z + 4.166664568298827e-2) * z * z - z * 0.5 + 1.0
    odd = (angle_word & 0x40000000) != 0
    first = (tl.where(odd, sine, cosine) * radius).to(tl.uint32, bitcast=True)
    second = (tl.where(odd, cosine, sine) * radius).to(tl.uint32, bitcast=True)
    turned = angle_word ^ ((angle_word & 0x40000000) << 1)  # bit 31 as in the word a quarter turn on
    first = first ^ (turned & 0x80000000)
    second = second ^ (angle_word & 0x80000000)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@jit
def philox_normal4(seed, stream, position_lo, position_hi, block):
    """Four normals, elements 4 block .. 4 block + 3 of a position, with the bits of ``normal``.

    For use inside Triton kernels, which must be launched with ``enable_fp_fusion=False``. ``seed`` is a
    scalar; ``stream``, ``position_lo``, ``position_hi`` (halves of the position) and ``block`` are integer
    scalars or tensors whose shapes broadcast together. Returns four fp32 tensors of that shape.
    """
    # Cast first: tl.philox turns into Philox4x64 on 64-bit words.
    lo, hi = tl.cast(position_lo, tl.uint32), tl.cast(position_hi, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, tl.cast(block, tl.uint32), tl.cast(stream, tl.uint32), lo, hi)
    n0, n1 = _philox_box_muller(w0, w1)
    n2, n3 = _philox_box_muller(w2, w3)
    return n0, n1, n2, n3


@jit
def interleave4(n0, n1, n2, n3):
    """Four [..., B] tensors as one [..., B, 4]; reshaped to [..., 4 B] it is stored in pieces of 16 bytes."""
    lanes = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(lanes, n0.shape + [4])  # noqa: RUF005 (Triton knows no unpacking)


@jit(do_not_specialize=["stream", "n"])
def _normal_kernel(out, positions, seed, stream, n, count, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    position = tl.load(positions + row, mask=row < n, other=0)[:, None]
    key = tl.load(seed)
    n0, n1, n2, n3 = philox_normal4(key, stream, position & 0xFFFFFFFF, position >> 32, block[None, :])
    values = tl.reshape(interleave4(n0, n1, n2, n3), [ROWS, BLOCKS * 4])
    element = tl.program_id(1).to(tl.int64) * (BLOCKS * 4) + tl.arange(0, BLOCKS * 4)
    mask = (row < n)[:, None] & (element < count)[None, :]
    tl.store(out + row[:, None] * count + element[None, :], values, mask=mask)


def _normal_tile(count: int) -> tuple[int, int]:
    """(positions, counters) a program: 512 counters (4,096 for the interpreter, which pays by the program)."""
    tile = 4096 if INTERPRETED else 512
    blocks = min(tile, triton.next_power_of_2(-(-count // 4)))
    return tile // blocks, blocks


def normal_triton(seed: int | Tensor, stream: int, positions: Tensor, count: int) -> Tensor:
    """``normal`` by Triton, on a GPU or, under the interpreter, on the CPU."""
    check_key(seed, stream)
    n = positions.numel()
    out = _normal_shape(seed, stream, positions, count)
    if not out.numel():
        return out
    rows, blocks = _normal_tile(count)
    grid = (triton.cdiv(n, rows), triton.cdiv(count, 4 * blocks))
    seed = seed_tensor(seed, positions.device)
    with torch.cuda.device_of(positions):
        _normal_kernel[grid](
            out, positions.to(torch.int64).contiguous(), seed, int(stream), n, count, rows, blocks,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _normal(seed: int | Tensor, stream: int, positions: Tensor, count: int) -> Tensor:
    check_key(seed, stream)
    draw = {"triton": normal_triton, "reference": normal_reference, "shapes": _normal_shape}[backend(positions.device)]
    return draw(seed, stream, positions, count)


def _normal_shape(seed, stream, positions: Tensor, count: int) -> Tensor:
    return positions.new_empty((positions.numel(), count), dtype=torch.float32)


# Opaque to torch.compile on purpose: a compiler that fuses multiply and add would change the bits.
@torch.library.custom_op("rdmd_fast::normal", mutates_args=())
def _normal_op(seed: int, seed_tensor: Tensor | None, stream: int, positions: Tensor, count: int) -> Tensor:
    return _normal(seed_of_arguments(seed, seed_tensor), stream, positions, count)


_normal_op.register_fake(lambda seed, seed_tensor, *arguments: _normal_shape(seed, *arguments))


def normal(seed: int | Tensor, stream: int, positions: Tensor, count: int) -> Tensor:
    """The first ``count`` standard normals of each position.

    Args:
        seed: in [0, 2**64), or its 64 bits as int64 [1] on the device of ``positions``: a captured CUDA graph
            reads seed and positions anew at each replay.
        stream: in [0, 2**32).
        positions: int64 [N].
        count: normals a position.

    Returns:
        float32 [N, count], contiguous, on the device of ``positions``, with the same bits on every device.

    Raises:
        ValueError: ``seed`` or ``stream`` is out of range.
        RuntimeError: ``RDMD_KERNELS`` asks for what cannot run here.
    """
    if torch.compiler.is_compiling():
        return _normal_op(*seed_arguments(seed, stream), positions, count)
    return _normal(seed, stream, positions, count)
