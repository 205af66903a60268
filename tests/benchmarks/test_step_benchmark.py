"""benchmarks.step compares the same computation, and says so when it does not."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks import step
from benchmarks.roofline import product_rate, roofline
from benchmarks.step_sides import Plain, check_equal
from benchmarks.traffic import MATMULS, network_traffic
from rdmd_fast.config import load_config


@pytest.mark.parametrize("case,dtype", [("toy", "fp32"), ("toy", "bf16"), ("digits", "fp32"), ("digits", "bf16")])
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


def test_a_roofline_is_what_an_iteration_moves(step_run):
    """benchmarks.roofline puts bytes together from passes of one network and from parameters."""
    run = step_run("digits", "fp32")
    run.iteration()
    for process in (run.stage.generator_process, run.stage.fake_process):
        # A GPU draws noise inside kernels.
        drawn = process.draw(run.stage.context.layout.positions(8, 0), 0)
        process.draw = lambda *_, drawn=drawn: drawn
    counted = roofline(load_config("configs/digits/rdmd_2to3.yaml"), (3, 8, 8))
    moved = 8 * counted.bytes_a_sample + counted.fixed
    assert network_traffic(run.iteration, MATMULS) == pytest.approx(moved, rel=0.01)
    assert counted.floor(8, 2e9, 4e6) == pytest.approx(8 * counted.flops_a_sample / 2e9 + moved / 4e6)


@pytest.mark.parametrize(
    ("train", "rate"), [([], 494e12), (["train.tf32=false"], 67e12), (["train.dtype=bf16", "train.tf32=false"], 989e12)]
)
def test_a_floor_has_the_rate_of_the_products_that_a_run_computes(train, rate):
    config = load_config("configs/digits/rdmd_2to3.yaml", train)
    assert config.train.dtype == ("bf16" if "train.dtype=bf16" in train else "fp32")
    assert product_rate(config.train, (67, 494, 989)) == rate


def test_results_have_both_sides_and_a_picture(tmp_path, monkeypatch, capsys):
    file = tmp_path / "toy.json"
    command = ["step", "--case", "toy", "--dtype", "fp32", "--batch", "8", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(step, "DTYPES", ["fp32"])  # products of 16 bits are slow on a CPU
    assert step.main() == 0
    [entry] = json.loads(file.read_text())
    assert entry["case"] == "toy" and entry["dtype"] == "fp32" and entry["device"]
    assert entry["plain_fp32"] == entry["plain"]
    for side in ("ours", "plain"):
        assert {"images_per_second", "mfu", "peak_bytes", "host_syncs", "launches"} <= entry[side].keys()
        assert entry[side]["images_per_second"] == pytest.approx(8 / entry[side]["seconds"])
        assert entry[side]["mfu"] * entry[side]["seconds"] * entry["matmul_peak"] == pytest.approx(entry["flops"])
    assert entry["ours"]["host_syncs"] == 0 < entry["plain"]["host_syncs"]
    assert entry["ratio"] == pytest.approx(entry["plain"]["seconds"] / entry["ours"]["seconds"])
    assert f"ours {entry['ratio']:.2f} times plain" in capsys.readouterr().out
    assert Image.open(file.with_suffix(".png")).size[0] > 100
    monkeypatch.setattr(sys, "argv", ["step", "--draw", str(tmp_path / "both.png"), str(file), str(file)])
    assert step.main() == 0
    assert Image.open(tmp_path / "both.png").size[1] > Image.open(file.with_suffix(".png")).size[1]
