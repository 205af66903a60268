"""The Triton kernels under the interpreter: test_group_norm_silu.py runs this file in a process of its own."""

import itertools

import pytest
import torch

from rdmd_fast.kernels.group_norm_silu import (
    branching_group_norm_silu,
    group_norm_silu,
    group_norm_silu_reference,
    plan_chunks,
    plan_resident,
)

# shape, groups, channels_last, resident: both ways through, both layouts, tiles that do not divide, several chunks
SHAPES = [
    ((2, 16, 4, 4), 4, True, True),
    ((2, 64, 9, 9), 2, True, True),
    ((2, 8, 20, 21), 2, False, True),
    ((1, 12, 1, 1), 3, True, True),
    ((3, 12, 7, 5), 2, True, False),
    ((3, 12, 7, 5), 2, False, False),
    ((2, 40, 17, 13), 4, True, False),
    ((2, 6, 35, 31), 2, False, False),
    ((1, 144, 9, 8), 12, True, False),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter truncates to bf16
NAMES = ("scale", "shift", "addend", "x_bias")
IDS = ["x".join(map(str, shape)) + ("/channels_last" if last else "") for shape, _, last, _ in SHAPES]


def inputs(shape, dtype, channels_last, present, parameter_dtype=torch.float32, mean=3.0):
    """(x, weight, bias, modulation by name, dy); modulation comes in strided slices, as chunk() leaves it."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, channels = shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def normal(*size):
        return torch.randn(size, generator=generator)

    x = (normal(*shape) * 2 + mean).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (normal(channels).to(parameter_dtype).requires_grad_() for _ in range(2))
    rows = (*normal(n, 3 * channels).to(dtype).chunk(3, dim=1), normal(channels).to(parameter_dtype))
    modulation = {k: row.requires_grad_() if k in present else None for k, row in zip(NAMES, rows, strict=True)}
    return x, weight, bias, modulation, normal(*shape).to(dtype)


def gradients(function, x, weight, bias, groups, modulation, silu, dy):
    leaves = [x, weight, bias, *(part for part in modulation.values() if part is not None)]
    y = function(x, weight, bias, groups, 1e-5, **modulation, silu=silu)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def wide(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def expected(x, weight, bias, groups, modulation, silu, dy):
    modulation = {name: wide(part) for name, part in modulation.items()}
    return gradients(
        group_norm_silu_reference, wide(x), wide(weight), wide(bias), groups, modulation, silu, dy.double()
    )


def assert_close(actual, exact, tolerance):
    for a, e in zip(actual, exact, strict=True):
        a, e = a.detach(), e.detach()
        assert a.shape == e.shape and a.isfinite().all()
        assert (a.double() - e).abs().max() <= tolerance * max(1.0, float(e.abs().max()))


@pytest.mark.parametrize(("shape", "groups", "last", "resident"), SHAPES, ids=IDS)
def test_values_and_gradients_match_fp64(shape, groups, last, resident):
    present, silu = (NAMES, True) if last else (("addend",), False)
    arguments = inputs(shape, torch.float32, last, present)
    n, channels, pixels = shape[0], shape[1], shape[2] * shape[3]
    assert (plan_resident((n, channels, pixels), groups, 4, last) is not None) == resident
    actual = gradients(group_norm_silu, *arguments[:3], groups, arguments[3], silu, arguments[4])
    assert actual[0].stride() == actual[1].stride() == arguments[0].stride()
    assert_close(actual, expected(*arguments[:3], groups, arguments[3], silu, arguments[4]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("index", [0, 2, 4, 5])
def test_gradients_of_two_branches_meet_in_the_backward_pass(index):
    shape, groups, last, _ = SHAPES[index]
    x, weight, bias, _, dy = inputs(shape, torch.float32, last, ())
    dpast = inputs(shape, torch.float32, last, (), mean=0.0)[0].detach()
    y, past = branching_group_norm_silu(x, weight, bias, groups, 1e-5)
    assert torch.equal(past, x)
    actual = torch.autograd.grad((y, past * 1), (x, weight, bias), (dy, dpast))
    exact = expected(x, weight, bias, groups, {}, True, dy)[1:]
    assert_close(actual, [exact[0] + dpast.double(), *exact[1:]], TOLERANCE[torch.float32])
    (alone,) = torch.autograd.grad(branching_group_norm_silu(x, weight, bias, groups, 1e-5)[0], x, dy)
    assert_close([alone], exact[:1], TOLERANCE[torch.float32])


@pytest.mark.parametrize(("dtype", "parameter_dtype"), [("bfloat16", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("index", [0, 4])
def test_half_precision_loses_its_last_bit_only(index, dtype, parameter_dtype):
    shape, groups, last, _ = SHAPES[index]
    dtype = getattr(torch, dtype)
    arguments = inputs(shape, dtype, last, NAMES, getattr(torch, parameter_dtype))
    actual = gradients(group_norm_silu, *arguments[:3], groups, arguments[3], True, arguments[4])
    assert [part.dtype for part in actual[1:]] == [part.dtype for part in (*arguments[:3], *arguments[3].values())]
    assert_close(actual, expected(*arguments[:3], groups, arguments[3], True, arguments[4]), TOLERANCE[dtype])


@pytest.mark.parametrize("index", [1, 6])
def test_variance_survives_a_mean_3000_times_larger(index):
    shape, groups, last, _ = SHAPES[index]
    x, weight, bias, modulation, _ = inputs(shape, torch.float32, last, ("addend",), mean=6000.0)
    y = group_norm_silu(x, weight, bias, groups, 1e-5, **modulation)
    exact = group_norm_silu_reference(
        x.double(), weight.double(), bias.double(), groups, 1e-5, addend=modulation["addend"].double()
    )
    assert (y - exact).abs().max() < 3e-3  # half an ulp of the mean is 1.2e-4 standard deviations


@pytest.mark.parametrize("index", [1, 4, 7])
def test_a_sample_does_not_depend_on_its_batch(index):
    shape, groups, last, _ = SHAPES[index]
    x, weight, bias, modulation, dy = inputs(shape, torch.float32, last, NAMES)
    whole = gradients(group_norm_silu, x, weight, bias, groups, modulation, True, dy)
    one = {name: part[:1].detach().requires_grad_() for name, part in modulation.items() if part.ndim == 2}
    one["x_bias"] = modulation["x_bias"]
    alone = gradients(group_norm_silu, x[:1].detach().requires_grad_(), weight, bias, groups, one, True, dy[:1])
    for index in (0, 1, 4, 5, 6):
        assert torch.equal(whole[index][:1], alone[index])


def test_other_layouts_are_copied_and_frozen_parameters_left_alone():
    shape, groups = (2, 12, 7, 5), 2
    x, weight, bias, _, dy = inputs((2, 12, 5, 7), torch.float32, True, ())
    x = x.detach().transpose(2, 3).requires_grad_()
    weight.requires_grad_(False), bias.requires_grad_(False)
    for layout in (x, torch.cat([x, x], dim=3)[..., ::2].detach().requires_grad_()):
        y = group_norm_silu(layout, weight, bias, groups, 1e-5)
        exact = group_norm_silu_reference(wide(layout), weight.double(), bias.double(), groups, 1e-5)
        assert y.shape == shape and y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        y.backward(dy.transpose(2, 3))  # a gradient in another layout
        assert layout.grad.isfinite().all() and weight.grad is None


def test_empty_batch():
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    group_norm_silu(x, weight, torch.zeros(8), 2, 1e-5).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize(("groups", "weight", "scale", "error"), [
    (5, torch.ones(12), None, ValueError),
    (3, torch.ones(11), None, ValueError),
    (3, torch.ones(12), torch.ones(1, 12), ValueError),
    (3, torch.ones(12, dtype=torch.float64), None, TypeError),
])  # fmt: skip
def test_what_does_not_fit_is_refused(groups, weight, scale, error):
    with pytest.raises(error):
        group_norm_silu(torch.zeros(2, 12, 4, 4), weight, torch.zeros(12), groups, 1e-5, scale)


def test_registered_operations_pass_opcheck():
    shape, groups, last, _ = SHAPES[0]
    x, weight, bias, modulation, _ = inputs(shape, torch.float32, last, NAMES)
    operation = torch.ops.rdmd_fast.group_norm_silu.default
    *rows, x_bias = modulation.values()
    torch.library.opcheck(operation, (x, weight, bias, groups, 1e-5, *rows, True, x_bias))
    torch.library.opcheck(operation, (x.detach(), weight, bias, groups, 1e-5, None, None, None, False, None))


@pytest.mark.parametrize("index", [1, 5])
def test_compiled_equals_eager(index):
    shape, groups, last, _ = SHAPES[index]
    arguments = inputs(shape, torch.float32, last, NAMES)

    def both(x, weight, bias, groups, eps, **modulation):
        return group_norm_silu(x, weight, bias, groups, eps, **modulation) * 2

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    eager, traced = (
        gradients(function, *arguments[:3], groups, arguments[3], True, arguments[4]) for function in (both, compiled)
    )
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)


def test_plans_cover_every_element_with_legal_tiles():
    for channels, group, side in itertools.product(
        (4, 12, 32, 96, 128, 192, 384, 1024), (4, 6, 8, 16, 32), (4, 7, 64, 512)
    ):
        if channels % group:
            continue
        shape, groups = (3, channels, side * side), channels // group
        for last, itemsize in itertools.product((True, False), (2, 4)):
            plans = [plan_chunks(shape, last, elements) for elements in (1024, 2048)]
            resident = plan_resident(shape, groups, itemsize, last)
            for plan in [*plans, *([resident] if resident else [])]:
                tile = plan.tile
                assert tile["TILE_P"] * tile["TILE_C"] <= 8192 and 1 <= plan.warps <= 16
                assert plan.grid[1] * tile["TILE_C"] >= channels
                assert plan.grid[0] // 3 * tile["TILE_P"] * tile.get("STEPS", 1) >= side * side
            # The forward's and the backward's chunks are one.
            assert plans[0].grid[0] == plans[1].grid[0]
