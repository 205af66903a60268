"""What each instruction computes.

``prepare`` turns an instruction into a function of the machine and of the mask of the threads that execute it (None:
all). An instruction without an entry in the table is refused when a kernel is read, not when it is reached.

Approximate instructions (``.approx``, ``div.full``) are computed in fp64 and rounded: within the tolerance that PTX
states for a GPU's, and not its bits. ``mul`` and ``add`` without ``.rn``, which NVIDIA's assembler may fuse, stay two.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from tests.gpu_stand_in.ptx.faults import Fault, UnknownInstruction
from tests.gpu_stand_in.ptx.text import Immediate, Instruction, Register, Symbol, Vector

WARP = 32
Mask = np.ndarray | None
Run = Callable[["Machine", Mask], None]  # noqa: F821
_TABLE: dict[str, Callable[[Instruction], Run]] = {}


def prepare(instruction: Instruction) -> Run:
    """Find its meaning.

    Raises:
        UnknownInstruction: there is none here, or none for these types.
    """
    if instruction.parts[0] in ("atom", "red"):
        message = f"{instruction.text}: atomics make results depend on the order of threads"
        raise UnknownInstruction(message)
    try:
        return _TABLE[instruction.parts[0]](instruction)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        raise UnknownInstruction(f"unknown instruction: {instruction.text}") from None


def _meaning(*names: str):
    """Enter a factory in the table."""

    def enter(factory):
        _TABLE.update(dict.fromkeys(names, factory))
        return factory

    return enter


# -- types -------------------------------------------------------------------------------------------------------------

_KINDS = {"u": "u", "s": "i", "b": "u", "f": "f"}
PREDICATE = np.dtype(bool)


def _type(name: str) -> np.dtype:
    """NumPy's type of ``.s32`` and the like; bits are unsigned integers."""
    if name == "pred":
        return PREDICATE
    return np.dtype(f"{_KINDS[name[0]]}{int(name[1:]) // 8}")


def _unsigned(bits: int) -> np.dtype:
    return np.dtype(f"u{bits // 8}")


def _check(known: bool) -> None:
    """Have ``prepare`` refuse what is not known."""
    if not known:
        raise KeyError


def _only(instruction: Instruction, *known: str) -> None:
    """Refuse modifiers that are not known, of those between name and type."""
    _check(set(instruction.parts[1:-1]) <= set(known))


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _elementwise(compute: Callable, dtype: np.dtype, operands: tuple, count: int) -> Run:
    """``operands[0] = compute(*operands[1:])``, which are ``count``, all of one type."""
    target, *sources = operands
    _check(len(sources) == count)

    def run(machine, mask) -> None:
        values = [machine.read(source, dtype) for source in sources]
        machine.write(target, np.asarray(compute(*values), dtype), mask)

    return run


_ARITHMETIC = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "not": operator.invert, "neg": operator.neg,
}  # fmt: skip
_FLOAT_ONLY = {"f32", "f64"}


@_meaning("add", "sub", "neg")
def _sums(instruction: Instruction) -> Run:
    name, kind = instruction.parts[0], instruction.parts[-1]
    if name == "add" and kind in _NARROW_SUMS:
        _only(instruction)
        compute, bits = _NARROW_SUMS[kind]
        return _elementwise(compute, _unsigned(bits), instruction.operands, 2)
    _only(instruction, *(("rn",) if kind in _FLOAT_ONLY else ()))
    return _elementwise(_ARITHMETIC[name], _number(kind), instruction.operands, 1 if name == "neg" else 2)


def _bf16_sum(x, y):
    """fp32 has bits enough that a second rounding, to bf16, falsifies nothing."""
    return bf16_bits(from_bf16_bits(x) + from_bf16_bits(y))


def _in_halves(add: Callable) -> Callable:
    """``add`` of the lower and of the upper halves."""

    def both(x, y):
        parts = (add((x >> place).astype(np.uint16), (y >> place).astype(np.uint16)) for place in (0, 16))
        low, high = (np.asarray(part).astype(np.uint32) for part in parts)
        return high << np.uint32(16) | low

    return both


# (function of bits, how many)
_NARROW_SUMS = {
    "bf16": (_bf16_sum, 16), "bf16x2": (_in_halves(_bf16_sum), 32), "s16x2": (_in_halves(operator.add), 32),
}  # fmt: skip


@_meaning("and", "or", "xor", "not")
def _bitwise(instruction: Instruction) -> Run:
    _only(instruction)
    name, kind = instruction.parts
    _check(kind[0] in "bp")
    return _elementwise(_ARITHMETIC[name], _type(kind), instruction.operands, 1 if name == "not" else 2)


def _number(kind: str) -> np.dtype:
    _check(kind in ("u16", "u32", "u64", "s16", "s32", "s64", *_FLOAT_ONLY))
    return _type(kind)


@_meaning("abs")
def _absolute(instruction: Instruction) -> Run:
    kind = instruction.parts[-1]
    _only(instruction, *(("ftz",) if kind == "f32" else ()))
    return _elementwise(_flushing(np.abs, instruction), _number(kind), instruction.operands, 1)


@_meaning("copysign")
def _copysign(instruction: Instruction) -> Run:
    """The sign of the first in the second: the other way round than C."""
    _only(instruction)
    dtype = _number(instruction.parts[-1])
    return _elementwise(lambda sign, size: np.copysign(size, sign), dtype, instruction.operands, 2)


@_meaning("min", "max")
def _extremes(instruction: Instruction) -> Run:
    kind = instruction.parts[-1]
    larger = instruction.parts[0] == "max"
    if kind not in _FLOAT_ONLY:
        _only(instruction)
        return _elementwise(np.maximum if larger else np.minimum, _number(kind), instruction.operands, 2)
    _only(instruction, "NaN")
    keeps_nan = "NaN" in instruction.parts
    return _elementwise(lambda x, y: _extreme(x, y, larger, keeps_nan), _type(kind), instruction.operands, 2)


def _extreme(x, y, larger: bool, keeps_nan: bool):
    """A number wins over a NaN unless ``.NaN`` is asked for, and -0 is less than +0."""
    # Equal zeros of two signs: the sum is +0 unless both are -0, as max wants; min by negation.
    zeros = (x == 0) & (y == 0)
    out = (np.fmax if larger else np.fmin)(x, y)
    out = np.where(zeros, x + y if larger else -((-x) + (-y)), out)
    nan = np.isnan(x) | np.isnan(y) if keeps_nan else np.isnan(x) & np.isnan(y)
    return np.where(nan, out.dtype.type(np.nan), out)


@_meaning("mul")
def _products(instruction: Instruction) -> Run:
    kind = instruction.parts[-1]
    if kind in _FLOAT_ONLY:
        _only(instruction, "rn", *(("ftz",) if kind == "f32" else ()))
        return _elementwise(_flushing(operator.mul, instruction), _type(kind), instruction.operands, 2)
    return _integer_product(instruction, has_addend=False)


@_meaning("mad")
def _product_and_sum(instruction: Instruction) -> Run:
    if "cc" in instruction.parts:
        return _low_product_and_carry(instruction)
    return _integer_product(instruction, has_addend=True)


def _integer_product(instruction: Instruction, has_addend: bool) -> Run:
    _, half, kind = instruction.parts
    dtype = _number(kind)
    _check(half == "lo" or (half in ("hi", "wide") and dtype.itemsize < 8))
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if half != "lo" else dtype
    out = wide if half == "wide" else dtype
    target, first, second, *addend = instruction.operands
    _check(len(addend) == has_addend)

    def run(machine, mask) -> None:
        product = machine.read(first, dtype).astype(wide) * machine.read(second, dtype).astype(wide)
        if half == "hi":
            product = product >> wide.type(8 * dtype.itemsize)
        product = np.asarray(product).astype(out)
        machine.write(target, product + machine.read(addend[0], out) if has_addend else product, mask)

    return run


def _low_product_and_carry(instruction: Instruction) -> Run:
    _check(instruction.parts == ("mad", "lo", "cc", "u32"))
    target, *sources = instruction.operands

    def run(machine, mask) -> None:
        first, second, addend = (machine.read(each, _unsigned(32)).astype(np.uint64) for each in sources)
        total = (first * second & np.uint64(0xFFFFFFFF)) + addend
        carry = np.broadcast_to(total >> np.uint64(32) != 0, (machine.threads,))
        machine.carry = carry if mask is None else np.where(mask, carry, machine.carry)
        machine.write(target, np.asarray(total).astype(np.uint32), mask)

    return run


@_meaning("madc")
def _high_product_and_carry(instruction: Instruction) -> Run:
    """Adds the carry that ``mad.lo.cc`` left."""
    _check(instruction.parts == ("madc", "hi", "u32"))
    target, *sources = instruction.operands

    def run(machine, mask) -> None:
        first, second, addend = (machine.read(each, _unsigned(32)).astype(np.uint64) for each in sources)
        total = (first * second >> np.uint64(32)) + addend + machine.carry
        machine.write(target, total.astype(np.uint32), mask)

    return run


@_meaning("fma")
def _fused(instruction: Instruction) -> Run:
    kind = instruction.parts[-1]
    if kind == "f64":
        _check(instruction.parts == ("fma", "rn", "f64"))
        return _elementwise(fused_multiply_add_f64, _type(kind), instruction.operands, 3)
    _only(instruction, "rn", "rm", "ftz")
    _check(kind == "f32" and instruction.parts[1] in ("rn", "rm"))
    compute = fused_multiply_add if instruction.parts[1] == "rn" else _fused_multiply_add_down
    return _elementwise(_flushing(compute, instruction), _type(kind), instruction.operands, 3)


def fused_multiply_add(x, y, z):
    """x y + z of fp32 with one rounding, as bits demand that are compared with others."""
    return _sum_rounded_to_odd(x, y, z).astype(np.float32)


def _fused_multiply_add_down(x, y, z):
    """The same, to the next number of fp32 that is not above."""
    exact = _sum_rounded_to_odd(x, y, z)
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


@np.vectorize(otypes=[np.float64])
def fused_multiply_add_f64(x, y, z):
    """x y + z of fp64 with one rounding, by fractions: kernels have few of them."""
    plain = x * y + z
    if not np.isfinite(plain):
        return plain
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    return float(exact) if exact else plain  # which has the sign of a zero


def _sum_rounded_to_odd(x, y, z):
    """x y + z of fp32 in fp64.

    The product is exact there. Their sum is rounded to odd, which a second rounding, to fp32, does not falsify.
    """
    product, addend = np.float64(x) * np.float64(y), np.float64(z)
    total = np.asarray(product + addend)
    of_addend = total - product
    error = (product - (total - of_addend)) + (addend - of_addend)
    bits = total.view(np.int64)
    even = bits & 1 == 0
    # One step towards zero where the sum was rounded away from it, which makes the last bit odd as well.
    step = np.where((error < 0) == (total > 0), -1, 1)
    inexact = np.isfinite(error) & (error != 0) & np.isfinite(total) & even
    return np.where(inexact, bits + step, bits).view(np.float64)


@_meaning("div")
def _quotient(instruction: Instruction) -> Run:
    kind = instruction.parts[-1]
    if kind == "f32":
        _only(instruction, "rn", "full", "approx")
        return _elementwise(lambda x, y: np.float64(x) / np.float64(y), _type(kind), instruction.operands, 2)
    if kind == "f64":
        _check(instruction.parts == ("div", "rn", "f64"))
        return _elementwise(operator.truediv, _type(kind), instruction.operands, 2)
    _only(instruction)
    return _elementwise(_integer_quotient, _number(kind), instruction.operands, 2)


@_meaning("rem")
def _remainder(instruction: Instruction) -> Run:
    _only(instruction)
    dtype = _number(instruction.parts[-1])
    return _elementwise(lambda x, y: x - _integer_quotient(x, y) * y, dtype, instruction.operands, 2)


def _integer_quotient(x, y):
    """Towards zero; by zero all bits are set, as on a GPU."""
    x, y = np.broadcast_arrays(x, y)
    one = np.where(y == 0, y.dtype.type(1), y)
    floor = x // one
    towards_zero = floor + ((floor < 0) & (floor * one != x)).astype(x.dtype)
    return np.where(y == 0, ~y, towards_zero)


_APPROXIMATE = {
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@_meaning(*_APPROXIMATE)
def _functions(instruction: Instruction) -> Run:
    """In fp64, then rounded: exact for ``.rn``, better than ``.approx``."""
    _only(instruction, "rn", "approx", "ftz")
    _check(instruction.parts[-1] == "f32" and len(instruction.parts) > 2)
    compute, flushes = _APPROXIMATE[instruction.parts[0]], "ftz" in instruction.parts

    def rounded(x):
        out = np.asarray(compute(np.float64(_flushed(x) if flushes else x))).astype(np.float32)
        return _flushed(out) if flushes else out

    return _elementwise(rounded, _type("f32"), instruction.operands, 1)


def _flushing(compute: Callable, instruction: Instruction) -> Callable:
    """``compute``, without subnormal numbers if the instruction says so."""
    if "ftz" not in instruction.parts:
        return compute
    return lambda *values: _flushed(np.asarray(compute(*map(_flushed, values)), np.float32))


def _flushed(x):
    """Without subnormal numbers."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


# -- bits --------------------------------------------------------------------------------------------------------------


@_meaning("shl", "shr")
def _shifts(instruction: Instruction) -> Run:
    """By the width or more: zero, or the sign."""
    name, kind = instruction.parts
    dtype = _type(kind)
    width = 8 * dtype.itemsize
    target, source, amount = instruction.operands
    shift = operator.lshift if name == "shl" else operator.rshift

    def run(machine, mask) -> None:
        value, by = machine.read(source, dtype), machine.read(amount, _unsigned(32))
        shifted = shift(value, np.minimum(by, width - 1).astype(dtype))
        gone = -(value < 0).astype(dtype) if dtype.kind == "i" and name == "shr" else dtype.type(0)
        machine.write(target, np.where(by >= width, gone, shifted).astype(dtype), mask)

    return run


@_meaning("shf")
def _funnel_shift(instruction: Instruction) -> Run:
    """The upper half of two words that are shifted to the left as one."""
    _check(instruction.parts == ("shf", "l", "wrap", "b32"))
    target, *sources = instruction.operands

    def run(machine, mask) -> None:
        low, high, amount = (machine.read(each, _unsigned(32)).astype(np.uint64) for each in sources)
        both = (high << np.uint64(32) | low) << (amount & np.uint64(31))
        machine.write(target, np.asarray(both >> np.uint64(32)).astype(np.uint32), mask)

    return run


@_meaning("bfe")
def _bit_field(instruction: Instruction) -> Run:
    """``c`` bits from bit ``b`` on, of a field that ends at 32 at most; of a signed one the last bit is its sign."""
    _only(instruction)
    kind = instruction.parts[-1]
    _check(kind in ("u32", "s32"))
    target, *sources = instruction.operands

    def run(machine, mask) -> None:
        value, first, length = (machine.read(each, _unsigned(32)).astype(np.int64) for each in sources)
        first, length = first & 0xFF, length & 0xFF
        field = np.where(first < 32, value >> np.minimum(first, 31), 0) & ((1 << np.minimum(length, 32)) - 1)
        if kind == "s32":
            last = np.minimum(first + length - 1, 31)
            ones = (value >> last & 1).astype(bool) & (length > 0)
            kept = np.clip(last - first + 1, 0, 32)
            field = np.where(ones, field | (-1 << kept), field)
        machine.write(target, np.asarray(field & 0xFFFFFFFF).astype(np.uint32), mask)

    return run


@_meaning("prmt")
def _permuted_bytes(instruction: Instruction) -> Run:
    """Each of four bytes is one of eight, or its sign."""
    _check(instruction.parts == ("prmt", "b32"))
    target, *sources = instruction.operands

    def run(machine, mask) -> None:
        low, high, selectors = (machine.read(each, _unsigned(32)).astype(np.uint64) for each in sources)
        both, out = low | high << np.uint64(32), np.uint64(0)
        for place in range(4):
            selector = selectors >> np.uint64(4 * place)
            byte = both >> (np.uint64(8) * (selector & np.uint64(7))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            out = out | np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * place)
        machine.write(target, np.asarray(out).astype(np.uint32), mask)

    return run


# -- moves and conversions ---------------------------------------------------------------------------------------------


@_meaning("mov")
def _move(instruction: Instruction) -> Run:
    _, kind = instruction.parts
    target, source = instruction.operands
    if isinstance(target, Vector):
        return _taken_apart(_type(kind), target, source)
    if isinstance(source, Vector):
        return _put_together(_type(kind), target, source)
    dtype = _type(kind)
    return lambda machine, mask: machine.write(target, machine.read(source, dtype), mask)


def _part_type(dtype: np.dtype, vector: Vector) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize // len(vector.parts)}")


def _taken_apart(dtype: np.dtype, target: Vector, source) -> Run:
    part = _part_type(dtype, target)

    def run(machine, mask) -> None:
        value = machine.read(source, dtype)
        for place, register in enumerate(target.parts):
            if register is not None:
                machine.write(register, (value >> dtype.type(8 * part.itemsize * place)).astype(part), mask)

    return run


def _put_together(dtype: np.dtype, target, source: Vector) -> Run:
    part = _part_type(dtype, source)

    def run(machine, mask) -> None:
        value = dtype.type(0)
        for place, register in enumerate(source.parts):
            value = value | machine.read(register, part).astype(dtype) << dtype.type(8 * part.itemsize * place)
        machine.write(target, value, mask)

    return run


@_meaning("cvt")
def _conversion(instruction: Instruction) -> Run:
    *modifiers, to, of = instruction.parts[1:]
    if to in ("bf16x2", "f16x2"):
        return _packed_halves(instruction, to.removesuffix("x2"), of, modifiers)
    target, source = instruction.operands
    narrow = {"bf16": bf16_bits, "f16": f16_bits}.get(to)
    if narrow:
        _check(modifiers == ["rn"] and of == "f32")
        return lambda machine, mask: machine.write(target, narrow(machine.read(source, _type(of))), mask)
    if of in ("bf16", "f16"):
        _check(not modifiers and to == "f32")
        widen = from_bf16_bits if of == "bf16" else from_f16_bits
        return lambda machine, mask: machine.write(target, widen(machine.read(source, _unsigned(16))), mask)
    flushes = of == "f32" and "ftz" in modifiers
    modifiers = [each for each in modifiers if each != "ftz" or not flushes]
    convert = _number_conversion(_number_or_byte(of), _number_or_byte(to), modifiers)
    convert, dtype = _flushing_first(convert) if flushes else convert, _type(of)
    return lambda machine, mask: machine.write(target, convert(machine.read(source, dtype)), mask)


def _number_or_byte(kind: str) -> np.dtype:
    return _type(kind) if kind in ("u8", "s8") else _number(kind)


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _number_conversion(of: np.dtype, to: np.dtype, modifiers: list[str]) -> Callable:
    if of.kind == "f" and to.kind != "f":
        [mode] = modifiers
        return lambda value: _saturated(_TO_INTEGER[mode](np.float64(value)), to)
    if of.kind == "f" and to == of:
        [mode] = modifiers
        return _from_0_to_1 if mode == "sat" else _TO_INTEGER[mode]
    rounds = to.kind == "f" and (of.kind != "f" or of.itemsize > to.itemsize)
    _check(modifiers == ["rn"] * rounds)
    return lambda value: np.asarray(value).astype(to)


def _flushing_first(convert: Callable) -> Callable:
    return lambda value: convert(_flushed(value))


def _from_0_to_1(value):
    """0 for NaN."""
    return np.fmin(np.fmax(value, value.dtype.type(0)), value.dtype.type(1)) + value.dtype.type(0)


def _saturated(value, to: np.dtype):
    """The nearest integer that there is, and 0 for NaN."""
    info = np.iinfo(to)
    top = float(info.max)  # of 64 bits the next power of two, which no integer of them is
    inside = np.clip(np.nan_to_num(value, nan=0.0), float(info.min), np.nextafter(top, 0) if to.itemsize == 8 else top)
    return np.where(value >= top, info.max, inside.astype(to)).astype(to)


def _packed_halves(instruction: Instruction, to: str, of: str, modifiers: list[str]) -> Run:
    """The first operand becomes the upper half."""
    _check(modifiers == ["rn"] and of == "f32")
    narrow = bf16_bits if to == "bf16" else f16_bits
    target, high, low = instruction.operands

    def run(machine, mask) -> None:
        upper, lower = (narrow(machine.read(each, _type("f32"))).astype(np.uint32) for each in (high, low))
        machine.write(target, upper << np.uint32(16) | lower, mask)

    return run


def bf16_bits(value) -> np.ndarray:
    """To nearest, ties to even; NaN is 0x7FFF."""
    value = np.atleast_1d(np.asarray(value, np.float32))
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def from_bf16_bits(bits) -> np.ndarray:
    return (np.atleast_1d(np.asarray(bits)).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_bits(value) -> np.ndarray:
    """To nearest, ties to even, infinity beyond; NaN is 0x7FFF."""
    value = np.atleast_1d(np.asarray(value, np.float32))
    return np.where(np.isnan(value), 0x7FFF, value.astype(np.float16).view(np.uint16)).astype(np.uint16)


def from_f16_bits(bits) -> np.ndarray:
    return np.atleast_1d(np.asarray(bits)).view(np.float16).astype(np.float32)


@_meaning("cvta")
def _address_conversion(instruction: Instruction) -> Run:
    """Addresses of global memory are the same in every space."""
    _check("shared" not in instruction.parts and "local" not in instruction.parts)
    target, source = instruction.operands
    return lambda machine, mask: machine.write(target, machine.read(source, _unsigned(64)), mask)


# -- predicates --------------------------------------------------------------------------------------------------------

_RELATIONS = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")


@_meaning("setp")
def _comparison(instruction: Instruction) -> Run:
    _, relation, *combined, kind = instruction.parts
    _check(not combined)
    dtype = _type(kind)
    compare = _float_relation(relation) if dtype.kind == "f" else _RELATIONS[relation]
    target, first, second = instruction.operands

    def run(machine, mask) -> None:
        machine.write(target, compare(machine.read(first, dtype), machine.read(second, dtype)), mask)

    return run


def _float_relation(relation: str) -> Callable:
    """With a NaN the ordered relations are false and the unordered ones, which end with u, true."""
    if relation in ("nan", "num"):
        wanted = relation == "nan"
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == wanted
    unordered = relation in _UNORDERED
    compare = _RELATIONS[relation[:2]]

    def run(x, y):
        nan = np.isnan(x) | np.isnan(y)
        return np.where(nan, unordered, compare(x, y))

    return run


@_meaning("selp")
def _selection(instruction: Instruction) -> Run:
    _, kind = instruction.parts
    dtype = _type(kind)
    target, chosen, other, predicate = instruction.operands

    def run(machine, mask) -> None:
        values = machine.read(chosen, dtype), machine.read(other, dtype)
        machine.write(target, np.where(machine.read(predicate, PREDICATE), *values).astype(dtype), mask)

    return run


# -- memory ------------------------------------------------------------------------------------------------------------

# Of the cache, and of an order that barriers give already.
_HINTS = (
    "relaxed", "weak", "nc", "L1", "L2", "evict_first", "evict_last", "evict_normal", "no_allocate", "cache_hint",
)  # fmt: skip


def _vector_count(modifiers: list[str]) -> int:
    [*vectors] = [modifier for modifier in modifiers if modifier in ("v2", "v4", "v8")]
    for modifier in modifiers:
        _check(modifier in (*_HINTS, *vectors))
    return int(vectors[0][1:]) if vectors else 1


def _parts(operand) -> tuple:
    return operand.parts if isinstance(operand, Vector) else (operand,)


@_meaning("createpolicy")
def _cache_policy(instruction: Instruction) -> Run:
    """A hint of the cache, as a number that nobody looks into."""
    _check(instruction.parts[1:3] == ("fractional", "L2") and instruction.parts[-1] == "b64")
    return lambda machine, mask: machine.write(instruction.operands[0], np.zeros((), np.uint64), mask)


@_meaning("ld")
def _load(instruction: Instruction) -> Run:
    _, space, *modifiers, kind = instruction.parts
    target, address = instruction.operands[:2]
    if space == "param":
        return _parameter(kind, target, address)
    _check(space in ("global", "shared", "local"))
    count, dtype, registers = _vector_count(modifiers), _type(kind), _parts(target)
    _check(len(registers) == count)

    def run(machine, mask) -> None:
        data = machine.load(space, address, count * dtype.itemsize, mask)
        words = np.ascontiguousarray(data).view(dtype)
        for place, register in enumerate(registers):
            machine.scatter(register, np.ascontiguousarray(words[:, place]), mask)

    return run


def _parameter(kind: str, target, address) -> Run:
    dtype = _type(kind)
    _check(isinstance(address.base, Symbol) and address.offset == 0)

    def run(machine, mask) -> None:
        bits = machine.arguments[address.base.name] & ((1 << 8 * dtype.itemsize) - 1)
        machine.write(target, np.array(bits, _unsigned(8 * dtype.itemsize)).view(dtype), mask)

    return run


@_meaning("st")
def _store(instruction: Instruction) -> Run:
    _, space, *modifiers, kind = instruction.parts
    address, source = instruction.operands[:2]
    if space == "param":
        return lambda machine, mask: None  # of a call, which is one to __assertfail
    _check(space in ("global", "shared", "local"))
    count, dtype, registers = _vector_count(modifiers), _unsigned(int(kind[1:])), _parts(source)
    _check(len(registers) == count)

    def run(machine, mask) -> None:
        words = np.stack([machine.gather(register, dtype, mask) for register in registers], axis=1)
        machine.store(space, address, words.view(np.uint8).reshape(len(words), -1), mask)

    return run


@_meaning("ldmatrix", "stmatrix")
def _matrices(instruction: Instruction) -> Run:
    """8 x 8 matrices of 16 bits: lanes 8 i to 8 i + 7 have the addresses of the rows of the i-th; see ``_row_of``."""
    name, *modifiers = instruction.parts
    for modifier in modifiers:
        _check(modifier in ("sync", "aligned", "m8n8", "x1", "x2", "x4", "shared", "b16", "trans"))
    [count] = [int(modifier[1:]) for modifier in modifiers if modifier in ("x1", "x2", "x4")]
    loads, transposed = name == "ldmatrix", "trans" in modifiers
    register_list, address = instruction.operands if loads else instruction.operands[::-1]
    registers = _parts(register_list)
    _check(len(registers) == count)

    def run(machine, mask) -> None:
        machine.whole_warps(mask, instruction.parts[0])
        rows = machine.addresses(address)
        for matrix, register in enumerate(registers):
            halves = [_half_addresses(rows, matrix, half, transposed) for half in range(2)]
            if loads:
                parts = [machine.load_at("shared", place, 2, mask) for place in halves]
                words = np.ascontiguousarray(np.concatenate(parts, axis=1)).view(np.uint32)[:, 0]
                machine.scatter(register, words, mask)
            else:
                words = machine.gather(register, _unsigned(32), mask).view(np.uint8).reshape(-1, 4)
                for half, place in enumerate(halves):
                    machine.store_at("shared", place, np.ascontiguousarray(words[:, 2 * half : 2 * half + 2]), mask)

    return run


def _half_addresses(rows: np.ndarray, matrix: int, half: int, transposed: bool) -> np.ndarray:
    """Where a thread's lower or upper 16 bits lie: in row lane / 4, columns 2 (lane mod 4) + half; or transposed."""
    lane = np.arange(WARP)
    row, column = lane // 4, 2 * (lane % 4) + half
    if transposed:
        row, column = column, row
    first = rows.reshape(-1, WARP)[:, 8 * matrix + row]
    return (first + (2 * column).astype(np.uint64)).ravel()


# -- threads together --------------------------------------------------------------------------------------------------


@_meaning("bar", "barrier")
def _barrier(instruction: Instruction) -> Run:
    """Of a block; that of a warp has nothing to do where its lanes move together."""
    if instruction.parts == ("bar", "warp", "sync"):
        return lambda machine, mask: machine.whole_warps(mask, "bar.warp.sync")
    _check(instruction.parts in (("bar", "sync"), ("barrier", "sync"), ("barrier", "sync", "aligned")))
    _check(instruction.operands == (Immediate(0),))
    return lambda machine, mask: machine.barrier(mask)


@_meaning("shfl")
def _shuffle(instruction: Instruction) -> Run:
    """A lane takes the value of another, or keeps its own where that is beyond the clamp of its segment."""
    _, _, mode, kind = instruction.parts
    _check(kind == "b32" and mode in ("bfly", "idx", "up", "down"))
    target, source, distance, clamp, _members = instruction.operands
    _check(isinstance(target, Register))

    def run(machine, mask) -> None:
        machine.whole_warps(mask, "shfl")
        value = np.broadcast_to(machine.read(source, _unsigned(32)), machine.threads)
        by, limits = (machine.read(each, _unsigned(32)).astype(np.int64) for each in (distance, clamp))
        lane = np.arange(machine.threads) % WARP
        of = _source_lane(mode, lane, by & 31, limits)
        machine.write(target, value[np.arange(machine.threads) - lane + of], mask)

    return run


def _source_lane(mode: str, lane, by, limits):
    segment = limits >> 8 & 31
    last = (lane & segment) | (limits & 31 & ~segment)
    if mode == "up":
        return np.where(lane - by >= last, lane - by, lane)
    of = {"bfly": lane ^ by, "down": lane + by, "idx": (lane & segment) | (by & ~segment)}[mode]
    return np.where(of <= last, of, lane)


@_meaning("ret", "exit")
def _end(instruction: Instruction) -> Run:
    return lambda machine, mask: machine.end(mask)


@_meaning("trap", "call")
def _trap(instruction: Instruction) -> Run:
    _check(instruction.parts[0] == "trap" or instruction.operands[0] == Symbol("__assertfail"))

    def run(machine, mask):
        raise Fault("the kernel asserts what is not so")

    return run


@_meaning("bra")
def _branch(instruction: Instruction) -> Run:
    [label] = instruction.operands
    _check(isinstance(label, Symbol) and instruction.parts[1:] in ((), ("uni",)))
    return lambda machine, mask: machine.jump(label.name, mask)
