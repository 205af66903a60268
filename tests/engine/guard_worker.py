"""Engines that meet bad updates beside twins that do not; executed by each of two ranks, writes REPORT.

Name given: ``REPORT``.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from rdmd_fast.engine import engine as distributed
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.ema import EMAOptions, ShardedEMA
from rdmd_fast.engine.engine import initialize_engine, loss_scale, set_learning_rate, take_step
from rdmd_fast.engine.fp32_masters import gather_parameters, master_shards
from rdmd_fast.engine.options import OptimizerOptions, TrainOptions
from rdmd_fast.engine.update_guard import GuardOptions, mark_nonfinite
from rdmd_fast.kernels.inject import inject_gradient
from rdmd_fast.processes.world import join_world

rank = int(os.environ["RANK"])
ADAM = OptimizerOptions(lr=1e-2, grad_clip=1.0)  # every update is clipped
GUARD = GuardOptions(spike_factor=10.0, spike_warmup=2, spike_half_life=4.0)


def make(dtype, stage):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.SiLU(), torch.nn.Linear(5, 4))
    section = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
    layout = BatchLayout(8, 2, 2, rank, 2)  # two micro-batches
    return initialize_engine(network, ADAM, layout, TrainOptions(dtype=dtype, guard=GUARD), section)


def update(engine, number, gradient=1.0, loss=1.0):
    """Update ``number``; on the last rank factors of the gradient and the loss in the second micro-batch."""
    set_learning_rate(engine, ADAM, number, 100)
    dtype = next(engine.module.parameters()).dtype
    for micro in range(2):
        generator = torch.Generator().manual_seed(1000 * number + 10 * micro + rank)
        output = engine(torch.randn(2, 6, generator=generator).to(dtype))
        wanted = torch.randn(2, 4, generator=generator) * (gradient if rank and micro else 1.0) * loss_scale(engine)
        wanted = wanted.to(dtype)
        mark_nonfinite(wanted, torch.full((2,), loss if rank and micro else 1.0))
        engine.backward(inject_gradient(output, wanted, loss_scale(engine)), scale_wrt_gas=False)
        take_step(engine, "engine")


def everything(engine):
    """Parameters, masters, Adam's moments and steps."""
    found = [shard.clone() for shard in master_shards(engine)]
    for parameter in engine.module.parameters():
        found.append(getattr(parameter, "ds_tensor", parameter).detach().float().clone())
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in adam.state.values():
        found += [state[key].clone() for key in sorted(state)]
    assert len(adam.state) and all(len(state) == 3 for state in adam.state.values())
    return found


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def case(dtype, stage):
    engine, twin = make(dtype, stage), make(dtype, stage)
    average = ShardedEMA(engine, EMAOptions(), 8)
    bad = {"nan gradient": {"gradient": math.nan}, "infinite loss": {"loss": math.inf}, "spike": {"gradient": 1e3}}
    if dtype != "fp16":  # whose loss scale would part the twins
        bad |= {"infinite gradient": {"gradient": math.inf}, "nan loss": {"loss": math.nan}}
    else:
        bad = {"spike": bad["spike"]}
    result = {"kept": {}, "counted": {}, "norms": []}
    for number in range(3):
        update(engine, number), update(twin, number)
        result["norms"].append(float(engine.guard.norm))
    result["weights"] = {name: weight.tolist() for name, weight in gather_parameters(engine).items()}
    for number, (name, change) in enumerate(bad.items(), 3):
        before, skipped = everything(engine), float(engine.guard.skipped)
        update(engine, number, **change)
        average.update(number)
        result["kept"][name] = same(before, everything(engine))
        result["counted"][name] = float(engine.guard.skipped) - skipped
        update(engine, number), update(twin, number)
        moved = not same(before, everything(engine))
        result["kept"][name] &= moved and same(everything(engine), everything(twin))
    result |= {"spikes": float(engine.guard.spikes), "in_row": float(engine.guard.in_row)}
    result["state"] = engine.guard.state()["numbers"].tolist()
    result["average"] = all(bool(shard.isfinite().all()) for shard in average.shards)
    return result


world = join_world()
from deepspeed.accelerator import get_accelerator  # noqa: E402

get_accelerator().is_fp16_supported = lambda: True
distributed.LOSS_SCALING.update(initial_scale_power=4)
results = {f"{dtype} {stage}": case(dtype, stage) for dtype in ("fp32", "bf16", "fp16") for stage in range(4)}
Path(f"{REPORT}.{rank}").write_text(json.dumps(results))  # noqa: F821
sys.exit(0)
