import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from rdmd_fast.kernels import _dispatch, philox

WORD = 2**32 - 1
# The bits of normal(2024, 5, [3, 2**40], 5).
GOLDEN = [
    [-1088485796, -1078143604, 1064422425, 1036360203, -1085756594],
    [-1089608574, -1112337157, 1052653170, 1054432991, -1080760569],
]


def philox_of_integers(counter, seed):
    """Philox4x32-10 on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed // 2**32
    for i in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        x0 = (k0 + i * 0x9E3779B9) % 2**32
        x1 = (k1 + i * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = right // 2**32 ^ c1 ^ x0, right % 2**32, left // 2**32 ^ c3 ^ x1, left % 2**32
    return c0, c1, c2, c3


def word_of_integers(seed, stream, position, element):
    return philox_of_integers((element // 4, stream, position % 2**32, position // 2**32), seed)[element % 4]


def box_muller_fp64(words):
    """Normals [..., 4] in fp64 from words [..., 4]; u is the fp32 number that the recipe defines."""
    u = words[..., 0::2].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
    quadrant, rest = words[..., 1::2] >> 30, words[..., 1::2] % 2**30
    angle = quadrant * (np.pi / 2) + (rest - 2**29) * (np.pi / 2**31)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(words.shape)


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, seed, expected):
    result = philox.philox4x32(tuple(torch.tensor([word]) for word in counter), seed)
    assert tuple(int(word) for word in result) == expected
    assert philox_of_integers(counter, seed) == expected


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("stream", [3, WORD])
def test_words_match_python_integers_at_large_seeds_and_positions(seed, stream):
    positions = [0, 1, WORD, 2**32, 2**33 + 7, 2**62 + 1]
    words = philox.words(seed, stream, torch.tensor(positions), 11)
    assert words.tolist() == [[word_of_integers(seed, stream, i, j) for j in range(11)] for i in positions]


def test_high_halves_of_seed_and_position_count():
    position = torch.tensor([5])
    base = philox.normal(5, 0, position, 8)
    assert not torch.equal(base, philox.normal(5 + 2**32, 0, position, 8))
    assert not torch.equal(base, philox.normal(5, 0, position + 2**32, 8))


def test_normals_match_box_muller_in_fp64():
    positions = torch.arange(64)
    words = philox.words(7, 5, positions, 4096).numpy().reshape(64, -1, 4)
    expected = box_muller_fp64(words).reshape(64, -1)
    np.testing.assert_allclose(philox.normal(7, 5, positions, 4096).numpy(), expected, rtol=0, atol=1e-6)


def test_extreme_words_give_the_right_finite_normals():
    edges = [0, 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, WORD - 1, WORD]
    radius_word, angle_word = (torch.tensor(edges).repeat(10), torch.tensor(edges).repeat_interleave(10))
    out = torch.empty(100, 2)
    philox._box_muller(radius_word, angle_word, out)
    words = torch.stack([radius_word, angle_word, radius_word, angle_word], dim=-1).numpy()
    np.testing.assert_allclose(out.numpy(), box_muller_fp64(words)[:, :2], rtol=0, atol=1e-6)
    assert out.abs().max() <= math.sqrt(66 * math.log(2)) * (1 + 1e-6)


def test_normals_keep_their_bits():
    # Any change here changes every run that was ever recorded.
    bits = philox.normal(2024, 5, torch.tensor([3, 2**40]), 5).view(torch.int32)
    assert bits.tolist() == GOLDEN


def test_normals_are_standard_normal():
    x = philox.normal(11, 2, torch.arange(256), 1024).flatten().double().numpy()
    n = len(x)
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_streams_positions_seeds_and_lanes_are_independent():
    n = 2**14
    position = torch.tensor([17])
    rows = [philox.normal(1, stream, position, n) for stream in range(6)]
    rows += [philox.normal(seed, 0, position, n) for seed in (2, 1 + 2**32)]
    rows += [philox.normal(1, 0, position + shift, n) for shift in (1, 2, 2**32)]
    rows += list(philox.normal(3, 0, position, 4 * n).view(n, 4).T[:, None])
    x = torch.cat(rows).double().numpy()
    for values in (x, x**2):
        correlation = np.corrcoef(values) - np.eye(len(x))
        assert np.abs(correlation).max() < 5 / math.sqrt(n)


def test_batch_and_count_split_invariance():
    positions = torch.tensor([4, 9, 2**35, 0, 1])
    whole = philox.normal(8, 1, positions, 14)
    parts = [philox.normal(8, 1, positions[:2], 14), philox.normal(8, 1, positions[2:], 14)]
    assert torch.equal(whole, torch.cat(parts))
    for count in (1, 2, 3, 5):
        shorter = philox.normal(8, 1, positions, count)
        assert shorter.is_contiguous() and torch.equal(shorter, whole[:, :count])


def test_empty_requests():
    assert philox.normal(0, 0, torch.arange(0), 6).shape == (0, 6)
    assert philox.normal(0, 0, torch.arange(3), 0).shape == (3, 0)
    assert philox.uniform64(0, 0, torch.arange(0), 2).shape == (0, 2)


def test_uniform_has_53_bits_of_the_word_pairs():
    expected = [
        ((word_of_integers(4, 6, 12, 2 * j) >> 5) * 2**26 + (word_of_integers(4, 6, 12, 2 * j + 1) >> 6)) / 2**53
        for j in range(5)
    ]
    assert philox.uniform64(4, 6, torch.tensor([12]), 5).tolist() == [expected]
    x = philox.uniform64(4, 6, torch.arange(2**16)).flatten().numpy()
    assert stats.kstest(x, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("word", [0, WORD])
def test_uniform_stays_inside_the_open_interval(monkeypatch, word):
    monkeypatch.setattr(philox, "words", lambda seed, stream, positions, count: torch.full((1, count), word))
    assert 0 < float(philox.uniform64(0, 0, torch.zeros(1))) < 1


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_seed_and_stream_outside_their_words_are_refused(seed, stream):
    with pytest.raises(ValueError, match="outside"):
        philox.normal(seed, stream, torch.arange(2), 4)


def test_dispatch_never_falls_back(monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.delenv("RDMD_KERNELS", raising=False)
    assert _dispatch.backend("cpu") == "reference"
    monkeypatch.setenv("RDMD_KERNELS", "reference")
    assert _dispatch.backend("cuda") == "reference"
    monkeypatch.setenv("RDMD_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"cannot run on cpu|no Triton"):
        philox.normal(0, 0, torch.arange(2), 4)
    monkeypatch.setattr(_dispatch, "triton", None)
    with pytest.raises(RuntimeError, match="no Triton"):
        _dispatch.backend("cuda")
    monkeypatch.setenv("RDMD_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="unknown"):
        _dispatch.backend("cpu")


def test_torch_part_works_without_triton():
    source = """
import sys
sys.modules["triton"] = None
import torch
from rdmd_fast.kernels import philox
print(philox.normal(2024, 5, torch.tensor([3, 2**40]), 5).view(torch.int32).tolist())
"""
    environment = {**os.environ, "RDMD_KERNELS": "auto"}
    result = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(GOLDEN), result.stderr


COMPARE = """
import sys
import torch
from rdmd_fast.kernels import philox
torch.set_num_threads(1)
log2 = int(sys.argv[1])
for seed, stream, first, n, count in [
    (0, 5, 0, 2 ** (log2 - 10), 1024),
    (2**64 - 1, 2**32 - 1, 2**32 - 3, 7, 1),
    (2**63 + 11, 1, 2**33, 3, 4102),
    (1, 1, -2, 67, 6),
]:
    positions = torch.arange(n) + first
    interpreted = philox.normal(seed, stream, positions, count)
    reference = philox.normal_reference(seed, stream, positions, count)
    assert torch.equal(interpreted.view(torch.int32), reference.view(torch.int32)), (seed, first, n, count)
"""


@pytest.mark.parametrize("log2", [14, pytest.param(20, marks=pytest.mark.slow)])
def test_triton_has_the_bits_of_torch(interpreted, log2):
    interpreted(COMPARE, log2)


FUSED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rdmd_fast.kernels import philox
names = ["out", "positions", "seed", "stream", "n", "count", "ROWS", "BLOCKS"]
types = ["*fp32", "*i64", "*i64", "i32", "i32", "i32", "constexpr", "constexpr"]
attrs = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 5)}
source = ASTSource(philox._normal_kernel, dict(zip(names, types)), {(6,): 1, (7,): 512}, attrs)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
assert "sqrt.rn.f32" in ptx and "st.global.v4" in ptx
assert "fma.rn.f32" not in ptx and "approx" not in ptx and ".ftz" not in ptx
"""


def test_gpu_code_rounds_every_operation_and_stores_16_bytes(fork_python, tmp_path):
    pytest.importorskip("triton")
    compiled = fork_python(FUSED, TRITON_CACHE_DIR=str(tmp_path))
    said = compiled.finish()
    assert compiled.returncode == 0, said
