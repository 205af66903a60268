"""What an earlier commit wrote is read as it was: fixtures/version_0_1_099ac61, made by commit 099ac61.

shards: `rdmd pack photos --out shards --resolution 8 --labels`; teacher, run: `train.py --config teacher.yaml`, then
rdmd.yaml; outputs.safetensors: what that commit's load_generator, load_denoiser and streams gave.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rdmd_fast import load_denoiser, load_generator
from rdmd_fast.data.options import DataOptions
from rdmd_fast.data.stream import open_stream
from rdmd_fast.monitoring.telemetry import TIME_KEYS
from rdmd_fast.randomness import Philox
from rdmd_fast.trainer import main

FIXTURES = Path(__file__).parent / "fixtures/version_0_1_099ac61"


@pytest.fixture(scope="module")
def outputs():
    return load_file(FIXTURES / "outputs.safetensors")


def test_exports_compute_what_they_did(outputs):
    generated = load_generator(FIXTURES / "run/export")(outputs["x"])
    denoised = load_denoiser(FIXTURES / "teacher/export")(outputs["x"], 0.5, torch.tensor([0, 1]))
    torch.testing.assert_close(generated, outputs["generated"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(denoised, outputs["denoised"], rtol=1e-5, atol=1e-6)


def test_shards_give_the_same_samples_in_the_same_order(outputs):
    options = DataOptions(source=str(FIXTURES / "shards"))
    stream = open_stream(options.source, Philox(0), "source", options)
    positions = torch.arange(12)
    assert torch.equal(stream.batch(positions), outputs["batch"])
    assert torch.equal(stream.labels(positions), outputs["labels"])


def test_a_run_goes_on_from_its_checkpoint_to_the_same_end(tmp_path, monkeypatch, capsys):
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.move("run", "whole")
    shutil.copytree("whole", "run", ignore=shutil.ignore_patterns("export"))
    assert main(["--config", "rdmd.yaml"]) == 0
    assert "resumed run/checkpoints/step_00000002 at step 2" in capsys.readouterr().out
    weights = [load_file(f"{folder}/export/generator.safetensors") for folder in ("whole", "run")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():  # on another CPU sums are rounded otherwise
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)
    lines = [
        [json.loads(text) for text in Path(folder, "metrics.jsonl").read_text().splitlines()]
        for folder in ("whole", "run")
    ]
    whole, resumed = ([{key: line[key] for key in line if key not in TIME_KEYS} for line in each] for each in lines)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for line, expected in zip(resumed, whole, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
