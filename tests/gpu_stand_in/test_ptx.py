"""Each instruction of our kernels against what NumPy, or arithmetic without rounding, says of it; and each check."""

from fractions import Fraction

import numpy as np
import pytest

from tests.gpu_stand_in.ptx.faults import Fault, UnknownInstruction
from tests.gpu_stand_in.ptx_kernels import aligned, evaluate, launch

TYPES = {
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f32": np.float32,
}  # fmt: skip
NAN, INFINITY = np.float32(np.nan), np.float32(np.inf)


def integers(kind: str, seed: int, count: int = 200) -> np.ndarray:
    """The ends of the range, what is around zero, and random ones of all sizes."""
    dtype = TYPES[kind]
    info, random = np.iinfo(dtype), np.random.default_rng(seed)
    edges = [info.min, info.min + 1, 0, 1, 2, 3, info.max - 1, info.max, *([-1, -2] if info.min else [])]
    values = random.integers(info.min, info.max, count, dtype, endpoint=True)
    values = values >> random.integers(0, info.bits, count).astype(dtype)
    return np.concatenate([random.permutation(np.array(edges * 4, dtype)), values]).astype(dtype)


def floats(seed: int, count: int = 400) -> np.ndarray:
    """Zeros, subnormal numbers, infinities, NaN, and random bits."""
    random = np.random.default_rng(seed)
    edges = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.17e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan]
    values = random.integers(0, 2**32, count, np.uint32).view(np.float32)
    near = random.standard_normal(count).astype(np.float32)
    return np.concatenate([random.permutation(np.array(edges * 4, np.float32)), values, near])


def shortened(arrays: list[np.ndarray]) -> list[np.ndarray]:
    count = min(map(len, arrays))
    return [array[:count] for array in arrays]


def wrapped(value: int, dtype) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


# -- integers ----------------------------------------------------------------------------------------------------------


def truncated(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bit_field(value: int, first: int, length: int, signed: bool) -> int:
    first, length = first & 255, length & 255
    bits = [value >> min(place, 31) & 1 if place < 32 or signed else 0 for place in range(first, first + length)]
    number = sum(bit << place for place, bit in enumerate(bits))
    return number - (1 << len(bits)) if signed and bits and bits[-1] else number


INTEGERS = {
    "add.s32": ("s32 s32", "s32", lambda a, b: a + b),
    "add.s64": ("s64 s64", "s64", lambda a, b: a + b),
    "add.s16": ("s16 s16", "s16", lambda a, b: a + b),
    "add.u64": ("u64 u64", "u64", lambda a, b: a + b),
    "add.s16x2": ("b32 b32", "b32", lambda a, b: (a & 0xFFFF) + b & 0xFFFF | (a >> 16) + (b >> 16) << 16),
    "sub.s64": ("s64 s64", "s64", lambda a, b: a - b),
    "sub.s32": ("s32 s32", "s32", lambda a, b: a - b),
    "sub.s16": ("s16 s16", "s16", lambda a, b: a - b),
    "neg.s32": ("s32", "s32", lambda a: -a),
    "min.s32": ("s32 s32", "s32", min),
    "max.s32": ("s32 s32", "s32", max),
    "min.s64": ("s64 s64", "s64", min),
    "max.s64": ("s64 s64", "s64", max),
    "mul.lo.s32": ("s32 s32", "s32", lambda a, b: a * b),
    "mul.lo.s64": ("s64 s64", "s64", lambda a, b: a * b),
    "mul.hi.u32": ("u32 u32", "u32", lambda a, b: a * b >> 32),
    "mul.hi.s32": ("s32 s32", "s32", lambda a, b: a * b >> 32),
    "mul.hi.s16": ("s16 s16", "s16", lambda a, b: a * b >> 16),
    "mul.wide.s32": ("s32 s32", "s64", lambda a, b: a * b),
    "mul.wide.u32": ("u32 u32", "u64", lambda a, b: a * b),
    "mad.lo.s32": ("s32 s32 s32", "s32", lambda a, b, c: a * b + c),
    "mad.lo.s64": ("s64 s64 s64", "s64", lambda a, b, c: a * b + c),
    "mad.wide.s32": ("s32 s32 s64", "s64", lambda a, b, c: a * b + c),
    "mad.wide.u32": ("u32 u32 u64", "u64", lambda a, b, c: a * b + c),
    "mad.wide.s16": ("s16 s16 s32", "s32", lambda a, b, c: a * b + c),
    "div.s32": ("s32 s32", "s32", truncated),
    "div.u32": ("u32 u32", "u32", truncated),
    "rem.s32": ("s32 s32", "s32", lambda a, b: a - b * truncated(a, b)),
    "and.b16": ("b16 b16", "b16", lambda a, b: a & b),
    "and.b32": ("b32 b32", "b32", lambda a, b: a & b),
    "and.b64": ("b64 b64", "b64", lambda a, b: a & b),
    "or.b16": ("b16 b16", "b16", lambda a, b: a | b),
    "or.b32": ("b32 b32", "b32", lambda a, b: a | b),
    "or.b64": ("b64 b64", "b64", lambda a, b: a | b),
    "xor.b32": ("b32 b32", "b32", lambda a, b: a ^ b),
    "xor.b64": ("b64 b64", "b64", lambda a, b: a ^ b),
    "not.b32": ("b32", "b32", lambda a: ~a),
    "shl.b16": ("b16 u32", "b16", lambda a, n: a << min(n, 99)),
    "shl.b32": ("b32 u32", "b32", lambda a, n: a << min(n, 99)),
    "shl.b64": ("b64 u32", "b64", lambda a, n: a << min(n, 99)),
    "shr.u16": ("u16 u32", "u16", lambda a, n: a >> min(n, 99)),
    "shr.s16": ("s16 u32", "s16", lambda a, n: a >> min(n, 99)),
    "shr.u32": ("u32 u32", "u32", lambda a, n: a >> min(n, 99)),
    "shr.s32": ("s32 u32", "s32", lambda a, n: a >> min(n, 99)),
    "shr.s64": ("s64 u32", "s64", lambda a, n: a >> min(n, 99)),
    "shf.l.wrap.b32": ("b32 b32 u32", "b32", lambda low, high, n: (high << 32 | low) << (n & 31) >> 32),
    "shr.u64": ("u64 u32", "u64", lambda a, n: a >> min(n, 99)),
    "bfe.u32": ("u32 u32 u32", "u32", lambda a, p, n: bit_field(a, p, n, False)),
    "bfe.s32": ("b32 u32 u32", "s32", lambda a, p, n: bit_field(a, p, n, True)),
    "cvt.u64.u32": ("u32", "u64", lambda a: a),
    "cvt.s64.s32": ("s32", "s64", lambda a: a),
    "cvt.u32.u64": ("u64", "u32", lambda a: a),
    "cvt.u16.u64": ("u64", "u16", lambda a: a),
    "cvt.u64.u16": ("u16", "u64", lambda a: a),
    "cvt.s16.s8": ("b16", "s16", lambda a: wrapped(a, np.int8)),
    "cvt.u16.u32": ("u32", "u16", lambda a: a),
    "cvt.u32.u16": ("u16", "u32", lambda a: a),
    "cvt.s32.s16": ("s16", "s32", lambda a: a),
    "mov.b32": ("b32", "b32", lambda a: a),
    "mov.u32": ("u32", "u32", lambda a: a),
    "mov.b64": ("b64", "b64", lambda a: a),
    "mov.u64": ("u64", "u64", lambda a: a),
    "mov.b16": ("b16", "b16", lambda a: a),
    "mov.u16": ("u16", "u16", lambda a: a),
}  # fmt: skip


def amounts(name: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Amounts of shifts, and places of fields, mostly within the width."""
    random = np.random.default_rng(9)
    if name.startswith(("sh", "bfe")):
        for place in range(1, len(inputs)):
            within = random.integers(0, 70, len(inputs[place])).astype(np.uint32)
            inputs[place] = np.where(np.arange(len(within)) % 9 == 0, inputs[place], within)
    return inputs


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    kinds, out, function = INTEGERS[name]
    inputs = amounts(name, shortened([integers(kind, seed) for seed, kind in enumerate(kinds.split())]))
    expected = [wrapped(function(*map(int, values)), TYPES[out]) for values in zip(*inputs, strict=True)]
    assert evaluate(name, inputs, TYPES[out]).tolist() == expected


def test_products_of_64_bits_by_a_carry():
    a, b, c = (integers("u32", seed) for seed in range(3))
    low = "mad.lo.cc.u32 %r60, {0}, {1}, {2};\n "
    exact = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    result = evaluate(low + "madc.hi.u32 {out}, {0}, {1}, 0;", [a, b, c], np.uint32)
    assert result.tolist() == [each >> 32 for each in exact]
    result = evaluate(low + "mov.b32 {out}, %r60;", [a, b, c], np.uint32)
    assert result.tolist() == [each & 0xFFFFFFFF for each in exact]


@pytest.mark.parametrize("selector", [0x7770, 0x7771, 0x7772, 0x7773, 0x3210, 0x5410, 0x7632, 0x0123, 0xBA98, 0xFEDC])
def test_bytes_are_permuted(selector):
    low, high = integers("b32", 1), integers("b32", 2)
    for a, b, result in zip(low, high, evaluate("prmt.b32", [low, high], np.uint32, f"{selector:#x}U"), strict=True):
        both, expected = int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little"), []
        for place in range(4):
            chosen = selector >> 4 * place & 15
            byte = both[chosen & 7]
            expected.append((255 if byte & 128 else 0) if chosen & 8 else byte)
        assert int(result).to_bytes(4, "little") == bytes(expected)


def test_registers_are_put_together_and_taken_apart():
    halves = [integers("b16", seed) for seed in (1, 2)]
    words = evaluate("mov.b32 {out}, {{{0}, {1}}};", halves, np.uint32)
    assert (words == halves[1].astype(np.uint32) << 16 | halves[0]).all()
    assert (evaluate("mov.b32 {{{out}, %h60}}, {0};", [words], np.uint16) == halves[0]).all()
    assert (evaluate("mov.b32 {{_, {out}}}, {0};", [words], np.uint16) == halves[1]).all()
    wide = integers("b64", 3)
    assert (evaluate("mov.b64 {{_, {out}}}, {0};", [wide], np.uint32) == wide >> np.uint64(32)).all()
    assert (evaluate("mov.b64 {{{out}, _}}, {0};", [wide], np.uint32) == wide & np.uint64(2**32 - 1)).all()


def test_numbers_in_the_text():
    x = np.zeros(32, np.uint32)
    for text, expected in {
        "7": 7,
        "-1": 2**32 - 1,
        "0x7FFFFFFF": 2**31 - 1,
        "0xFFU": 255,
        "0f3F800000": 0x3F800000,
    }.items():
        assert (evaluate(f"mov.b32 {{out}}, {text};", [x], np.uint32) == expected).all()
    assert (evaluate("mov.b64 {out}, -2;", [x], np.int64) == -2).all()
    assert (evaluate("add.f32 {out}, {0}, 0fBF800000;", [x], np.float32) == -1).all()


# -- floating point ----------------------------------------------------------------------------------------------------


def same(result: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, but for those of NaN."""
    nan = np.isnan(expected)
    assert (np.isnan(result) == nan).all()
    kind = f"u{result.dtype.itemsize}"
    np.testing.assert_array_equal(result[~nan].view(kind), expected[~nan].view(kind))


# In fp64 products are exact, and other results are so close that a second rounding, to fp32, changes nothing.
ROUNDED = {
    "add.f32": lambda a, b: a + b,
    "add.rn.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "sub.rn.f32": lambda a, b: a - b,
    "mul.f32": lambda a, b: a * b,
    "mul.rn.f32": lambda a, b: a * b,
    "div.rn.f32": lambda a, b: a / b,
    "sqrt.rn.f32": np.sqrt,
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rounded_arithmetic(name):
    inputs = [floats(seed) for seed in range(ROUNDED[name].__code__.co_argcount if name[:4] != "sqrt" else 1)]
    expected = ROUNDED[name](*(each.astype(np.float64) for each in inputs)).astype(np.float32)
    same(evaluate(name, inputs, np.float32), expected)


def nearest_f32(exact: Fraction) -> np.float32:
    """To nearest, ties to even, of a number in the range."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(candidates, key=lambda each: (abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1))


def test_fused_multiply_add_rounds_once():
    random = np.random.default_rng(0)
    x, y, z = (random.standard_normal(600).astype(np.float32) for _ in range(3))
    # Products half-way between two numbers, which a small addend decides: what is lost if fp64 rounds first.
    halfway = 1 + 2.0 ** -random.integers(8, 13, 200)
    x[:200] = y[:200] = halfway
    z[:200] = 2.0**-80 * random.choice([-1, 0, 1], 200)
    z[200:400] *= 2.0 ** random.integers(-40, 40, 200)
    expected = [
        nearest_f32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))
        for a, b, c in zip(x, y, z, strict=True)
    ]
    same(evaluate("fma.rn.f32", [x, y, z], np.float32), np.array(expected, np.float32))
    edges = [
        np.array(each, np.float32)
        for each in ([np.inf, 0, 3e38, np.nan, 0], [1, np.inf, 3e38, 1, -1], [-np.inf, 1, 0, 1, 0])
    ]
    same(evaluate("fma.rn.f32", edges, np.float32), np.array([np.nan, np.nan, np.inf, np.nan, 0], np.float32))


def test_fused_multiply_add_rounds_downwards():
    random = np.random.default_rng(0)
    x, y, z = (random.standard_normal(600).astype(np.float32) for _ in range(3))
    for a, b, c, result in zip(x, y, z, evaluate("fma.rm.ftz.f32", [x, y, z], np.float32), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        assert Fraction(float(result)) <= exact < Fraction(float(np.nextafter(result, INFINITY)))


def test_subnormal_numbers_are_flushed():
    tiny, small, one = (np.array([sign * size for sign in (1, -1)], np.float32) for size in (1e-40, 2e-30, 1))
    for name, inputs in {
        "abs.ftz.f32": [tiny],
        "mul.rn.ftz.f32": [tiny, 1e20 * one],
        "fma.rn.ftz.f32": [1e20 * one, tiny, 0 * one],
    }.items():
        result = evaluate(name, inputs, np.float32)
        assert (result == 0).all() and evaluate(name.replace(".ftz", ""), inputs, np.float32).all()
    assert (evaluate("mul.rn.ftz.f32", [small, 1e-10 * one], np.float32) == 0).all()  # what comes out
    same(evaluate("mul.rn.ftz.f32", [small, one], np.float32), small * one)
    same(evaluate("fma.rn.ftz.f32", [small, one, one], np.float32), small * one + one)
    same(evaluate("abs.ftz.f32", [small], np.float32), np.abs(small))


DOUBLES = {
    "add.f64": lambda a, b: a + b, "sub.f64": lambda a, b: a - b, "mul.f64": lambda a, b: a * b,
    "div.rn.f64": lambda a, b: a / b, "neg.f64": lambda a: -a, "abs.f64": abs,
    "fma.rn.f64": lambda a, b, c: a * b + c,
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBLES)
def test_double_precision_rounds_once(name):
    random = np.random.default_rng(0)
    count = 1 if name in ("neg.f64", "abs.f64") else 3 if name == "fma.rn.f64" else 2
    inputs = [random.standard_normal(200) * 2.0 ** random.integers(-60, 60, 200) for _ in range(count)]
    if count == 3:
        inputs[2][:100] = -inputs[0][:100] * inputs[1][:100]  # what is left is the product's error
    expected = [float(DOUBLES[name](*map(Fraction, values))) for values in zip(*inputs, strict=True)]
    same(evaluate(name, inputs, np.float64), np.array(expected))
    edges = [np.array([0.0, -0.0, np.inf, np.nan]), np.array([-1.0, 1.0, -2.0, 1.0]), np.full(4, -0.0)][:count]
    with np.errstate(all="ignore"):
        same(evaluate(name, edges, np.float64), DOUBLES[name](*edges))


# Relative, as the PTX manual states it for a GPU (ex2: 2 units in the last place; rsqrt and rcp 2^-22.9; div.full 2
# units; lg2 2^-22 absolute near 1); sin, cos and tanh in absolute terms. Ours are within half a unit.
APPROXIMATE = {
    "ex2.approx.f32": np.exp2, "ex2.approx.ftz.f32": np.exp2, "lg2.approx.f32": np.log2,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "rsqrt.approx.ftz.f32": lambda x: 1 / np.sqrt(x),
    "rcp.approx.f32": lambda x: 1 / x, "sqrt.approx.f32": np.sqrt, "sqrt.approx.ftz.f32": np.sqrt,
    "sin.approx.f32": np.sin, "cos.approx.f32": np.cos,
    "tanh.approx.f32": np.tanh,
}  # fmt: skip


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_approximations(name):
    x = np.random.default_rng(0).uniform(-8, 8, 900).astype(np.float32)
    x = np.abs(x) if name.startswith(("lg2", "rsqrt", "sqrt")) else x
    result = evaluate(name, [x], np.float32).astype(np.float64)
    np.testing.assert_allclose(result, APPROXIMATE[name](x.astype(np.float64)), rtol=2**-23, atol=1e-9)


def test_approximations_at_the_edges():
    x = np.array([0.0, np.inf, -np.inf, np.nan, 1e-45, 128, -200], np.float32)
    same(evaluate("ex2.approx.f32", [x], np.float32), np.array([1, np.inf, 0, np.nan, 1, np.inf, 0], np.float32))
    x = np.array([0.0, -0.0, np.inf, np.nan, -1, 1e-45], np.float32)
    expected = [np.inf, -np.inf, 0, np.nan, np.nan]
    same(evaluate("rsqrt.approx.ftz.f32", [x], np.float32), np.array([*expected, np.inf], np.float32))
    same(evaluate("rsqrt.approx.f32", [x], np.float32)[:5], np.array(expected, np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_full_range_division():
    x, y = floats(1), floats(2)
    result = evaluate("div.full.f32", [x, y], np.float32)
    expected = (x.astype(np.float64) / y.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(result, expected, rtol=2**-22, atol=0)


def test_signs():
    x, y = floats(1), floats(2)
    assert (evaluate("neg.f32", [x], np.float32).view(np.uint32) == x.view(np.uint32) ^ np.uint32(2**31)).all()
    assert (evaluate("abs.f32", [x], np.float32).view(np.uint32) == x.view(np.uint32) & np.uint32(2**31 - 1)).all()
    expected = (y.view(np.uint32) & np.uint32(2**31 - 1)) | (x.view(np.uint32) & np.uint32(2**31))
    assert (evaluate("copysign.f32", [x, y], np.float32).view(np.uint32) == expected).all()


def test_extremes_and_their_rules_for_nan_and_zeros():
    x = np.array([1, 2, np.nan, 3, np.nan, 0.0, -0.0, np.inf], np.float32)
    y = np.array([2, 1, 3, np.nan, np.nan, -0.0, 0.0, -np.inf], np.float32)
    same(evaluate("max.f32", [x, y], np.float32), np.array([2, 2, 3, 3, np.nan, 0.0, 0.0, np.inf], np.float32))
    same(evaluate("min.f32", [x, y], np.float32), np.array([1, 1, 3, 3, np.nan, -0.0, -0.0, -np.inf], np.float32))
    expected = np.array([2, 2, np.nan, np.nan, np.nan, 0.0, 0.0, np.inf], np.float32)
    same(evaluate("max.NaN.f32", [x, y], np.float32), expected)
    expected[:2], expected[5:] = 1, [-0.0, -0.0, -np.inf]
    same(evaluate("min.NaN.f32", [x, y], np.float32), expected)


# -- conversions -------------------------------------------------------------------------------------------------------


def halves(values: np.ndarray, bits: np.ndarray, widen) -> np.ndarray:
    """Of all numbers of 16 bits, ``bits``, those nearest to ``values``, ties to even; by search."""
    numbers = widen(bits).astype(np.float64)
    order = np.argsort(numbers, kind="stable")
    numbers, bits = numbers[order], bits[order]
    above = np.clip(np.searchsorted(numbers, values.astype(np.float64)), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle, exact = (low + high) / 2, values.astype(np.float64)
    upper = (exact > middle) | ((exact == middle) & (bits[above] % 2 == 0))
    return np.where(upper, bits[above], bits[above - 1])


def widened_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def widened_f16(bits):
    return bits.view(np.float16).astype(np.float32)


# (conversion, of a pair, back, bits of the largest finite number, its value)
HALVES = {
    "bf16": ("cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32", "cvt.f32.bf16", widened_bf16, 0x7F7F),
    "f16": ("cvt.rn.f16.f32", "cvt.rn.f16x2.f32", "cvt.f32.f16", widened_f16, 0x7BFF),
}


@pytest.mark.parametrize("kind", HALVES)
def test_rounding_to_16_bits(kind):
    one, two, back, widen, largest = HALVES[kind]
    finite = np.concatenate([np.arange(largest + 1), np.arange(0x8001, 0x8000 + largest + 1)]).astype(np.uint16)
    numbers = widen(finite)
    random = np.random.default_rng(0)
    some = np.arange(0, largest, 97).astype(np.uint16)
    middles = widen(some) / 2 + widen(some + np.uint16(1)) / 2
    scale = 10.0 ** random.integers(-9, 5, 300)
    values = np.concatenate([random.choice(middles, 300), random.standard_normal(300) * scale]).astype(np.float32)
    values = values[np.abs(values) <= numbers.max()]
    expected = widen(halves(values, finite, widen))
    result = evaluate(one, [values], np.uint16)
    assert (widen(result) == expected).all()
    pair = evaluate(two, [values, values[::-1].copy()], np.uint32)
    assert (pair >> 16 == result).all() and (pair & 0xFFFF == result[::-1]).all()
    assert (evaluate(back, [result], np.float32) == expected).all()


def test_sums_of_16_bits():
    _, _, _, widen, largest = HALVES["bf16"]
    finite = np.concatenate([np.arange(largest + 1), np.arange(0x8001, 0x8000 + largest + 1)]).astype(np.uint16)
    near = finite[(np.abs(widen(finite)) < 64) & (np.abs(widen(finite)) > 1e-3)]
    x, y = np.random.default_rng(0).choice(near, (2, 900))
    exact = widen(x).astype(np.float64) + widen(y).astype(np.float64)
    expected = widen(halves(exact, finite, widen))
    assert (widen(evaluate("add.bf16", [x, y], np.uint16)) == expected).all()
    pairs = [each.astype(np.uint32) << 16 | each[::-1] for each in (x, y)]
    result = evaluate("add.bf16x2", pairs, np.uint32)
    assert (widen((result >> 16).astype(np.uint16)) == expected).all()
    assert (widen((result & 0xFFFF).astype(np.uint16)) == expected[::-1]).all()


@pytest.mark.parametrize("kind", HALVES)
def test_16_bits_at_the_edges(kind):
    one, _, back, widen, largest = HALVES[kind]
    infinity = largest + 1
    top = float(widen(np.array([largest], np.uint16))[0])
    step = top - float(widen(np.array([largest - 1], np.uint16))[0])
    values = np.array([np.nan, np.inf, -np.inf, -0.0, top + step / 2, top + step * 0.49, 1e-45], np.float32)
    expected = [0x7FFF, infinity, infinity | 0x8000, 0x8000, infinity, largest, 0]
    assert evaluate(one, [values], np.uint16).tolist() == expected
    same(
        evaluate(back, [np.array([0x7FFF, infinity, 0x8000], np.uint16)], np.float32),
        np.array([np.nan, np.inf, -0.0], np.float32),
    )


TO_FLOAT = {"cvt.rn.f32.u32": "u32", "cvt.rn.f32.s32": "s32", "cvt.rn.f32.u16": "u16", "cvt.rn.f32.u64": "u64"}


@pytest.mark.parametrize("name", TO_FLOAT)
def test_integers_become_floats(name):
    values = integers(TO_FLOAT[name], 5)
    values = np.concatenate([values, np.array([2**24 + 1, 2**24 + 3], values.dtype)]) if values.itemsize > 2 else values
    expected = np.array([nearest_f32(Fraction(int(value))) for value in values], np.float32)
    same(evaluate(name, [values], np.float32), expected)


def test_floats_become_integers():
    x = np.array([0.5, 1.5, -1.5, 2.7, -2.7, 3e9, -3e9, np.nan, np.inf], np.float32)
    top, bottom = 2**31 - 1, -(2**31)
    for mode, expected in {
        "rzi": [0, 1, -1, 2, -2],
        "rni": [0, 2, -2, 3, -3],
        "rmi": [0, 1, -2, 2, -3],
        "rpi": [1, 2, -1, 3, -2],
    }.items():
        assert evaluate(f"cvt.{mode}.s32.f32", [x], np.int32).tolist() == [*expected, top, bottom, 0, top]
    assert evaluate("cvt.rzi.u32.f32", [x], np.uint32).tolist() == [0, 1, 0, 2, 0, 3000000000, 0, 0, 2**32 - 1]
    same(evaluate("cvt.rmi.f32.f32", [x[:5]], np.float32), np.floor(x[:5]))
    assert evaluate("cvt.rzi.s32.f32", [x[:5]], np.int32).tolist() == [0, 1, -1, 2, -2]
    assert evaluate("cvt.rni.ftz.s32.f32", [x[:5]], np.int32).tolist() == [0, 2, -2, 3, -3]


def test_conversions_of_double_precision():
    x = np.random.default_rng(0).standard_normal(200) * 1e3
    expected = np.array([nearest_f32(Fraction(value)) for value in x], np.float32)
    same(evaluate("cvt.rn.f32.f64", [x], np.float32), expected)
    same(evaluate("cvt.f64.f32", [expected], np.float64), np.array([float(value) for value in expected]))
    x = np.array([0.5, 1.5, -2.5, 3.7, 2.0**60])
    same(evaluate("cvt.rni.f64.f64", [x], np.float64), np.array([0, 2, -2, 4, 2.0**60]))
    for name, kind in {"cvt.rn.f64.s64": "s64", "cvt.rn.f64.u64": "u64"}.items():
        values = integers(kind, 5)
        same(evaluate(name, [values], np.float64), np.array([float(int(value)) for value in values]))


def test_saturation_between_0_and_1():
    x = np.array([np.nan, -1, 0.25, 1.5, 1e-45, -0.0, np.inf, -np.inf], np.float32)
    same(evaluate("cvt.ftz.sat.f32.f32", [x], np.float32), np.array([0, 0, 0.25, 1, 0, 0, 1, 0], np.float32))


# -- predicates --------------------------------------------------------------------------------------------------------

SELECT = "{compare} %p1, {{0}}, {{1}};\n selp.b32 {{out}}, 1, 0, %p1;"
RELATIONS = {
    "setp.lt.s32": ("s32", np.less), "setp.gt.s32": ("s32", np.greater), "setp.le.s32": ("s32", np.less_equal),
    "setp.ge.s32": ("s32", np.greater_equal), "setp.lt.u32": ("u32", np.less), "setp.lt.s64": ("s64", np.less),
    "setp.lt.u64": ("u64", np.less), "setp.eq.b32": ("b32", np.equal), "setp.ne.b32": ("b32", np.not_equal),
    "setp.lt.s16": ("s16", np.less), "setp.ne.b16": ("b16", np.not_equal), "setp.eq.b64": ("b64", np.equal),
    "setp.eq.b16": ("b16", np.equal), "setp.ne.b64": ("b64", np.not_equal), "setp.gt.u32": ("u32", np.greater),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIONS)
def test_comparisons_of_integers(name):
    kind, relation = RELATIONS[name]
    x, y = integers(kind, 1), integers(kind, 2)
    y[::5] = x[::5]
    result = evaluate(SELECT.format(compare=name), [x, y], np.uint32)
    assert (result == relation(x, y)).all()


# (of a < b, of a == b, of a > b, with a NaN)
FLOAT_RELATIONS = {
    "setp.lt.f32": (1, 0, 0, 0), "setp.le.f32": (1, 1, 0, 0), "setp.gt.f32": (0, 0, 1, 0), "setp.ge.f32": (0, 1, 1, 0),
    "setp.eq.f32": (0, 1, 0, 0), "setp.ne.f32": (1, 0, 1, 0), "setp.ltu.f32": (1, 0, 0, 1),
    "setp.leu.f32": (1, 1, 0, 1), "setp.gtu.f32": (0, 0, 1, 1), "setp.geu.f32": (0, 1, 1, 1),
    "setp.equ.f32": (0, 1, 0, 1), "setp.neu.f32": (1, 0, 1, 1),
    "setp.num.f32": (1, 1, 1, 0), "setp.nan.f32": (0, 0, 0, 1),
    "setp.lt.f64": (1, 0, 0, 0), "setp.le.f64": (1, 1, 0, 0), "setp.gt.f64": (0, 0, 1, 0), "setp.nan.f64": (0, 0, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT_RELATIONS)
def test_comparisons_of_floats(name):
    less, equal, greater, nan = FLOAT_RELATIONS[name]
    dtype = np.float32 if name.endswith("f32") else np.float64
    x, y = np.array([1, 1, 2, np.nan, 1, -0.0], dtype), np.array([2, 1, 1, 1, np.nan, 0.0], dtype)
    result = evaluate(SELECT.format(compare=name), [x, y], np.uint32)
    assert result.tolist() == [less, equal, greater, nan, nan, equal]


PREDICATES = {"and.pred": np.logical_and, "or.pred": np.logical_or, "xor.pred": np.logical_xor}


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates_together(name):
    x, y = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    text = "setp.ne.b32 %p1, {0}, 0;\n setp.ne.b32 %p2, {1}, 0;\n "
    result = evaluate(text + f"{name} %p3, %p1, %p2;\n selp.b32 {{out}}, 1, 0, %p3;", [x, y], np.uint32)
    assert (result == PREDICATES[name](x, y)).all()


def test_predicates_alone():
    x = np.array([0, 1], np.uint32)
    text = "setp.ne.b32 %p1, {0}, 0;\n not.pred %p2, %p1;\n mov.pred %p3, -1;\n mov.pred %p4, 0;\n mov.pred %p5, %p2;\n"
    for predicate, expected in {"%p2": [1, 0], "%p3": [1, 1], "%p4": [0, 0], "%p5": [1, 0]}.items():
        assert evaluate(text + f"selp.b32 {{out}}, 1, 0, {predicate};", [x], np.uint32).tolist() == expected


def test_selections():
    x, y = floats(1), floats(2)
    text = "setp.lt.f32 %p1, {0}, {1};\n"
    assert (
        evaluate(text + "selp.f32 {out}, {0}, {1}, %p1;", [x, y], np.float32).view(np.uint32)
        == np.where(x < y, x.view(np.uint32), y.view(np.uint32))
    ).all()
    assert (evaluate(text + "selp.f32 {out}, 0f3F800000, 0f00000000, %p1;", [x, y], np.float32) == (x < y)).all()


@pytest.mark.parametrize("name", ["selp.b16", "selp.b64", "selp.f64"])
def test_selections_of_other_widths(name):
    dtype = {"b16": np.uint16, "b64": np.uint64, "f64": np.float64}[name[5:]]
    x, y = np.arange(40).astype(dtype), np.arange(100, 140).astype(dtype)
    result = evaluate(f"setp.lt.u32 %p1, %r98, 7;\n {name} {{out}}, {{0}}, {{1}}, %p1;", [x, y], dtype)
    assert (result == np.where(np.arange(40) < 7, x, y)).all()


def test_guards():
    x = np.arange(32, dtype=np.uint32)
    text = "setp.lt.u32 %p1, {0}, 5;\n mov.b32 {out}, 0;\n @%p1 mov.b32 {out}, 1;\n @!%p1 mov.b32 {out}, 2;"
    assert evaluate(text, [x], np.uint32).tolist() == [1] * 5 + [2] * 27


# -- threads -----------------------------------------------------------------------------------------------------------


def shuffled(instruction: str, threads: int = 64) -> list[int]:
    x = np.arange(threads, dtype=np.uint32)
    return evaluate(instruction, [x], np.uint32).tolist()


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
def test_butterflies(distance):
    result = shuffled(f"shfl.sync.bfly.b32 {{out}}, {{0}}, {distance}, 31, -1;")
    assert result == [lane ^ distance for lane in range(64)]


def test_other_shuffles():
    assert shuffled("shfl.sync.idx.b32 {out}, {0}, 3, 31, -1;") == [3] * 32 + [35] * 32
    assert shuffled("shfl.sync.down.b32 {out}, {0}, 1, 31, -1;") == [
        min(lane + 1, 31 + lane // 32 * 32) for lane in range(64)
    ]
    assert shuffled("shfl.sync.up.b32 {out}, {0}, 1, 0, -1;") == [max(lane - 1, lane // 32 * 32) for lane in range(64)]
    # Segments of 8 lanes: the mask of segments is the clamp's upper half.
    clamp = 24 << 8 | 31
    assert shuffled(f"shfl.sync.idx.b32 {{out}}, {{0}}, 2, {clamp}, -1;", 32) == [
        lane // 8 * 8 + 2 for lane in range(32)
    ]


def test_coordinates():
    out = aligned(np.zeros((2, 3, 4, 32, 4), np.uint32))
    launch(
        """
        mov.u32 %r1, %ctaid.x;  mov.u32 %r2, %ctaid.y;  mov.u32 %r3, %ctaid.z;
        mov.u32 %r5, %nctaid.x;  mov.u32 %r6, %nctaid.y;  mov.u32 %r7, %nctaid.z;
        mad.lo.s32 %r8, %r3, %r6, %r2;
        mad.lo.s32 %r8, %r8, %r5, %r1;
        mov.u32 %r9, %ntid.x;
        mad.lo.s32 %r8, %r8, %r9, %r98;
        mad.wide.u32 %d1, %r8, 16, %d90;
        st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r98};
        """,
        out, grid=(4, 3, 2),
    )  # fmt: skip
    z, y, x, thread = np.indices((2, 3, 4, 32))
    assert (out == np.stack([x, y, z, thread], axis=-1)).all()


LOOP = """
    mov.b32 %r1, 0;
    setp.eq.b32 %p1, %r98, 9;
    @%p1 bra $end;
$again:
    setp.eq.b32 %p2, %r1, %r98;
    @%p2 bra $out;
    add.s32 %r1, %r1, 1;
    bra.uni $again;
$out:
    add.s32 %r1, %r1, 100;
$end:
    mad.wide.u32 %d1, %r98, 4, %d90;
    st.global.b32 [%d1], %r1;
"""


def test_threads_go_their_ways_and_meet():
    out = aligned(np.zeros(64, np.uint32))
    launch(LOOP, out, threads=64)
    assert out.tolist() == [0 if thread == 9 else thread + 100 for thread in range(64)]


def test_threads_end_early():
    out = aligned(np.zeros(64, np.uint32))
    store = "mad.wide.u32 %d1, %r98, 4, %d90;\n st.global.b32 [%d1], %r98;"
    launch("setp.lt.u32 %p1, %r98, 40;\n @%p1 ret;\n" + store, out, threads=64)
    assert out.tolist() == [0] * 40 + list(range(40, 64))


# -- memory ------------------------------------------------------------------------------------------------------------

COPIES = {
    "b8": ("ld.global.b8 %h1, [%d1];", "st.global.b8 [%d2], %h1;", 1),
    "b16": ("ld.global.b16 { %h1 }, [ %d1 + 0 ];", "st.global.b16 [ %d2 + 0 ], { %h1 };", 2),
    "b32": ("ld.global.b32 { %r1 }, [ %d1 + 0 ];", "st.global.b32 [ %d2 + 0 ], { %r1 };", 4),
    "b64": ("ld.global.b64 { %d3 }, [ %d1 + 0 ];", "st.global.b64 [ %d2 + 0 ], { %d3 };", 8),
    "v2.b32": ("ld.global.v2.b32 { %r1, %r2 }, [%d1];", "st.global.v2.b32 [%d2], { %r1, %r2 };", 8),
    "v4.b32": (
        "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [%d1];", "st.global.v4.b32 [%d2], { %r1, %r2, %r3, %r4 };", 16,
    ),
    "v2.b64": ("ld.global.v2.b64 { %d3, %d4 }, [%d1];", "st.global.v2.b64 [%d2], { %d3, %d4 };", 16),
    "v4.b16": ("ld.global.v4.b16 { %h1, %h2, %h3, %h4 }, [%d1];", "st.global.v4.b16 [%d2], { %h1, %h2, %h3, %h4 };", 8),
    "nc.b32": ("ld.global.nc.b32 %r1, [%d1];", "st.global.b32 [%d2], %r1;", 4),
    "shared.v2.b16": (
        "ld.global.b32 %r1, [%d1]; mov.b32 {%h1, %h2}, %r1; st.shared.v2.b16 [%r9], {%h1, %h2};"
        "ld.shared.v2.b16 {%h3, %h4}, [%r9]; mov.b32 %r2, {%h3, %h4};",
        "st.global.b32 [%d2], %r2;", 4,
    ),
    "shared.v4.b16": (
        "ld.global.v4.b16 {%h1, %h2, %h3, %h4}, [%d1]; st.shared.v4.b16 [%r9], {%h1, %h2, %h3, %h4};"
        "ld.shared.b64 %d3, [%r9];",
        "st.global.b64 [%d2], %d3;", 8,
    ),
    "shared.b16": (
        "ld.global.b16 %h1, [%d1]; st.shared.b16 [%r9], %h1; ld.shared.b16 %h2, [%r9];", "st.global.b16 [%d2], %h2;", 2,
    ),
    "shared.b32": (
        "ld.global.b32 %r1, [%d1]; st.shared.b32 [%r9], %r1; ld.shared.b32 %r2, [%r9];", "st.global.b32 [%d2], %r2;", 4,
    ),
    "shared.b64": (
        "ld.global.b64 %d3, [%d1]; st.shared.b64 [%r9], %d3; ld.shared.b64 %d4, [%r9];", "st.global.b64 [%d2], %d4;", 8,
    ),
    "shared.v2": (
        "ld.global.v2.b32 {%r1, %r2}, [%d1]; st.shared.v2.b32 [%r9], {%r1, %r2}; ld.shared.v2.b32 {%r3, %r4}, [%r9];",
        "st.global.v2.b32 [%d2], {%r3, %r4};", 8,
    ),
    "shared.v2.b64": (
        "ld.global.v2.b64 {%d3, %d4}, [%d1]; st.shared.v2.b64 [%r9], {%d3, %d4}; ld.shared.v2.b64 {%d5, %d6}, [%r9];",
        "st.global.v2.b64 [%d2], {%d5, %d6};", 16,
    ),
    "shared.v4": (
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1]; st.shared.v4.b32 [%r9], {%r1, %r2, %r3, %r4};"
        "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r9];",
        "st.global.v4.b32 [%d2], {%r5, %r6, %r7, %r8};", 16,
    ),
}  # fmt: skip


def copy_kernel(name: str, guard: str = "") -> str:
    load, store, width = COPIES[name]
    return f"""
        mov.u32 %r7, %ctaid.x;
        mad.lo.s32 %r7, %r7, 64, %r98;
        mad.wide.u32 %d1, %r7, {width}, %d90;
        mad.wide.u32 %d2, %r7, {width}, %d91;
        mul.lo.s32 %r9, %r98, {width};
        mov.u32 %r10, global_smem;
        add.s32 %r9, %r9, %r10;
        {guard}
        {load}
        {store}
    """


@pytest.mark.parametrize("name", COPIES)
def test_memory_is_copied_at_every_width(name):
    width = COPIES[name][2]
    source = aligned(np.random.default_rng(0).integers(0, 256, (3, 64, width)).astype(np.uint8))
    target = aligned(np.zeros_like(source))
    launch(copy_kernel(name), source, target, threads=64, grid=(3, 1, 1), shared=64 * width)
    assert (target == source).all()


@pytest.mark.parametrize("name", COPIES)
def test_unmasked_access_beyond_the_end_is_a_fault(name):
    width = COPIES[name][2]
    source, target = (aligned(np.zeros((64, width), np.uint8)) for _ in range(2))
    sizes = [64 * width - 1, 64 * width]
    for order in (sizes, sizes[::-1]):
        with pytest.raises(Fault, match=r"(ld|st)\.global.*out of bounds: 1 accesses"):
            launch(copy_kernel(name), source, target, threads=64, shared=64 * width, sizes=order)
    masked = "setp.eq.b32 %p1, %r98, 63;\n @%p1 ret;"
    launch(copy_kernel(name, masked), source, target, threads=64, shared=64 * width, sizes=sizes)


POLICIES = {
    "createpolicy.fractional.L2::evict_first.b64": [
        "ld.global.L1::evict_first.L2::cache_hint.b16", "ld.global.L1::evict_first.L2::cache_hint.b32",
        "ld.global.L1::evict_first.L2::cache_hint.b64", "ld.global.L1::evict_first.L2::cache_hint.v2.b32",
        "ld.global.L1::evict_first.L2::cache_hint.v4.b32",
    ],
    "createpolicy.fractional.L2::evict_last.b64": [
        "ld.global.L1::evict_last.L2::cache_hint.b16", "ld.global.L1::evict_last.L2::cache_hint.b32",
        "ld.global.L1::evict_last.L2::cache_hint.b64", "ld.global.L1::evict_last.L2::cache_hint.v2.b32",
        "ld.global.L1::evict_last.L2::cache_hint.v4.b32",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("policy", "load"), [(policy, load) for policy in POLICIES for load in POLICIES[policy]])
def test_hints_for_the_cache_change_nothing(policy, load):
    plain, _, width = COPIES[load.split("cache_hint.")[1]]
    source = aligned(np.random.default_rng(0).integers(0, 256, (64, width)).astype(np.uint8))
    target = aligned(np.zeros_like(source))
    hinted = plain.replace(plain.split()[0], load).replace(";", ", %d8;")
    body = copy_kernel(load.split("cache_hint.")[1]).replace(plain, f"{policy} %d8, 1.0;\n {hinted}")
    launch(body, source, target, threads=64)
    assert (target == source).all() and hinted in body


LOCAL = """
    .local .align 4 .b8 depot[8];
    mov.b64 %d1, depot;
    cvt.u32.u64 %r1, %d1;
    st.local.b32 [%r1+4], %r98;
    st.local.b32 [%r1], 7;
    sub.s32 %r2, %r1, 8;
    ld.local.b32 %r3, [%r2+{offset}];
    mad.wide.u32 %d2, %r98, 4, %d90;
    st.global.b32 [%d2], %r3;
"""


def test_local_memory_is_of_each_thread():
    out = aligned(np.zeros(64, np.uint32))
    launch(LOCAL.format(offset=12), out, threads=64)
    assert out.tolist() == list(range(64))
    for offset, fault in {16: "out of bounds", 4: "out of bounds", 10: "misaligned"}.items():
        with pytest.raises(Fault, match=fault):
            launch(LOCAL.format(offset=offset), out, threads=64)


def test_constants_come_with_the_kernel():
    out = aligned(np.zeros(2, np.uint32))
    launch(
        """
        .global .align 4 .b8 table[8] = {1, 2, 0, 0, 255, 0, 0, 128};
        mov.b64 %d1, table;
        ld.global.nc.b32 %r1, [%d1];
        ld.global.nc.b32 %r2, [%d1+4];
        st.global.v2.b32 [%d90], {%r1, %r2};
        """,
        out, threads=1,
    )  # fmt: skip
    assert out.tolist() == [0x201, 0x800000FF]
    with pytest.raises(Fault, match="out of bounds"):
        launch(".global .align 4 .b8 table[1] = {1};\n mov.b64 %d1, table;\n ld.global.nc.b32 %r1, [%d1];")


def test_parameters():
    from tests.gpu_stand_in.ptx.machine import Kernel

    text = """
    .visible .entry case(
        .param .u64 .ptr .global .align 1 case_param_0, .param .u32 case_param_1, .param .f32 case_param_2
    )
    {
        .reg .b32 %r<9>;  .reg .b64 %d<9>;
        ld.param.b64 %d1, [case_param_0];
        ld.param.s32 %d2, [case_param_1];
        ld.param.b32 %r1, [case_param_1];
        ld.param.b32 %r2, [case_param_2];
        st.global.b64 [%d1], %d2;
        st.global.v2.b32 [%d1+8], {%r1, %r2};
        ret;
    }
    """
    out = aligned(np.zeros(4, np.uint32))
    minus_three, one = 2**32 - 3, int(np.float32(1).view(np.uint32))
    Kernel(text).launch((1, 1, 1), 1, [out.ctypes.data, minus_three, one], 0, [(out.ctypes.data, out.nbytes)])
    assert out[:2].view(np.int64).tolist() == [-3] and out[2:].tolist() == [minus_three, one]


@pytest.mark.parametrize("address", ["%d90 + -16", "%d90 + 512", "%d80"])
def test_addresses_of_nothing_are_faults(address):
    out = aligned(np.zeros(128, np.uint32))
    with pytest.raises(Fault, match="out of bounds"):
        launch(f"mov.u64 %d80, 64;\n ld.global.b32 %r1, [{address}];", out)


@pytest.mark.parametrize(
    ("access", "offset"), [("v4.b32 {%r1, %r2, %r3, %r4}", 4), ("b32 %r1", 2), ("b64 %d1", 4), ("b16 %h1", 1)]
)
def test_misaligned_access_is_a_fault(access, offset):
    out = aligned(np.zeros(128, np.uint32))
    kind, registers = access.split(" ", 1)
    launch(f"ld.global.{kind} {registers}, [%d90 + 32];", out)
    with pytest.raises(Fault, match="misaligned"):
        launch(f"ld.global.{kind} {registers}, [%d90 + {offset}];", out)
    with pytest.raises(Fault, match="misaligned"):
        launch(f"ld.shared.{kind} {registers}, [%r98];", out, shared=64)


@pytest.mark.parametrize("instruction", ["ld.shared.b32 %r1, [%r1];", "st.shared.b32 [%r1], %r1;"])
def test_shared_memory_has_bounds(instruction):
    body = f"shl.b32 %r1, %r98, 2;\n {instruction}"
    launch(body, threads=32, shared=128)
    with pytest.raises(Fault, match="out of bounds"):
        launch(body, threads=32, shared=124)


def test_what_nobody_has_written_is_not_a_number():
    out = aligned(np.zeros(64, np.float32))
    load = "shl.b32 %r2, %r98, 2;\n ld.shared.b32 %r1, [%r2];\n"
    launch(load + "mad.wide.u32 %d1, %r98, 8, %d90;\n st.global.v2.b32 [%d1], {%r1, %r55};", out, shared=128)
    assert np.isnan(out).all()


# -- matrices in shared memory -----------------------------------------------------------------------------------------


def matrix_lanes(values: np.ndarray, transposed: bool = False) -> np.ndarray:
    """Of the (8, 8) matrix what each of 32 lanes has, as the PTX manual draws it."""
    values = values.T if transposed else values
    return np.array([values[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2] for lane in range(32)])


STAGE = """
    shl.b32 %r1, %r98, 2;
    mad.wide.u32 %d1, %r98, {bytes}, %d90;
    mul.lo.s32 %r2, %r98, {bytes};
    ld.global.{kind} {registers}, [%d1];
    st.shared.{kind} [%r2], {registers};
    shl.b32 %r3, %r98, 4;
"""


# (of four matrices, of two, of one)
LOADS = {
    False: (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16",
    ),
    True: (
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("transposed", LOADS)
def test_matrices_are_loaded(transposed):
    matrices = aligned(np.arange(256, dtype=np.uint16).reshape(4, 8, 8))
    stage = STAGE.format(bytes=16, kind="v4.b32", registers="{%r4, %r5, %r6, %r7}")
    of_four, of_two, of_one = LOADS[transposed]
    out = aligned(np.zeros((32, 4, 2), np.uint16))
    load = f"{of_four} {{%r10, %r11, %r12, %r13}}, [%r3];\n"
    store = "mad.wide.u32 %d2, %r98, 16, %d91;\n st.global.v4.b32 [%d2], {%r10, %r11, %r12, %r13};"
    launch(stage + load + store, matrices, out, shared=512)
    for number in range(4):
        assert (out[:, number] == matrix_lanes(matrices[number], transposed)).all()
    pair = aligned(np.zeros((32, 2, 2), np.uint16))
    load = f"{of_two} {{%r10, %r11}}, [%r3];\n"
    store = "mad.wide.u32 %d2, %r98, 8, %d91;\n st.global.v2.b32 [%d2], {%r10, %r11};"
    launch(stage + load + store, matrices, pair, shared=512)
    assert (pair == out[:, :2]).all()
    load = f"{of_one} {{%r10}}, [%r3+0];\n"
    store = "mad.wide.u32 %d2, %r98, 4, %d91;\n st.global.b32 [%d2], %r10;"
    launch(stage + load + store, matrices, out, shared=512)
    assert (out.reshape(-1)[:64].reshape(32, 2) == matrix_lanes(matrices[0], transposed)).all()


STORES = {
    1: "stmatrix.sync.aligned.m8n8.x1.shared.b16",
    2: "stmatrix.sync.aligned.m8n8.x2.shared.b16",
    4: "stmatrix.sync.aligned.m8n8.x4.shared.b16",
}


@pytest.mark.parametrize("count", STORES)
def test_matrices_are_stored(count):
    matrices = aligned(np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8))
    lanes = aligned(np.stack([matrix_lanes(matrix) for matrix in matrices]))  # (matrix, lane, 2)
    out, registers = aligned(np.zeros_like(matrices)), [f"%r{10 + place}" for place in range(count)]
    move = "mad.wide.u32 %d1, %r98, 4, %d9{array};\n"
    body = move.format(array=0) + "".join(
        f"ld.global.b32 {register}, [%d1 + {128 * place}];\n" for place, register in enumerate(registers)
    )
    body += f"and.b32 %r2, %r98, {8 * count - 1};\n shl.b32 %r2, %r2, 4;\n"
    body += f"{STORES[count]} [%r2], {{{', '.join(registers)}}};\n shl.b32 %r3, %r98, 2;\n" + move.format(array=1)
    for place in range(count):
        body += f"ld.shared.b32 %r4, [%r3 + {128 * place}];\n st.global.b32 [%d1 + {128 * place}], %r4;\n"
    launch(body, lanes, out, shared=128 * count)
    assert (out == matrices).all()


# -- races and barriers ------------------------------------------------------------------------------------------------

WRITE_OWN = "shl.b32 %r1, %r98, 2;\n st.shared.b32 [%r1], %r98;\n"
OF_ANOTHER_WARP = "xor.b32 %r2, %r1, 128;\n"
BARRIER = "bar.sync 0;\n"


def test_race_of_a_read_with_a_write():
    read = OF_ANOTHER_WARP + "ld.shared.b32 %r3, [%r2];\n"
    launch(WRITE_OWN + BARRIER + read, threads=64, shared=256)
    launch(WRITE_OWN + read.replace("128", "64"), threads=64, shared=256)  # within a warp
    with pytest.raises(Fault, match="race: reads"):
        launch(WRITE_OWN + read, threads=64, shared=256)


def test_race_of_a_write_with_reads_of_several_warps():
    read = "ld.shared.b32 %r3, [0];\n".replace("[0]", "[%r4]")
    write = "setp.eq.b32 %p1, %r98, {thread};\n @%p1 st.shared.b32 [%r4], %r98;\n"
    for thread in (0, 32, 64):
        after = write.format(thread=thread)
        launch("mov.b32 %r4, 0;\n" + read + BARRIER + after, threads=96, shared=16)
        with pytest.raises(Fault, match="race: writes what other threads read"):
            launch("mov.b32 %r4, 0;\n" + read + after, threads=96, shared=16)


def test_race_of_two_writes():
    write = "mov.b32 %r4, 0;\n st.shared.b32 [%r4], {};\n"
    launch(write.format("%r4"), threads=64, shared=16)  # the same by all
    launch(write.format("%r98"), threads=32, shared=16)  # by lanes of one warp
    with pytest.raises(Fault, match="race: writes what other threads wrote"):
        launch(write.format("%r98"), threads=64, shared=16)
    text = "mov.b32 %r4, 0;\n shr.u32 %r5, %r98, 5;\n setp.eq.b32 %p1, %r5, {};\n @%p1 st.shared.b32 [%r4], %r5;\n"
    first, second = (text.format(warp) for warp in (0, 1))
    launch(first + BARRIER + second, threads=64, shared=16)
    with pytest.raises(Fault, match="race: writes what other threads wrote"):
        launch(first + second, threads=64, shared=16)


def test_race_of_blocks_in_global_memory():
    out = aligned(np.zeros(64, np.uint32))
    own = "mov.u32 %r1, %ctaid.x;\n mad.lo.s32 %r1, %r1, 32, %r98;\n mad.wide.u32 %d1, %r1, 4, %d90;\n"
    launch(own + "st.global.b32 [%d1], %r98;", out, grid=(2, 1, 1))
    same = "mad.wide.u32 %d1, %r98, 4, %d90;\n st.global.b32 [%d1], %r1;"
    with pytest.raises(Fault, match="race: writes what other threads wrote"):
        launch("mov.u32 %r1, %ctaid.x;\n" + same, out, grid=(2, 1, 1))
    with pytest.raises(Fault, match="race: reads"):
        launch(own + "st.global.b32 [%d1], %r98;\n ld.global.b32 %r2, [%d90];", out, grid=(2, 1, 1))
    with pytest.raises(Fault, match="race: writes what other threads read"):
        launch(own + "ld.global.b32 %r2, [%d90];\n st.global.b32 [%d1], %r98;", out, grid=(2, 1, 1))
    # Also if the blocks do not run at once.
    many = aligned(np.zeros(32 * 600, np.uint32))
    with pytest.raises(Fault, match="race: writes what other threads wrote"):
        launch("mov.u32 %r1, %ctaid.x;\n shr.u32 %r1, %r1, 8;\n" + same, many, grid=(600, 1, 1))


def test_copies_of_a_tile_may_overwrite_what_they_read():
    out = aligned(np.zeros(64, np.uint32))
    own = "mad.wide.u32 %d1, %r98, 4, %d90;\n and.b32 %r1, %r98, 31;\n mad.wide.u32 %d2, %r1, 4, %d90;\n"
    read, write = "ld.global.b32 %r2, [%d2];\n", "setp.lt.u32 %p1, %r98, 32;\n @%p1 st.global.b32 [%d1], 5;\n"
    launch(own + read + write, out, threads=64, copies=True)
    with pytest.raises(Fault, match="race: writes what other threads read"):
        launch(own + read + write, out, threads=64)
    one_warp = read.replace("ld", "setp.ge.u32 %p2, %r98, 32;\n @%p2 ld")  # which does not compute what the other does
    with pytest.raises(Fault, match="race: writes what other threads read"):
        launch(own + one_warp + write, out, threads=64, copies=True)
    with pytest.raises(Fault, match="race: writes what other threads read"):
        launch(own + read + write, out, threads=64, grid=(2, 1, 1), copies=True)


@pytest.mark.parametrize("limit", [0, 16, 32, 64])
def test_barrier_that_some_threads_do_not_reach(limit):
    body = f"setp.lt.u32 %p1, %r98, {limit};\n @%p1 bra $over;\n bar.sync 0;\n$over:\n"
    if limit in (0, 64):  # all threads, or none
        launch(body, threads=64)
    else:
        with pytest.raises(Fault, match=r"bar\.sync 0: divergent barrier"):
            launch(body, threads=64)


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.bfly.b32 %r1, %r98, 1, 31, -1;",
        "bar.warp.sync -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r9];",
    ],
)
def test_instruction_of_a_warp_by_some_of_its_lanes(instruction):
    body = "mov.b32 %r9, 0;\n setp.lt.u32 %p1, %r98, LIMIT;\n @%p1 " + instruction
    launch(body.replace("LIMIT", "32"), threads=64, shared=128)
    with pytest.raises(Fault, match="some lanes"):
        launch(body.replace("LIMIT", "16"), threads=64, shared=128)


# -- what is not known -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;", "add.sat.s32 %r1, %r2, %r3;", "cvt.rz.bf16.f32 %h1, %r1;",
        "ex2.approx.f16 %h1, %h2;",
        "ld.const.b32 %r1, [%r2];", "mul.rz.f32 %r1, %r2, %r3;", "bar.sync 1;", "cvt.u32.f32 %r1, %r2;",
        "add.s32 %r1, %r2;",
        "fma.rn.f32 %r1, %r2, %r3;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 %r1, %r2;",
    ],
)  # fmt: skip
def test_unknown_instructions_are_named(instruction):
    with pytest.raises(UnknownInstruction) as refused:
        launch(instruction)
    assert instruction.rstrip(";") in str(refused.value)


def test_atomics_are_refused():
    out = aligned(np.zeros(1, np.float32))
    with pytest.raises(UnknownInstruction, match="order of threads"):
        launch("atom.global.gpu.acq_rel.add.f32 %r1, [%d90], 0f3F800000;", out)


@pytest.mark.parametrize("body", ["add.s32 %r1 %r2;", ".surprise 4;"])
def test_text_that_cannot_be_read_is_refused(body):
    with pytest.raises(Fault):
        launch(body)


def test_faults_name_kernel_and_instruction():
    with pytest.raises(Fault, match=r"case: @%p1 trap: the kernel asserts"):
        launch("setp.eq.b32 %p1, %r98, 3;\n @%p1 trap;")


def test_assertions_of_a_kernel():
    call = """
        setp.eq.b32 %p1, %r98, 3;
        @%p1 bra $fail;
        ret;
    $fail:
        { // callseq 0, 0
        .param .b64 param0;
        st.param.b64 [param0], %d1;
        call.uni __assertfail, (param0);
        } // callseq 0
    """
    with pytest.raises(Fault, match="the kernel asserts"):
        launch(call)
    launch(call.replace("%r98, 3", "%r98, 99"))
    with pytest.raises(UnknownInstruction):
        launch("call.uni another, (param0);")


def test_registers_have_widths():
    with pytest.raises(Fault, match="not of 64 bits"):
        launch("mov.b32 %r1, 0;\n add.s64 %d1, %r1, 1;")
