"""fp16 with dynamic loss scaling, fp32 masters and activation checkpointing, at every ZeRO stage, in one process.

The CPU computes in fp16, slowly, but DeepSpeed takes its word that it cannot: here it stands in for a GPU.
"""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rdmd_fast.config import validate_config
from rdmd_fast.diffusion import DiffusionOptions, coefficients
from rdmd_fast.engine import engine as distributed
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.ema import EMAOptions, ShardedEMA
from rdmd_fast.engine.engine import initialize_engine, loss_scale
from rdmd_fast.engine.fp32_masters import gather_parameters, master_shards
from rdmd_fast.engine.options import OptimizerOptions, TrainOptions
from rdmd_fast.errors import InputError
from rdmd_fast.kernels.denoising_loss import denoising_gradient
from rdmd_fast.kernels.inject import inject_gradient
from rdmd_fast.kernels.noise_forward import CounterNoise
from rdmd_fast.monitoring.telemetry import TIME_KEYS
from rdmd_fast.processes.world import join_world
from rdmd_fast.trainer import run

STAGES = [0, 1, 2, 3]
BUCKET = 10_000  # elements; the suite fills fresh memory with NaN, DeepSpeed's default of 5e8 takes a second each
STEPS, STOP = 5, 3


@pytest.fixture(scope="module")
def world():
    patch = pytest.MonkeyPatch()
    world = join_world()
    from deepspeed.accelerator import get_accelerator

    patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    # Overflows at first, and soon grows again.
    patch.setattr(
        distributed, "LOSS_SCALING", {**distributed.LOSS_SCALING, "initial_scale_power": 10, "loss_scale_window": 1}
    )
    yield world
    patch.undo()


def teacher(shards, run_dir, stage, **train):
    unet = {"kind": "song_unet", "model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    values = {
        "stage": "teacher",
        "run_dir": str(run_dir),
        "data": {"target": f"{shards}/3/train"},
        "network": {**unet, "dropout": 0.1},
        "teacher_stage": {"optimizer": {"lr": 1e-3, "grad_clip": 500.0}, "ema": {"half_life": 10.0}},
        "train": {"steps": STEPS, "global_batch_size": 4, **train},
        "telemetry": {"log_every": 1, "sample_every": 0, "sample_count": 1, "tensorboard": False},
        "checkpoint": {"every": 0},
        "deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET}},
    }
    return validate_config(values, "case")


def train(config, world):
    Path(config.run_dir).mkdir(exist_ok=True)
    assert run(config, "auto", world, Path(config.run_dir), SimpleNamespace(requested=None)) == 0


def metrics(run_dir):
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


@pytest.fixture(scope="module")
def runs(world, shards, tmp_path_factory):
    """fp16 with activation checkpointing at each stage, in one go and in two; and without checkpointing."""
    folder = tmp_path_factory.mktemp("runs")
    fp16 = {"dtype": "fp16", "activation_checkpointing": True}
    for stage in STAGES:
        train(teacher(shards, folder / f"{stage}", stage, **fp16), world)
        for steps in (STOP, STEPS):
            train(teacher(shards, folder / f"{stage}_halves", stage, steps=steps, **fp16), world)
    train(teacher(shards, folder / "kept", 0, dtype="fp16"), world)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_resumes_bit_for_bit(runs, stage):
    whole, halves = runs / f"{stage}", runs / f"{stage}_halves"
    assert metrics(whole) == metrics(halves)
    for name in ("export/teacher.safetensors", f"checkpoints/step_{STEPS:08d}/ranks/00000.safetensors"):
        first, second = load_file(whole / name), load_file(halves / name)
        assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def test_loss_scale_falls_grows_and_is_reported(runs):
    lines = metrics(runs / "0")
    scales = [line["loss_scale/teacher"] for line in lines]
    skipped = [line["skipped_updates/teacher"] for line in lines]
    assert skipped[0] == 1 and scales[0] == 2**9  # 2^10 overflows
    assert skipped[-1] < STEPS and any(later > sooner for sooner, later in itertools.pairwise(scales))
    for previous, line in zip([{"skipped_updates/teacher": 0}, *lines], lines, strict=False):
        applied = line["skipped_updates/teacher"] == previous["skipped_updates/teacher"]
        assert ("grad_norm/teacher" in line) == applied  # an update that was skipped has no norm


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_scales_and_skips_alike(runs, stage):
    reference, lines = metrics(runs / "0"), metrics(runs / f"{stage}")
    for name in ("loss_scale/teacher", "skipped_updates/teacher"):
        assert [line[name] for line in lines] == [line[name] for line in reference]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in reference], rel=1e-3)


def test_activation_checkpointing_changes_no_more_than_rounding(runs):
    """Dropout included: the units that were dropped are dropped again."""
    losses = [[line["loss"] for line in metrics(runs / name)] for name in ("0", "kept")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_network_that_cannot_checkpoint_is_refused(world):
    options = TrainOptions(activation_checkpointing=True)
    with pytest.raises(InputError, match="activation_checkpointing: Linear"):
        initialize_engine(torch.nn.Linear(2, 2), OptimizerOptions(), BatchLayout(1, 1, 1, 0, 1), options, {})


def test_dtype_that_the_device_lacks_is_refused(world, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    for dtype, other in (("fp16", "bf16"), ("bf16", "fp16")):
        monkeypatch.setattr(get_accelerator(), f"is_{dtype}_supported", lambda: False)
        with pytest.raises(InputError, match=f"{dtype} is not supported on this device, use {other} or fp32"):
            linear_engine(dtype, 0)


def test_sections_that_deepspeed_refuses_are_one_line(world):
    layout, bf16 = BatchLayout(4, 4, 1, 0, 1), TrainOptions(dtype="bf16")
    with pytest.raises(InputError, match="deepspeed: unknown key bucket"):
        section = {"zero_optimization": {"stage": 3, "bucket": 5}}
        distributed.freeze_teacher(torch.nn.Linear(2, 2), layout, bf16, section, world.device)


# -- one engine --------------------------------------------------------------------------------------------------------


def linear_engine(dtype, stage, lr=0.25, grad_clip=0.0):
    torch.manual_seed(0)
    network = torch.nn.Linear(8, 8)
    layout, section = BatchLayout(4, 4, 1, 0, 1), {"zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET}}
    return initialize_engine(
        network, OptimizerOptions(lr=lr, grad_clip=grad_clip), layout, TrainOptions(dtype=dtype), section
    )


def update(engine, gradient):
    """One step from a gradient of the output [4, 8] of ones, given without the loss scale."""
    dtype = next(engine.module.parameters()).dtype
    output = engine(torch.ones(4, 8, dtype=dtype))
    scale = loss_scale(engine)
    engine.backward(inject_gradient(output, (gradient * scale).to(dtype), scale), scale_wrt_gas=False)
    engine.step()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_masters_are_fp32_and_adam_takes_its_first_step(world, dtype, stage):
    """Adam's first update is lr · sign(g): of the fp32 masters, from the initial weights as they were in fp32."""
    engine = linear_engine(dtype, stage, lr=1e-5)
    before = gather_parameters(engine)
    torch.manual_seed(0)
    assert before["weight"].equal(torch.nn.Linear(8, 8).weight)
    ema = ShardedEMA(engine, EMAOptions(half_life=1.0, ramp=1.0), global_batch=1)
    sign = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)
    update(engine, 0.01 * sign.expand(4, 8))
    after = gather_parameters(engine)
    assert all(shard.dtype == torch.float32 for shard in master_shards(engine))
    expected = {"weight": sign[:, None].expand(8, 8), "bias": sign}
    for name, change in expected.items():
        torch.testing.assert_close(before[name] - after[name], 1e-5 * change, rtol=2e-2, atol=0)
    ema.update(0)  # half of the change, far below 16 bits' resolution
    averaged = ema.gather()
    for name, change in expected.items():
        torch.testing.assert_close(before[name] - averaged[name], 0.5e-5 * change, rtol=4e-2, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_only_gradients_beyond_the_limit_are_cut(world, dtype, stage):
    """A small gradient, then one five times as large: without a limit, or with the small one cut too, Adam goes farther
    in other proportions, by 0.05 and more."""
    sizes, limit = (0.01, 0.05), 0.5  # norms of 0.34 and 1.7
    engine = linear_engine(dtype, stage, grad_clip=limit)
    torch.manual_seed(0)
    exact = torch.nn.Linear(8, 8).double()
    adam = torch.optim.Adam(exact.parameters(), lr=0.25)
    for size in sizes:
        output = engine(torch.ones(4, 8, dtype=next(engine.module.parameters()).dtype))
        engine.backward(inject_gradient(output, torch.full_like(output, size), 1.0), scale_wrt_gas=False)
        distributed.take_step(engine, "engine")
        adam.zero_grad()
        (size * exact(torch.ones(4, 8).double()).sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), limit)
        assert float(engine.guard.norm) == pytest.approx(float(norm), rel=1e-2)
        adam.step()
    for name, weight in gather_parameters(engine).items():
        torch.testing.assert_close(weight, exact.state_dict()[name].float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_leaves_weights_and_repeats_them_in_the_average(world, stage):
    engine = linear_engine("fp16", stage)
    update(engine, torch.full((4, 8), 0.01))
    before = gather_parameters(engine)
    ema = ShardedEMA(engine, EMAOptions(), global_batch=1)
    update(engine, torch.full((4, 8), 1e4))  # times the loss scale: beyond 65,504
    ema.update(0)
    assert engine.skipped_steps == 1
    assert all(gather_parameters(engine)[name].equal(before[name]) for name in before)
    assert all(ema.gather()[name].equal(before[name]) for name in before)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_overflow_at_every_scale_end_the_run(world, stage):
    engine = linear_engine("fp16", stage)
    with pytest.raises(InputError, match="gradients of fake_score overflow fp16 at every loss scale"):
        for _ in range(40):
            output = engine(torch.ones(4, 8, dtype=torch.float16))
            engine.backward(inject_gradient(output, torch.full_like(output, math.inf), loss_scale(engine)))
            distributed.take_step(engine, "fake_score")
    assert loss_scale(engine) == distributed.LOSS_SCALE_FLOOR < 1


def test_tiny_gradients_survive_fp16(world):
    """The mean over a large batch lies below fp16's smallest number; the loss scale enters before it is rounded."""
    engine, batch = linear_engine("fp16", 0), 2**30
    engine.optimizer.loss_scale = 2.0**18
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    table = coefficients(torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64), DiffusionOptions())
    noise = CounterNoise(0, 0, torch.arange(4), torch.randn(4, 8, generator=torch.Generator().manual_seed(2)))
    output = engine(x.half())
    drawn = {"noise": noise, "table": table, "batch_size": batch}
    gradient, _ = denoising_gradient(output, y, **drawn, loss_scale=loss_scale(engine))
    engine.backward(inject_gradient(output, gradient, loss_scale(engine)), scale_wrt_gas=False)
    exact, _ = denoising_gradient(output.float(), y, **drawn)
    expected = exact.t() @ x.half().float()
    assert denoising_gradient(output, y, **drawn)[0].count_nonzero() == 0
    torch.testing.assert_close(engine.module.weight.grad.float() / loss_scale(engine), expected, rtol=1e-2, atol=1e-11)
