"""A whole study, tiny: teachers of two steps, 16 channels, a few held-out digits."""

import argparse
import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from rdmd_fast.commands import pack
from rdmd_fast.commands.figures import run_pack
from rdmd_fast.data.packing.pack_sets import pack_sets
from rdmd_fast.data.packing.sources.generated import digit_sets
from rdmd_fast.errors import InputError
from rdmd_fast.figures import conditional, tradeoff
from rdmd_fast.figures.comparison import settings_of
from rdmd_fast.studies.options import FigureOptions, load_study
from rdmd_fast.studies.study_runs import StudyRuns

DIGITS = Path(__file__).parents[2] / "configs/digits"
NETWORK = "{kind: song_unet, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: []}"
QUIET = ["train.steps=2", "train.global_batch_size=8", "checkpoint.every=0", "telemetry.sample_every=0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The two digits of the study, and no others for the judge to tell them from."""
    folder = tmp_path_factory.mktemp("digits")
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    arguments = parser.parse_args(["digits", "--out", str(folder), "--hues", "1", "--workers", "1"])
    pack_sets([each for each in digit_sets(arguments) if each.folder[0] in "23"], "rdmd pack digits", arguments)
    return folder


@pytest.fixture(scope="module")
def study_values(shards, tmp_path_factory):
    features = str(tmp_path_factory.mktemp("features") / "mean.pt")
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())).save(features)
    teacher = {"config": str(DIGITS / "teacher_3.yaml"), "overrides": [*QUIET, f"network={NETWORK}"]}

    def domain(digit):
        return {split: str(shards / str(digit) / split) for split in ("train", "test")}

    return {
        "source": domain(2),
        "target": domain(3),
        "judge": str(shards),
        "judge_label": 3,
        "features": features,
        "held_out": 20,
        "batch_size": 8,
        "teachers": {"target": teacher, "source": teacher},
        "rdmd": {
            "config": str(DIGITS / "rdmd_2to3.yaml"),
            "overrides": [*QUIET, "validation.every=0"],
            "transport_weights": [0.1, 1.0],
        },
        "conditioned": {
            "config": str(DIGITS / "rdmd_2to3.yaml"),
            "overrides": [*QUIET, "validation.every=0", "rdmd.transport_weight={log_uniform: [0.05, 2]}"],
            "transport_weights": [0.1],
        },
        "energy": {"steps": 2, "batch_size": 4, "network": {"model_channels": 8, "channel_mult": [1]}},
        "baselines": [
            {"method": "sdedit", "sigma0": 0.5, "steps": 2},
            {"method": "egsde", "sigma0": 0.5, "steps": 2},
            {"method": "ddib", "sigma0": 0.5, "steps": 2},
        ],
    }


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_both_figures_of_a_study(computed, study_values, out, tmp_path):
    options = FigureOptions(seeds=1, jobs=1, study=write(tmp_path / "study.yaml", study_values), pack=run_pack)
    made = tradeoff.make(out, options)
    rows = read_csv(out / "tradeoff.csv")
    evaluations = {row["method"]: float(row["evaluations"]) for row in rows}
    assert evaluations == {
        "RDMD": 1, "identity": 0, "untrained generator": 1, "SDEdit": 2, "EGSDE": 2, "DDIB": 5
    }  # fmt: skip
    assert sum(row["method"] == "RDMD" for row in rows) == 2
    identity = next(row for row in made["rows"] if row["method"] == "identity")
    assert identity["l2"] == 0 and identity["ssim"] == pytest.approx(1) and identity["psnr"] is None
    for row in rows:
        assert {"share_3nn", "frechet", "l2", "mse_per_pixel", "ssim", "seconds_per_image"} <= {
            k for k, v in row.items() if v
        }
    assert made["text"].count("against 2 of RDMD") == 3
    assert (out / "tradeoff.txt").read_text().strip() == made["text"]
    for name in ("tradeoff.png", "tradeoff_samples.png"):
        assert Image.open(out / name).width > 100
    # Teachers and energy once each, generators, and a measurement of each row.
    assert len(computed) == 2 + 1 + 2 + len(rows)

    records = [json.loads(path.read_text()) for path in (out / "points").glob("*/point.json")]
    assert len(records) == len(computed)
    assert all(str(out) not in json.dumps(record["settings"]) for record in records)  # a study can be moved

    computed.clear()
    found = conditional.make(out, options)
    # The generator of the same λ is shared: training and measurement are of the other figure.
    assert sorted(name.partition("-seed")[0] for name in computed) == [
        "conditioned", "measure-rdmd-one-generator-lambda-0.1"
    ]  # fmt: skip
    assert {line["metric"] for line in found["table"]} == {"share_3nn", "frechet", "fid", "kid", "l2"}
    assert found["cost"]["runs"] == 1 and Image.open(out / "lambda.png").width > 100

    computed.clear()
    assert tradeoff.make(out, options)["rows"] == made["rows"]
    assert computed == []

    # Without a judge quality is FID.
    study = load_study(options.study, ["judge=null"])
    tradeoff.draw(settings_of(made["rows"]), study, tmp_path / "fid.png")
    assert (tmp_path / "fid.png").read_bytes() != (out / "tradeoff.png").read_bytes()
    assert "FID" in tradeoff.in_words(settings_of(made["rows"]), study.quality, 1)


def test_another_teacher_makes_new_points(study_values, out, tmp_path):
    runs = StudyRuns(out, FigureOptions(1, 1, write(tmp_path / "study.yaml", study_values), run_pack))
    folders = []
    for digest in ("a", "b"):
        runs._teachers = {"target": {"path": "teacher", "sha256": digest}, "source": {"path": "x", "sha256": "y"}}
        candidate = runs.baselines_of({"point": "energy", "sha256": "z"})[0]
        folders.append(runs._measuring_point(candidate).folder(out))
    assert folders[0] != folders[1]


@pytest.mark.parametrize("change, line", [
    ({"rdmd": {"config": str(DIGITS / "teacher_3.yaml"), "transport_weights": [1]}}, "is of stage teacher, not rdmd"),
    ({"source": {"train": "nowhere/train", "test": "nowhere/test"}}, "nowhere/train: no such shards, make them with"),
    ({"conditioned": None}, "conditioned: missing, name the generator for all λ"),
])  # fmt: skip
def test_bad_studies_are_one_line(computed, study_values, out, tmp_path, change, line):
    path = write(tmp_path / "study.yaml", study_values | {"conditioned": None} | change)
    figure = conditional if change == {"conditioned": None} else tradeoff
    with pytest.raises(InputError, match=rf"^study {path}: .*{line}"):
        figure.make(out, FigureOptions(1, 1, path, run_pack))
