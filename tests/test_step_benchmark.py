"""benchmarks.step compares the same computation, and says so when it does not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is no part of the package

from benchmarks.step import Plain, check_equal
from benchmarks.traffic import MATMULS, network_traffic


@pytest.mark.parametrize("case,dtype", [("toy", "fp32"), ("toy", "bf16"), ("digits", "fp32")])
def test_both_sides_have_the_same_losses(step_run, case, dtype):
    ours = step_run(case, dtype)
    ours.iteration()  # so that fake score and teacher differ
    losses = check_equal(ours, Plain.like(ours, case, dtype, None), dtype)
    assert losses.keys() == {
        "score_gradient_square", "transport_cost", "fake_loss", "generator_norm", "fake_norm",
    }  # fmt: skip
    assert all(a > 0 for a, _ in losses.values())


def test_sides_that_differ_are_not_timed(step_run):
    ours = step_run("toy", "fp32")
    ours.iteration()
    plain = Plain.like(ours, "toy", "fp32", None)
    plain.rdmd.sigma_data *= 1.1
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_equal(ours, plain, "fp32")


def test_ours_moves_fewer_bytes_outside_matrix_products(step_run):
    ours = step_run("digits", "bf16")
    ours.iteration()  # what is made once is made
    plain = Plain.like(ours, "digits", "bf16", None)
    assert 2.5 * network_traffic(ours.iteration, MATMULS) < network_traffic(plain.iteration, MATMULS)
