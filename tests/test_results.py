"""The results that the README states, remade from nothing; minutes long (`make test-slow`)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rdmd_fast import cli, load_denoiser
from rdmd_fast.metrics.judges import DigitJudge
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.samplers import heun_sample, karras_levels
from rdmd_fast.trainer import main

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Shards and the demo's teacher."""
    folder = tmp_path_factory.mktemp("digits")
    assert cli.main(["pack", "digits", "--out", str(folder / "shards")]) == 0
    arguments = [f"run_dir={folder}/teacher", f"data.target={folder}/shards/3/train"]
    assert main(["--config", str(CONFIGS / "digits/teacher_3.yaml"), *arguments]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_of_the_teacher_are_its_digit(digits, seed):
    judge, denoiser = DigitJudge(digits / "shards"), load_denoiser(digits / "teacher/export")
    noise = Philox(seed).normal(Stream.SAMPLER, torch.arange(512), (3, 8, 8))
    labels = judge.knn_labels(heun_sample(denoiser, noise, karras_levels(18)))
    assert np.mean(labels == 3) >= 0.98


@pytest.fixture(scope="module")
def reports(digits):
    """Report rows of three distillations, by name."""
    found = []
    for seed in range(3):
        run, shards = digits / f"rdmd_{seed}", digits / "shards"
        arguments = [
            f"run_dir={run}", f"seed={seed}", f"teacher={digits}/teacher/export", f"data.source={shards}/2/train",
            f"data.source_holdout={shards}/2/test", f"data.target_holdout={shards}/3/test", "validation.judge=null",
            "validation.every=0",
        ]  # fmt: skip
        assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments]) == 0
        evaluate = ["--model", f"{run}/export", "--teacher", f"{digits}/teacher/export", "--source", f"{shards}/2/test"]
        evaluate += [
            "--target", f"{shards}/3/test", "--judge", str(shards), "--label", "3", "--out", f"{run}/report.json",
        ]  # fmt: skip
        assert cli.main(["evaluate", *evaluate]) == 0
        rows = json.loads((run / "report.json").read_text())["rows"]
        found.append({row["name"].split()[0]: row for row in rows})
    return found


@pytest.mark.slow
def test_digits_become_threes_of_the_same_colour(reports):
    for rows in reports:
        assert rows["RDMD"]["images"] >= 280
        assert rows["RDMD"]["share_3nn"] >= 0.96
        assert rows["RDMD"]["colour_cosine"] >= 0.96
        assert rows["identity"]["share_3nn"] < 0.1


@pytest.mark.slow
def test_distillation_comes_closer_to_the_target_than_the_untrained_generator(reports):
    trained = np.array([rows["RDMD"]["frechet"] for rows in reports])
    untrained = np.array([rows["untrained"]["frechet"] for rows in reports])
    assert trained.max() < 0.8 * untrained.min()


@pytest.mark.slow
def test_transport_cost_falls_as_its_weight_rises(tmp_path):
    reports = []
    for weight in (0.02, 0.1, 0.5):
        run = tmp_path / str(weight)
        arguments = [
            f"run_dir={run}",
            f"rdmd.transport_weight={weight}",
            "validation.every=0",
            "telemetry.sample_every=0",
        ]
        assert main(["--config", str(CONFIGS / "toy/gaussian_to_8gaussians.yaml"), *arguments]) == 0
        lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        reports.append(lines[-1]["validation"])
    costs = [report["transport_cost"] for report in reports]
    assert costs[0] > costs[1] > costs[2]
    for report, tolerance in zip(reports, (0.15, 0.06, 0.01), strict=True):
        # Theorem 3.1: whatever λ, the map is the optimal one onto its own outputs; a small λ gets there slowly.
        assert report["transport_cost"] == pytest.approx(report["ot_cost_to_output"], rel=tolerance)
    assert reports[1]["squared_w2"] < 2 * reports[1]["noise_floor"]
