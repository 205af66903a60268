"""benchmarks.step compares the same computation, and says so when it does not."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is no part of the package

from benchmarks.step import Ours, Plain, check_equal, run_config
from benchmarks.traffic import MATMULS, network_traffic


@pytest.fixture
def run_of(tmp_path):
    runs = []

    def build(case, dtype, *overrides):
        arguments = argparse.Namespace(case=case, batch=8, stage=0, compile=None)
        runs.append(Ours(run_config(case, dtype, arguments, tmp_path, overrides), arguments))
        runs[-1].iteration()  # so that fake score and teacher differ
        return runs[-1]

    yield build
    for run in runs:
        run.experiment.close()


@pytest.mark.parametrize("case,dtype", [("toy", "fp32"), ("toy", "bf16"), ("digits", "fp32")])
def test_both_sides_have_the_same_losses(run_of, case, dtype):
    ours = run_of(case, dtype)
    losses = check_equal(ours, Plain.like(ours, case, dtype, None), dtype)
    assert losses.keys() == {"score_gradient_square", "transport_cost", "fake_loss"}
    assert all(a > 0 for a, _ in losses.values())


def test_sides_that_differ_are_not_timed(run_of):
    ours = run_of("toy", "fp32")
    plain = Plain.like(ours, "toy", "fp32", None)
    plain.rdmd.sigma_data *= 1.1
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_equal(ours, plain, "fp32")


def test_ours_moves_fewer_bytes_outside_matrix_products(run_of):
    ours = run_of("digits", "bf16")
    plain = Plain.like(ours, "digits", "bf16", None)
    assert 2.5 * network_traffic(ours.iteration, MATMULS) < network_traffic(plain.iteration, MATMULS)
