import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton")


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment.pop("RDMD_KERNELS", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def compiled(file, *architectures):
    """All kernels compiled for each of ``architectures``: result of the tool and what it wrote."""
    result = run("-m", "benchmarks.static", "--json", file, "--arch", *architectures)
    assert file.exists(), result.stderr
    return result, json.loads(file.read_text())


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("static") / "static.json", 80, 90, 100)


@pytest.mark.slow
def test_every_kernel_keeps_its_limits_on_ada_and_rtx_blackwell(tmp_path):
    check_limits(*compiled(tmp_path / "static.json", 89, 120), {"sm_89", "sm_120"})


def test_every_kernel_keeps_its_limits_on_data_centre_gpus(static):
    check_limits(*static, {"sm_80", "sm_90", "sm_100"})


def check_limits(result, report, expected):
    assert result.returncode == 0, result.stdout
    architectures = {}
    for record in report["kernels"]:
        architectures.setdefault(record["name"], set()).add(record["arch"])
        assert record["spill_bytes"] == 0 and record["atomics"] == []
        assert 0 < record["registers"] <= 128
        assert record["vector_bytes"] >= 16 or not record["must_vectorise"]
    operations = {name.split("/")[0] for name in architectures}
    assert operations >= {"noise_forward", "rdmd_gradient", "rdmd_residual", "denoising_loss", "philox_normal"}
    assert operations >= {"group_norm_silu", "ema_update", "image_normalize"}
    assert all(seen == expected for seen in architectures.values())


def test_turns_move_few_bytes_in_few_launches(static):
    turns = static[1]["turns"]
    for name, limit in {"generator": 6, "generator_uniform": 6, "generator_dmd": 7.5, "fake": 4}.items():
        assert 3 <= turns[name]["bytes_over_N"] <= limit, name
        assert 1 <= turns[name]["launches"] <= 3, name
    # The plain formulation, on the same counter: an order of magnitude more.
    assert turns["eager_generator"]["bytes_over_N"] > 50 and turns["eager_generator"]["launches"] > 20
    assert turns["eager_fake"]["bytes_over_N"] > 30 and turns["eager_fake"]["launches"] > 14


def test_cases_name_every_constant_of_their_kernels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.static import static_cases

    cases = static_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constants)
    assert [case.name for case in static_cases(ROOT / "kernels/ema_update.py")] == [
        case.name for case in cases if case.name.startswith("ema_update/")
    ]


BAD_KERNELS = """
import triton
import triton.language as tl
from tests.kernels.static_cases import StaticCase

@triton.jit
def scale_kernel(x, y, n, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    value = tl.load(x + element, mask=element < n)
    tl.store(y + element, value * tl.sum(value, axis=0), mask=element < n)

@triton.jit
def add_kernel(x, total, n, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + element, mask=element < n)))

def static_cases():
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    aligned = ("x", "y", "n")
    return [
        StaticCase("fine", scale_kernel, signature, {"BLOCK": 1024}, aligned),
        StaticCase("spilling", scale_kernel, signature, {"BLOCK": 32768}, aligned),
        StaticCase("narrow", scale_kernel, signature, {"BLOCK": 1024}, ("x", "n")),
        StaticCase(
            "atomic", add_kernel, {"x": "*fp32", "total": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 1024},
            ("x", "total", "n"), vector_pointers=False,
        ),
    ]
"""


def test_gate_fails_for_a_kernel_that_spills_for_narrow_accesses_and_for_atomics(tmp_path):
    kernels, file = tmp_path / "bad_kernels.py", tmp_path / "static.json"
    kernels.write_text(BAD_KERNELS)
    result = run("-m", "benchmarks.static", "--kernels", kernels, "--json", file, "--arch", 80, 90, 100)
    assert result.returncode == 1, result.stderr
    records = {(record["name"], record["arch"]): record for record in json.loads(file.read_text())["kernels"]}
    assert len(records) == 12
    for (name, _), record in records.items():
        assert (record["atomics"] != []) == (name == "atomic")
        if name == "atomic":
            continue
        # 32,768 elements on 128 threads: 256 live values a thread, more than the 255 registers it can have.
        assert (record["spill_bytes"] > 0) == (name == "spilling")
        assert record["accesses"] == {"x": 16, "y": 4 if name == "narrow" else 16}
    assert "spilling on sm_90: spills" in result.stdout
    assert "narrow on sm_90: narrowest argument moves 4 bytes" in result.stdout
    assert "atomic on sm_90: results depend on the order of threads, by atom." in result.stdout
    assert "fine on" not in result.stdout


def test_counter_of_torch_operations(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.traffic import TorchTraffic, Traffic

    a, b, half = torch.ones(64, 4), torch.ones(64, 4), torch.ones(64, 4, dtype=torch.bfloat16)
    row = torch.ones(64, 1)
    n = a.numel() * 4

    def cost(function):
        traffic = Traffic()
        with TorchTraffic(traffic, a.numel()):
            function()
        return traffic.bytes / n, traffic.launches

    assert cost(lambda: a + b) == (3, 1)
    assert cost(lambda: a * row) == (2, 1)
    assert cost(lambda: a.to(torch.bfloat16)) == (1.5, 1)
    assert cost(lambda: torch.mul(a, 2.0, out=half)) == (1.5, 1)
    assert cost(lambda: b.mul_(2.0)) == (2, 1)
    assert cost(lambda: b.copy_(a)) == (2, 1)
    assert cost(lambda: torch.randn_like(a)) == (1, 1)
    assert cost(lambda: a.sum(1)) == (1, 1)
    assert cost(lambda: (a.view(-1)[:5], a.t(), a.float(), torch.empty_like(a), row.expand(64, 4), row * 2)) == (0, 0)
    assert cost(lambda: (a * b.requires_grad_()).sum().backward()) == (3 + 1 + 2, 3)


COUNT_COPY = """
import torch, triton
import triton.language as tl
from benchmarks.traffic import Traffic, triton_traffic

@triton.jit
def twice_kernel(x, y, table, n, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + element, mask=element < n) * tl.load(table)
    value += tl.load(x + element, mask=element < n)
    tl.store(y + element, value.to(tl.bfloat16), mask=element < n)

x, y, table = torch.ones(100), torch.empty(100, dtype=torch.bfloat16), torch.ones(3)
traffic = Traffic()
with triton_traffic(traffic, 100):
    twice_kernel[(2,)](x, y, table, 100, 64)
assert torch.equal(y, torch.full_like(y, 2))
assert (traffic.bytes, traffic.launches) == (100 * (4 + 4 + 2), 1), traffic
"""


def test_counter_of_triton_kernels_sees_masks_and_second_reads(interpreted, tmp_path):
    file = tmp_path / "count_copy.py"  # the interpreter reads kernels' source
    file.write_text(COUNT_COPY)
    interpreted("import runpy, sys; runpy.run_path(sys.argv[1])", file)


def test_plain_turns_compute_what_the_kernels_compute(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import plain_kernels
    from benchmarks.traffic import BATCH, StandIn, random_images
    from rdmd_fast.diffusion import DiffusionOptions, Reading, coefficients
    from rdmd_fast.kernels.denoising_loss import denoising_gradient
    from rdmd_fast.kernels.noise_forward import CounterNoise
    from rdmd_fast.kernels.rdmd_gradient import generator_gradient

    networks = [StandIn(random_images(seed, torch.bfloat16)) for seed in (1, 2, 3)]
    generator, teacher, fake_score = networks
    x, sigma = random_images(4, torch.float32), torch.linspace(0.1, 2, BATCH)
    noise = CounterNoise(3, 5, torch.arange(BATCH))
    table = coefficients(sigma, DiffusionOptions())
    reading = Reading.of("teacher", DiffusionOptions(), 1.0)

    plain_kernels.generator_turn(generator, teacher, fake_score, x, sigma, 0.3, noise.values(x))
    expected, _ = generator_gradient(
        f_real=teacher.output, f_fake=fake_score.output, f_generator=generator.output, x=x,
        reading=reading, noise=noise, table=table, transport_weight=0.3,
    )  # fmt: skip
    torch.testing.assert_close(generator.received[0], expected, rtol=2e-2, atol=2e-2 * float(expected.std()))

    plain_kernels.fake_turn(fake_score, x, sigma, noise.values(x))
    expected, _ = denoising_gradient(fake_score.output, x, noise=noise, table=table)
    torch.testing.assert_close(fake_score.received[0], expected, rtol=2e-2, atol=2e-2 * float(expected.std()))
