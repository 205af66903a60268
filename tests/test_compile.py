"""train.compile: the same training, up to rounding."""

import json

import pytest

from rdmd_fast.distributed import BatchLayout, OptimizerOptions, TrainOptions, freeze, initialize_engine, join_world
from rdmd_fast.errors import InputError
from rdmd_fast.networks.mlp import MLP
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
    join_world()
    layout, train = BatchLayout(4, 4, 1, 0, 1), TrainOptions(compile="default")
    section = {"zero_optimization": {"stage": 3}}
    with pytest.raises(InputError, match=r"train\.compile: ZeRO 3"):
        initialize_engine(MLP(hidden=8, depth=1), OptimizerOptions(), layout, train, section)


def test_every_network_of_a_run_is_compiled():
    """G, the fake score and the teacher: as modules that keep their names, so that checkpoints fit either way."""
    world, layout, train = join_world(), BatchLayout(4, 4, 1, 0, 1), TrainOptions(compile="reduce-overhead")
    engine = initialize_engine(MLP(hidden=8, depth=1), OptimizerOptions(), layout, train, {})
    teacher = freeze(MLP(hidden=8, depth=1), layout, train, {}, world.device)
    for network in (engine.module, teacher):
        assert network._compiled_call_impl is not None
        assert network.state_dict().keys() == MLP(hidden=8, depth=1).state_dict().keys()
