import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdmd_fast import cli
from rdmd_fast.commands.sweep import add_arguments, numbers, plan
from rdmd_fast.errors import InputError
from rdmd_fast.studies.recommendation import advise
from rdmd_fast.studies.sweep_jobs import default_sigmas, default_weights, measure_references

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "configs/toy/gaussian_to_gaussian.yaml")
TINY = ["validation.count=30", "rdmd.fake_warmup=0", "checkpoint.every=0"]


def grid_of(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return plan(parser.parse_args(["--out", "unused", *arguments]))


def test_a_sweep_of_a_toy(computed, tmp_path, capsys):
    command = ["sweep", "--config", TOY, "--out", str(tmp_path), "--steps", "2", *TINY, "--transport-weight"]
    assert cli.main([*command, "0.1", "1"]) == 0
    assert computed == ["reference", "lambda-0.1-sigma-1", "lambda-1-sigma-1"]
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["transport_weight"] for row in report["rows"]] == [0.1, 1.0]
    assert all(row["steps"] == 2 and row["squared_w2"] > 0 for row in report["rows"])
    assert report["references"]["floor"] == report["rows"][0]["noise_floor"]
    said = capsys.readouterr().out
    assert report["recommendation"]["reason"] in said
    header = next(line for line in said.splitlines() if line.startswith("transport_weight"))
    assert "squared_w2" in header and "noise_floor" not in header  # which is the same for all
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3
    assert Image.open(tmp_path / "sweep.png").width > 100
    outputs = [np.load(path) for path in sorted(tmp_path.glob("points/lambda-*/samples.npy"))]
    assert len(outputs) == 2 and not np.array_equal(*outputs)

    computed.clear()
    assert cli.main([*command, "3", "1", "0.1"]) == 0
    assert computed == ["lambda-3-sigma-1"]


def test_the_grid():
    grid = grid_of(
        "--config", TOY, "--transport-weight", "1", "0.5", "train.global_batch_size=16", "--generator-sigma", "2"
    )
    assert [(each.transport_weight, each.generator_sigma) for each in grid] == [(1.0, 2.0), (0.5, 2.0)]
    assert all(each.config.train.global_batch_size == 16 for each in grid)
    assert [each.config.rdmd.transport_weight for each in grid] == [1.0, 0.5]
    own = grid[0].config
    assert default_weights(own) == [0.25, 1.0, 4.0]
    assert default_sigmas(own) == [2.0]  # its generator is no copy of a teacher's network
    assert grid[0].config.train.steps == 400  # a tenth


def test_without_held_out_data_nothing_is_recommended():
    chosen, reason = advise([{"transport_weight": 1.0, "generator_sigma": 1.0}], {})
    assert chosen is None and "data.source_holdout and data.target_holdout" in reason


def test_references_of_images(tmp_path):
    for name, grey in (("source", 0), ("target", 255)):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(tmp_path / name / f"{index}.png")
        packing = ["pack", str(tmp_path / name), "--out", str(tmp_path / "shards" / name), "--resolution", "8"]
        assert cli.main(packing) == 0
    shards = {name: str(tmp_path / "shards" / name) for name in ("source", "target")}
    config = {
        "stage": "rdmd",
        "data": {"source": shards["source"], "source_holdout": shards["source"], "target_holdout": shards["target"]},
    }
    references = measure_references(tmp_path, {"config": config})
    assert references["best_by"] == "sliced_w2" and references["floor"] == 0
    # From -1 to 1 in every element; along 128 random directions the mean square is 4 within a few percent.
    assert references["untouched"] == pytest.approx(2, rel=0.2)
    del config["data"]["target_holdout"]
    assert measure_references(tmp_path, {"config": config}) == {}


def test_a_faithfulness_is_no_distance():
    rows = [{"transport_weight": 1.0, "generator_sigma": 1.0, "l2": 1.0}]
    chosen, reason = advise(rows, {"best_by": "l2", "untouched": 0.0, "floor": 0.0})
    assert chosen is None and "validation.best_by: l2" in reason


def test_images_are_advised_by_their_distance():
    rows = [
        {"transport_weight": weight, "generator_sigma": 1.0, "frechet": frechet, "l2": l2}
        for weight, frechet, l2 in ((0.1, 2.0, 5.0), (1.0, 3.0, 4.0), (9.0, 50.0, 1.0))
    ]
    chosen, _ = advise(rows, {"best_by": "frechet", "untouched": 70.0, "floor": 1.0})
    assert chosen.transport_weight == 1.0 and chosen.cost == 4.0


@pytest.mark.parametrize("arguments, line", [
    (["--transport-weight", "much"], "--transport-weight much: not a number"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["rdmd.transport_weight={log_uniform: [0.1, 1]}"], "rdmd.transport_weight: the generator is for a range of λ"),
])  # fmt: skip
def test_bad_options_are_one_line(arguments, line):
    with pytest.raises(InputError, match=f"^{line}"):
        grid_of("--config", TOY.replace("to_gaussian", "to_8gaussians"), *arguments)


def test_a_teacher_config_is_refused():
    with pytest.raises(InputError, match="is of stage teacher, a sweep is over the rdmd stage"):
        grid_of("--config", str(ROOT / "configs/digits/teacher_3.yaml"))
    with pytest.raises(InputError, match=r"^runs/nowhere: no such file"):
        grid_of("--config", str(ROOT / "configs/digits/rdmd_2to3.yaml"), "teacher=runs/nowhere")


def test_numbers_and_overrides():
    assert numbers("--x", ["1", "2e-1", "a.b=3", "1"]) == ([1.0, 0.2], ["a.b=3"])
