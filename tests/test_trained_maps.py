"""The trained map against the closed form (arXiv 2406.14762, Theorem 3.1; Gaussian case)."""

import json
from pathlib import Path

import pytest

from rdmd_fast.trainer import main

SLOW = pytest.mark.slow
CONFIG = str(Path(__file__).parent.parent / "configs/toy/gaussian_to_gaussian.yaml")


def train(tmp_path, *overrides):
    """Validation line of a run of the shipped config."""
    arguments = ["--config", CONFIG, f"run_dir={tmp_path}/run", "validation.every=0", "telemetry.tensorboard=false"]
    assert main([*arguments, *overrides]) == 0
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    return lines[-1]["validation"]


# With both scores exact only Monte Carlo error remains; the rate falls to 0 and the EMA averages what is left.
EXACT = (
    "rdmd.fake_score=closed_form",
    "rdmd.generator_optimizer.lr=1e-2",
    "rdmd.generator_optimizer.betas=[0.9,0.99]",
    "rdmd.ema.half_life=200000",
    "train.global_batch_size=2048",
)


@pytest.mark.parametrize("weight", [pytest.param(0.05, marks=SLOW), 0.2, pytest.param(1.0, marks=SLOW)])
@pytest.mark.parametrize("weighting", ["uniform", "sigma2"])
def test_exact_scores_reach_the_closed_form_optimum(tmp_path, weighting, weight):
    found = train(tmp_path, *EXACT, f"rdmd.weighting={weighting}", f"rdmd.transport_weight={weight}", "train.steps=600")
    assert found["scale"] == pytest.approx(found["axis_scale_0_expected"], rel=3e-3)
    assert abs(found["rotation_degrees"]) < 0.3


def test_anisotropic_target_reaches_the_optimum_of_each_axis(tmp_path):
    found = train(tmp_path, *EXACT, "data.target.std=[2.0,0.5]", "data.target.rotation=30", "train.steps=600")
    assert found["axis_scale_0"] == pytest.approx(found["axis_scale_0_expected"], rel=3e-3)
    assert found["axis_scale_1"] == pytest.approx(found["axis_scale_1_expected"], rel=5e-3)
    assert found["axis_scale_0_expected"] > 1.5 and found["axis_scale_1_expected"] < 0.8


def test_without_transport_cost_every_rotation_is_optimal_and_stays(tmp_path):
    found = train(
        tmp_path, *EXACT, "rdmd.transport_weight=0", "generator.angle=40", "generator.scale=0.8", "train.steps=600"
    )
    assert found["scale"] == pytest.approx(1.5, rel=1e-2)
    assert found["rotation_degrees"] == pytest.approx(40, abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weight", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("weighting", ["uniform", "sigma2"])
def test_learned_fake_score_reaches_the_closed_form_optimum(tmp_path, weighting, weight, seed):
    found = train(tmp_path, f"rdmd.weighting={weighting}", f"rdmd.transport_weight={weight}", f"seed={seed}")
    assert found["scale"] == pytest.approx(found["axis_scale_0_expected"], rel=1e-2)
    assert abs(found["rotation_degrees"]) < 1


@pytest.mark.slow
@pytest.mark.parametrize("angle", [0, 40])
def test_learned_fake_score_without_transport_cost_reaches_the_target_scale(tmp_path, angle):
    found = train(tmp_path, "rdmd.transport_weight=0", f"generator.angle={angle}")
    assert found["scale"] == pytest.approx(1.5, rel=1e-2)
