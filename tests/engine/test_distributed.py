"""Two ranks on the CPU: ZeRO stages agree; a stopped run goes on bit for bit, or in another layout to rounding."""

import json
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from material import small_unet, toy_rdmd
from safetensors.torch import load_file

from rdmd_fast import cli
from rdmd_fast.monitoring.telemetry import TIME_KEYS

WORKER = Path(__file__).with_name("distributed_worker.py")
STAGES = [0, 1, 2, 3]
# Of the runs that are stopped half-way; tests/soak/kill_resume.py does the same to more of them.
HALVES = [("mlp", 0), ("mlp", 3), ("any_weight_mlp", 3), ("unet", 1), *(("unet_rdmd", stage) for stage in STAGES)]
# ZeRO stages of a run that starts on two ranks, goes on on one and ends on two.
CHAINS = [(2, 3, 1), (0, 1, 3), (3, 0, 2)]

MLP_RDMD = toy_rdmd(
    network={"kind": "mlp", "hidden": 32, "depth": 2},
    generator={"kind": "mlp", "hidden": 32, "depth": 2},
    rdmd={
        "weighting": "sigma2",
        "fake_updates": 2,
        "fake_warmup": 3,
        "generator_optimizer": {"lr": 1e-3, "warmup": 5},
        "fake_optimizer": {"lr": 1e-3, "grad_clip": 10.0},
    },
    train={"steps": 8, "global_batch_size": 16, "micro_batch_size": 4},
)
ANY_WEIGHT = {**MLP_RDMD, "rdmd": {**MLP_RDMD["rdmd"], "transport_weight": {"log_uniform": [0.05, 2.0]}}}
UNET_TEACHER = {
    "stage": "teacher",
    "data": {"target": "shards/3/train"},
    "network": small_unet(1, 1) | {"model_channels": 32, "attn_resolutions": [4], "dropout": 0.0},
    "teacher_stage": {"optimizer": {"lr": 1e-3, "warmup": 5}, "ema": {"half_life": 100.0}},
    "train": {"steps": 6, "global_batch_size": 8},
    "telemetry": {"log_every": 1, "sample_every": 0, "sample_count": 2, "tensorboard": False},
    "checkpoint": {"every": 0},
}
UNET_RDMD = {
    "stage": "rdmd",
    "data": {"source": "shards/2/train"},
    "teacher": "teacher/export",
    "rdmd": {"fake_updates": 2, "generator_optimizer": {"lr": 1e-4}, "fake_optimizer": {"lr": 1e-4}},
    "train": {"steps": 6, "global_batch_size": 8},
    "telemetry": {"log_every": 4, "sample_every": 0, "sample_count": 2, "tensorboard": False},
    "checkpoint": {"every": 0},
}


def run_cases(launch_ranks, folder, ranks, cases):
    """Run cases in ``ranks`` processes with ``folder`` as working directory; returns their exit statuses."""
    listing = folder / f"cases_{ranks}.json"
    listing.write_text(json.dumps(cases))
    said = launch_ranks([str(WORKER), str(listing)], ranks, folder)
    return json.loads(next(line for line in said.splitlines() if line.startswith("statuses")).split(" ", 1)[1])


def case(base, name, stage, stop_after=None, **changes):
    values = {**base, **changes, "run_dir": name, "deepspeed": {"zero_optimization": {"stage": stage}}}
    return {"values": values, "stop_after": stop_after}


def layouts(stages):
    """Three lists of cases, for two, one and two ranks: three iterations (of U-Nets two), as many again, the rest."""
    name = "chain_" + "".join(map(str, stages))
    links = []
    for stage, stop_after, micro in zip(stages, (3, 3, None), (4, 2, 8), strict=True):
        mlp = {**MLP_RDMD["train"], "micro_batch_size": micro}
        half = {**MLP_RDMD["train"], "dtype": "bf16"}
        links.append([case(MLP_RDMD, f"{name}_mlp", stage, stop_after, train=mlp)])
        if stages == CHAINS[0]:
            links[-1].append(case(UNET_RDMD, f"{name}_unet_rdmd", stage, stop_after and 2))
        if stages == CHAINS[2]:
            links[-1].append(case(MLP_RDMD, f"{name}_bf16", stage, stop_after, train=half))
    return links


def metrics(run_dir):
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


@pytest.fixture(scope="module")
def runs(launch_ranks, tmp_path_factory):
    """All trainings of this file, in four groups of processes."""
    folder = tmp_path_factory.mktemp("runs")
    launch = partial(run_cases, launch_ranks, folder)
    assert cli.main(["pack", "digits", "--out", str(folder / "shards"), "--hues", "1"]) == 0
    launch(1, [case(UNET_TEACHER, "teacher", 0)])
    first, middle, last = ([*chain.from_iterable(links)] for links in zip(*map(layouts, CHAINS), strict=True))
    assert launch(2, first) == [75] * len(first)
    whole_batch = case(MLP_RDMD, "mlp_whole_batch", 0, train={"steps": 8, "global_batch_size": 16})
    any_weight = case(ANY_WEIGHT, "any_weight_mlp_one", 0)
    statuses = launch(1, [case(MLP_RDMD, "mlp_one", 0), whole_batch, any_weight, *middle])
    assert statuses == [0, 0, 0] + [75] * len(middle)
    two, statuses = last, [0] * len(last)
    for stage in STAGES:
        bases = [(MLP_RDMD, "mlp"), (UNET_TEACHER, "unet"), (UNET_RDMD, "unet_rdmd")]
        for base, name in bases + [(ANY_WEIGHT, "any_weight_mlp")] * (stage == 3):
            two.append(case(base, f"{name}_{stage}", stage))
            if (name, stage) not in HALVES:
                statuses.append(0)
                continue
            two.append(case(base, f"{name}_{stage}_halves", stage, stop_after=base["train"]["steps"] // 2))
            two.append(case(base, f"{name}_{stage}_halves", stage))
            statuses += [0, 75, 0]
    assert launch(2, two) == statuses
    return folder


@pytest.mark.parametrize("name,one,keys,stage", [
    *[("mlp", "mlp_one", ("fake_loss", "transport_cost", "score_gradient_rms"), stage) for stage in STAGES],
    ("any_weight_mlp", "any_weight_mlp_one", ("fake_loss", "transport_cost", "score_gradient_rms"), 3),
    *[("unet", "teacher", ("loss",), stage) for stage in STAGES],
])  # fmt: skip
def test_two_ranks_at_every_zero_stage_equal_one_rank(runs, name, one, keys, stage):
    single, double = metrics(runs / one), metrics(runs / f"{name}_{stage}")
    losses = [[line[key] for line in lines if keys[0] in line for key in keys] for lines in (single, double)]
    assert len(losses[0]) == (6 if name == "unet" else 8) * len(keys)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_micro_batches_leave_no_trace(runs):
    keys = ("fake_loss", "transport_cost", "score_gradient_rms")
    losses = [
        [line[key] for line in metrics(runs / name) if "fake_loss" in line for key in keys]
        for name in ("mlp_one", "mlp_whole_batch")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name,stage", HALVES)
def test_half_stop_half_equals_the_whole_bit_for_bit(runs, name, stage):
    whole, halves = runs / f"{name}_{stage}", runs / f"{name}_{stage}_halves"
    assert metrics(whole) == metrics(halves)
    role = "teacher" if name == "unet" else "generator"
    weights = [load_file(folder / "export" / f"{role}.safetensors") for folder in (whole, halves)]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert checkpoint_tensors(whole) == checkpoint_tensors(halves)


@pytest.mark.parametrize("name,keys,tolerance,stages", [
    *[("mlp", ("fake_loss", "transport_cost", "score_gradient_rms"), 1e-5, stages) for stages in CHAINS],
    ("unet_rdmd", ("fake_loss", "transport_cost", "score_gradient_rms"), 1e-5, CHAINS[0]),
    ("bf16", ("fake_loss", "transport_cost"), 3e-2, CHAINS[2]),
])  # fmt: skip
def test_other_ranks_stages_and_micro_batches_go_on(runs, name, keys, tolerance, stages):
    """Two ranks, one, two, each at another ZeRO stage, against the run that was never stopped."""
    whole = {"mlp": "mlp_one", "unet_rdmd": "unet_rdmd_2", "bf16": "mlp_one"}[name]
    chained = runs / f"chain_{''.join(map(str, stages))}_{name}"
    losses = [
        [line[key] for line in metrics(folder) if "fake_loss" in line for key in keys]
        for folder in (runs / whole, chained)
    ]
    assert len(losses[0]) == len(keys) * (8 if name != "unet_rdmd" else 2)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name,role", [("unet", "teacher"), ("unet_rdmd", "generator"), ("mlp", "generator")])
def test_export_of_a_checkpoint_is_the_runs_own(runs, name, role, stage):
    run = runs / f"{name}_{stage}"
    assert cli.main(["export", str(run)]) == 0
    [newest] = (run / "exports").iterdir()
    own, read = (load_file(folder / f"{role}.safetensors") for folder in (run / "export", newest))
    assert own.keys() == read.keys() and all(own[key].equal(read[key]) for key in own)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (run / "export", newest)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("stages", CHAINS)
def test_weights_and_average_survive_other_layouts(runs, stages):
    name = f"chain_{''.join(map(str, stages))}_mlp"
    exports = [load_file(runs / folder / "export/generator.safetensors") for folder in ("mlp_one", name)]
    for key, value in exports[0].items():
        torch.testing.assert_close(exports[1][key], value, rtol=1e-4, atol=1e-6)


def checkpoint_tensors(run_dir):
    """Every tensor in the files of the last checkpoint, as comparable bytes."""
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints/latest").read_text().strip()
    files = sorted(folder.rglob("*.safetensors"))
    found = {
        f"{path.relative_to(folder)}:{key}": value.view(-1).view(torch.uint8).numpy().tobytes()
        for path in files
        for key, value in load_file(path).items()
    }
    assert {"ranks", "generator" if "rdmd" in run_dir.name or "mlp" in run_dir.name else "teacher"} <= {
        path.parent.name for path in files
    }
    assert any("exp_avg_sq" in key for key in found)
    return found
