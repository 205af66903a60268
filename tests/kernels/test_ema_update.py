import pytest
import torch

from rdmd_fast.kernels.ema_update import ema_update


def test_averages_move_towards_their_sources():
    ema, source = [torch.randn(5), torch.randn(3, 4)], [torch.randn(5), torch.randn(3, 4)]
    expected = [0.9 * a.double() + 0.1 * b.double() for a, b in zip(ema, source, strict=True)]
    ema_update(ema, source, 0.1)
    torch.testing.assert_close([a.double() for a in ema], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [1e-4, 0.3, 0.7, 1.0])
def test_on_the_cpu_it_is_foreach_lerp_to_the_bit(weight):
    ema, source = [torch.randn(1000) for _ in range(3)], [torch.randn(1000) for _ in range(3)]
    expected = [a.clone() for a in ema]
    torch._foreach_lerp_(expected, source, weight)
    ema_update(ema, source, weight)
    assert all(torch.equal(a, b) for a, b in zip(ema, expected, strict=True))


def test_nothing_to_average():
    ema_update([], [], 0.1)
    with pytest.raises(RuntimeError):
        ema_update([], [torch.zeros(1)], 0.1)


def test_parameters_are_averaged_without_gradient_tracking():
    parameter, average = torch.ones(3, requires_grad=True), torch.zeros(3)
    ema_update([average], [parameter], 0.5)
    assert not average.requires_grad and torch.equal(average, torch.full((3,), 0.5))


INTERPRETED = """
import torch
from rdmd_fast.kernels import ema_update as operation
from rdmd_fast.kernels.ema_update import ema_update
torch.manual_seed(0)
SIZES = [(1,), (4096,), (0,), (10001,), (3, 4, 5, 6), (2, 4097)]

def tensors():
    made = [torch.randn(size) for size in SIZES] + [torch.randn(5000)[1:]]  # the last is not aligned to 16 bytes
    made[4] = made[4].contiguous(memory_format=torch.channels_last)
    return made

for weight in (1e-4, 0.3, 0.7, 1.0):
    ema, source = tensors(), tensors()
    exact = [a.double() + weight * (b.double() - a.double()) for a, b in zip(ema, source)]
    for first, last in ((0, 6), (6, 7)):
        ema_update(ema[first:last], source[first:last], weight)
    for a, e in zip(ema, exact):
        # numpy has no fused multiply-add: one rounding more than the GPU's
        torch.testing.assert_close(a.double(), e, rtol=0, atol=4.8e-7)
    assert all(torch.equal(a, b) for a, b in zip(ema, source)) or weight < 1

# A second step finds its table; freed memory that comes back makes no difference.
ema, source = [torch.zeros(6000)], [torch.ones(6000)]
for _ in range(2):
    ema_update(ema, source, 0.5)
assert torch.equal(ema[0], torch.full((6000,), 0.75))
kept = len(operation._TABLES)
ema_update(ema, source, 0.5)
assert len(operation._TABLES) == kept <= 8

neighbours = torch.zeros(9000)
ema_update([neighbours[8:5008]], [torch.ones(5000)], 1.0)
assert neighbours.sum() == 5000 and neighbours[8:5008].min() == 1

for a, b, error in (
    (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), TypeError),
    (torch.zeros(3), torch.zeros(4), ValueError),
    (torch.zeros(3, 4).t(), torch.zeros(4, 3), ValueError),
    (torch.zeros(6)[::2], torch.zeros(6)[::2], ValueError),
):
    try:
        ema_update([a], [b], 0.1)
        raise SystemExit(f"took {a.dtype} {a.shape} {b.dtype} {b.shape}")
    except error:
        pass

torch.library.opcheck(torch.ops.rdmd_fast.ema_update.default, ([torch.zeros(9)], [torch.ones(9)], 0.25))

def step(ema, source):
    ema_update([ema], [source], 0.25)
    return ema * 2

average = torch.zeros(9)
doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(average, torch.ones(9))
assert torch.equal(average, torch.full((9,), 0.25)) and torch.equal(doubled, torch.full((9,), 0.5))
"""


def test_kernel_in_the_interpreter(interpreted):
    interpreted(INTERPRETED)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.kernels.static_cases import ema_update_cases
for case in ema_update_cases():
    constants = {(case.kernel.arg_names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, dict(case.signature), constants, {(0,): [["tt.divisibility", 16]]})
    options = {"num_warps": case.num_warps, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert ptx.count("ld.global.v4") >= 8 and ptx.count("st.global.v4") >= 4, case.name
    assert "fma.rn.f32" in ptx and "mul.rn.f32" not in ptx
"""


def test_gpu_code_moves_16_bytes_and_rounds_as_lerp_does(fork_python, tmp_path):
    pytest.importorskip("triton")
    compiled = fork_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    said = compiled.finish()
    assert compiled.returncode == 0, said
