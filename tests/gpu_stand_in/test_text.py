"""Distillation from a text-to-image pipeline by adapters: one iteration on the stand-in beside the CPU."""

import json

import pytest
import yaml
from text_pipelines import pipeline_and_latents

from benchmarks.step_sides import Ours
from rdmd_fast.config import load_config
from tests.gpu_stand_in.child import run
from tests.gpu_stand_in.iteration import BEFORE
from tests.gpu_stand_in.log import WAIT


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
def test_an_iteration_waits_for_nothing_and_is_that_of_the_cpu(tmp_path):
    folder = pipeline_and_latents(tmp_path)
    values = {
        "stage": "rdmd", "run_dir": str(folder / "run"), "teacher": str(folder / "pipeline"),
        "data": {"source": str(folder / "shards")}, "teacher_prompt": "a lion", "lora": {"rank": 2, "targets": "all"},
        "train": {"steps": 1_000_000, "global_batch_size": 2}, "rdmd": {"weighting": "sigma2"},
        "telemetry": {"log_every": 1_000_000, "tensorboard": False},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    said = json.loads(run("-m", "tests.gpu_stand_in.iteration", "--config", path).splitlines()[-1])
    ours = Ours(load_config(str(path)))
    for _ in range(BEFORE + 1):
        ours.iteration()
    assert said["losses"] == pytest.approx(ours.means(), rel=1e-4)
    ours.experiment.close()
    assert said[WAIT] == {}
