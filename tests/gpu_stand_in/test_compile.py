"""torch.compile: what Inductor makes of our networks for sm_90 computes what they compute as written."""

import json

import pytest

from tests.gpu_stand_in.child import run, run_cases
from tests.gpu_stand_in.instructions_used import instructions_in_tests

pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.timeout(900)]

# Relative. fp32: sums of some thousand numbers in another order; 1e-6 is found. bf16: fused operations do not round
# what is between them, 2^-9 each time.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_compiled_iteration_equals_the_written_one(dtype):
    command = ["-m", "tests.gpu_stand_in.iteration", "--stage", "0", "--dtype", dtype, "--before", "1"]
    written, compiled = (json.loads(run(*command, *more).splitlines()[-1]) for more in ([], ["train.compile=default"]))
    assert compiled["launch"] != written["launch"] and not compiled["wait"]
    check_alike(written, compiled, TOLERANCE[dtype])


def check_alike(written: dict, compiled: dict, tolerance: float) -> None:
    assert set(written["losses"]) == set(compiled["losses"])
    for what in ("losses", "norms"):
        for name, expected in written[what].items():
            assert expected and compiled[what][name] == pytest.approx(expected, rel=tolerance), name


@pytest.mark.slow
def test_an_iteration_that_replays_graphs_equals_the_written_one_and_records_nothing_twice():
    """Of two fake updates; what an update would read of one before it is NaN."""
    command = ["-m", "tests.gpu_stand_in.iteration", "--dtype", "fp32", "--before", "1", "rdmd.fake_updates=2"]
    written, replayed = (
        json.loads(run(*command, *more).splitlines()[-1]) for more in ([], ["train.compile=reduce-overhead"])
    )
    check_alike(written, replayed, TOLERANCE["fp32"])
    assert replayed["recorded"] == {"before": 7, "within": 0}


def test_compiled_operations_equal_the_written_ones():
    assert "passed" in run_cases("compile_cases.py")


def compiled_pass(*arguments: str) -> dict:
    return json.loads(run("-m", "tests.gpu_stand_in.compiled", *arguments).splitlines()[-1])


@pytest.mark.parametrize(
    ("network", "dtype", "options"),
    [
        ("song_unet", "fp32", ["--deterministic"]), ("diffusers_unet", "fp32", ["--deterministic"]),
        ("diffusers_unet", "bf16", []),
    ],
)  # fmt: skip
def test_compiled_networks_equal_the_written_ones_and_have_no_atomics(network, dtype, options):
    found = compiled_pass(network, "--dtype", dtype, *options)  # kernels with atomics are refused
    assert max(found["differences"]) < TOLERANCE[dtype]
    used = {name for name in found["instructions"] if "." in name}
    assert len(used) > 80
    assert not used - instructions_in_tests(), f"test_ptx.py has no {sorted(used - instructions_in_tests())}"


def test_the_plain_way_to_repeat_pixels_would_have_atomics():
    with pytest.raises(AssertionError, match=r"atom\.global\.\S*add\.f32.*: atomics make results depend on the order"):
        compiled_pass("diffusers_unet", "--interpolate")
