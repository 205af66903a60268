"""train.compile: the same training, up to rounding."""

import json

import pytest
import torch
import yaml

from rdmd_fast.config import validate_config
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks.mlp import MLP
from rdmd_fast.networks.options import MLPOptions
from rdmd_fast.trainer import main


@pytest.mark.slow  # a minute of compiling
@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_networks_train_alike(tmp_path, stage):
    lines = {}
    for mode in ("null", "default"):
        folder = tmp_path / mode
        status = main([
            "--config", "configs/toy/gaussian_to_8gaussians.yaml", f"run_dir={folder}", f"train.compile={mode}",
            "train.steps=12", "rdmd.fake_warmup=3", "train.global_batch_size=64", "telemetry.log_every=4",
            "telemetry.sample_every=0", "validation.every=0", "validation.count=64",
            f"deepspeed.zero_optimization.stage={stage}",
        ])  # fmt: skip
        assert status == 0
        lines[mode] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for plain, compiled in zip(*lines.values(), strict=True):
        for name in ("fake_loss", "transport_cost", "score_gradient_rms"):
            assert (name in compiled) == (name in plain) == ("validation" not in plain)
            assert compiled.get(name, 0) == pytest.approx(plain.get(name, 0), rel=1e-4)


def test_stage_that_shards_weights_is_refused():
    values = {"stage": "teacher", "run_dir": "r", "data": {"target": {"toy": "circles"}}, "network": {"kind": "mlp"}}
    values |= {"train": {"compile": "default"}, "deepspeed": {"zero_optimization": {"stage": 3}}}
    with pytest.raises(InputError, match=r"train\.compile: ZeRO 3"):
        validate_config(values, "case")


def test_every_network_of_a_run_is_compiled(tmp_path, monkeypatch):
    """G, the fake score and the teacher, in place; CUDA graphs learn of every iteration."""
    compiled, marks = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, mode: compiled.append((type(network), mode)))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    options = MLPOptions(kind="mlp", hidden=8, depth=1)
    export = ExportConfig(role="teacher", network=options, sample_shape=[2], diffusion=DiffusionOptions())
    write_export(tmp_path / "teacher", export, MLP(hidden=8, depth=1).state_dict())
    values = {
        "stage": "rdmd", "run_dir": str(tmp_path / "run"), "teacher": str(tmp_path / "teacher"),
        "data": {"source": {"toy": "gaussian"}, "target": {"toy": "circles"}}, "validation": {"count": 16},
        "train": {"steps": 3, "global_batch_size": 4, "compile": "reduce-overhead"},
        "telemetry": {"sample_every": 0, "tensorboard": False}, "checkpoint": {"every": 0},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert compiled == [(MLP, "reduce-overhead")] * 3
    assert len(marks) == 3
