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


class Overwriting:
    """Stands in for CUDA graphs: what compiled networks gave before a mark is NaN after it, as are their gradients.

    Attributes:
        compiled: (network, mode) in order.
        events: calls as the networks' ``names``, a letter each in that order; marks as spaces.
    """

    def __init__(self, monkeypatch, names="GFT"):  # the generator, the fake score, the teacher
        self.names = names
        self.compiled, self.events, self._given = [], "", []
        monkeypatch.setattr(torch.nn.Module, "compile", lambda network, mode: self.compile(network, mode))
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.mark)

    def compile(self, network, mode):
        name = self.names[len(self.compiled)]
        self.compiled.append((network, mode))

        def call(*inputs, **options):
            output = network._call_impl(*inputs, **options)
            self.events += name
            self._given.append(output.data)
            return output

        network._compiled_call_impl = call

    def mark(self):
        gradients = [p.grad for network, _ in self.compiled for p in network.parameters() if p.grad is not None]
        for tensor in self._given + gradients:
            tensor.fill_(torch.nan)
        self._given.clear()
        self.events += " "


@pytest.fixture
def distill(tmp_path):
    """``distill(name, **train)`` distils a small teacher, five fake updates an iteration; returns lines of metrics."""
    torch.manual_seed(0)
    teacher = MLP(hidden=8, depth=1)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the last layer begins at zero
    options = MLPOptions(kind="mlp", hidden=8, depth=1)
    export = ExportConfig(role="teacher", network=options, sample_shape=[2], diffusion=DiffusionOptions())
    write_export(tmp_path / "teacher", export, teacher.state_dict())

    def run(name, stage=0, **train):
        values = {
            "stage": "rdmd", "run_dir": str(tmp_path / name), "teacher": str(tmp_path / "teacher"),
            "data": {"source": {"toy": "gaussian"}, "target": {"toy": "circles"}}, "validation": {"count": 16},
            "rdmd": {"fake_updates": 5, "fake_warmup": 2}, "train": {"steps": 3, "global_batch_size": 4, **train},
            "telemetry": {"sample_every": 0, "tensorboard": False, "log_every": 1}, "checkpoint": {"every": 0},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        assert main(["--config", str(tmp_path / "config.yaml")]) == 0
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(("stage", "dtype", "micro_batches"), [(0, "fp32", 1), (0, "bf16", 2), (2, "fp32", 2)])
def test_no_update_reads_what_a_compiled_network_gave_before_it(distill, monkeypatch, stage, dtype, micro_batches):
    """G, the fake score and the teacher are compiled, in place; each update is marked, and needs nothing before."""
    options = {"dtype": dtype, "micro_batch_size": 4 // micro_batches, "stage": stage}
    written = distill("written", **options)
    graphs = Overwriting(monkeypatch)
    compiled = distill("compiled", **options, compile="reduce-overhead")
    assert [(type(network), mode) for network, mode in graphs.compiled] == [(MLP, "reduce-overhead")] * 3
    rollout = " " + micro_batches * "GF"
    iteration = " " + micro_batches * "GTF" + " " + micro_batches * "F" + 4 * rollout
    assert graphs.events == 2 * rollout + 3 * iteration
    names = ("fake_loss", "transport_cost", "score_gradient_rms", "grad_norm/generator", "grad_norm/fake_score")
    assert len(written) == len(compiled) == 4  # with the last validation
    for expected, found in zip(written[:3], compiled[:3], strict=True):
        assert [found[name] for name in names] == [expected[name] for name in names] and all(map(expected.get, names))


def test_each_update_of_a_teacher_is_marked(tmp_path, monkeypatch):
    graphs = Overwriting(monkeypatch, "T")
    values = {
        "stage": "teacher", "run_dir": str(tmp_path / "run"), "data": {"target": {"toy": "circles"}},
        "network": {"kind": "mlp", "hidden": 8, "depth": 1}, "telemetry": {"sample_every": 0, "tensorboard": False},
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "compile": "max-autotune"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert graphs.events == 3 * " TT"
