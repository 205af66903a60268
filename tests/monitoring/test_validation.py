"""Validation on held-out samples, and what stands in without any."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rdmd_fast.cli import main as rdmd
from rdmd_fast.config import load_config
from rdmd_fast.errors import InputError
from rdmd_fast.metrics.exact_transport import squared_w2
from rdmd_fast.monitoring.validation import PointsValidator, ToyValidator, ValidationOptions, open_validation
from rdmd_fast.processes.world import World
from rdmd_fast.trainer import main


def test_points_are_compared_with_one_half_of_the_targets_and_the_other():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(50, 2, generator=generator), torch.randn(61, 2, generator=generator) + 3
    validator = PointsValidator(ValidationOptions(), source, target)
    found = validator.measure(lambda x: x + 1)
    assert found["samples"] == found["target_samples"] == 30
    assert found["transport_cost"] == pytest.approx(2.0)
    assert found["squared_w2"] == pytest.approx(squared_w2(source[:30] + 1, target[:30]))
    assert found["noise_floor"] == pytest.approx(squared_w2(target[:30], target[30:60]))
    assert validator.best_by == "squared_w2"
    with pytest.raises(InputError, match="50 held-out sources and 3 targets"):
        PointsValidator(ValidationOptions(), source, target[:3])


def test_toys_are_measured_by_fresh_points_and_shards_without_held_out_ones_only_pictured():
    world = World(0, 1, torch.device("cpu"))
    toys = load_config(Path(__file__).parents[2] / "configs/toy/gaussian_to_gaussian.yaml", ["validation.count=20"])
    validation = open_validation(toys, world, None, None)
    assert isinstance(validation.points, ToyValidator) and validation.best_by == "squared_w2" and validation.measure
    assert validation.held_out_sources.shape == (20, 2)

    images = toys.model_copy(update={"data": toys.data.model_copy(update={"source": "shards"})})
    validation = open_validation(images, world, None, SimpleNamespace(batch=lambda at: torch.ones(len(at), 3, 8, 8)))
    assert (validation.points, validation.measure, validation.best_by) == (None, None, None)
    assert validation.held_out_sources.shape == (images.telemetry.sample_count, 3, 8, 8)


def test_packed_points_train_a_teacher_and_a_map_that_is_measured(tmp_path, monkeypatch):
    """The presets of the paper's 2-D budget, a few iterations of each, from shards packed as they say."""
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).parents[2] / "configs/toy"
    for name, options, folders in (
        ("gaussian", [], ("0", "1")),
        ("8gaussians", ["--scale", "2", "--std", "0.2"], ("2", "3")),
    ):
        for split, seed in zip(("train", "test"), folders, strict=True):
            words = [f"toy:{name}", *options, "--count", "64", "--seed", seed, "--out", f"shards/toy/{name}/{split}"]
            assert rdmd(["pack", *words]) == 0
    short = ["train.steps=2", "train.global_batch_size=32", "telemetry.tensorboard=false"]
    assert main(["--config", f"{folder}/paper_teacher_8gaussians.yaml", *short]) == 0
    assert main(["--config", f"{folder}/paper_rdmd_8gaussians.yaml", *short]) == 0
    run = Path("runs/toy/paper_rdmd_8gaussians")
    found = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    assert found["samples"] == found["target_samples"] == 32
    assert np.isfinite(list(found.values())).all() and found["transport_cost"] > 0
    assert (run / "samples/final.png").is_file()
