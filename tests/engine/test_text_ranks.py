"""Text-to-image pipelines on two ranks: adapters over one base, and whole copies."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from test_distributed import case, checkpoint_tensors, metrics, run_cases
from text_pipelines import pipeline_and_latents

KEYS = ("fake_loss", "transport_cost", "score_gradient_rms")
LORA = {"lora": {"rank": 2, "alpha": 4.0, "targets": "all"}}
RATES = {name: {"lr": 3e-4} for name in ("generator_optimizer", "fake_optimizer")}
TEXT = {
    "stage": "rdmd",
    "data": {"source": "shards"},
    "teacher": "pipeline",
    "teacher_prompt": "a lion",
    "rdmd": RATES | {"weighting": "sigma2"},
    "train": {"global_batch_size": 4, "micro_batch_size": 2},
    "telemetry": {"log_every": 1, "sample_every": 0, "tensorboard": False},
    "checkpoint": {"every": 0},
}
# (adapters, ZeRO stage)
SHORT = [(True, 3)]
LONG = [(adapters, stage) for adapters in (True, False) for stage in range(4)]


def runs(launch_ranks, folder: Path, chosen: list[tuple[bool, int]], steps: int) -> Path:
    """Each case on one rank, on two, and on two with a stop half-way."""
    pipeline_and_latents(folder)
    one, two, statuses = [], [], []
    for adapters, stage in chosen:
        base = TEXT | {"train": TEXT["train"] | {"steps": steps}} | (LORA if adapters else {})
        if (single := case(base, f"rdmd_{adapters}_one", 0)) not in one:
            one.append(single)
        name = f"rdmd_{adapters}_{stage}"
        halves = f"{name}_halves"
        two += [case(base, name, stage), case(base, halves, stage, stop_after=steps // 2), case(base, halves, stage)]
        statuses += [0, 75, 0]
    launch = partial(run_cases, launch_ranks, folder)
    assert launch(1, one) == [0] * len(one)
    assert launch(2, two) == statuses
    return folder


def check(folder: Path, adapters: bool, stage: int, steps: int) -> None:
    single, double = (metrics(folder / f"rdmd_{adapters}_{name}") for name in ("one", stage))
    losses = [[line[key] for line in lines for key in KEYS if key in line] for lines in (single, double)]
    assert len(losses[0]) == steps * len(KEYS)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    whole, halves = folder / f"rdmd_{adapters}_{stage}", folder / f"rdmd_{adapters}_{stage}_halves"
    assert metrics(whole) == metrics(halves)
    assert checkpoint_tensors(whole) == checkpoint_tensors(halves)
    exports = [sorted((run / "export").glob("*.safetensors")) for run in (whole, halves)]
    assert len(exports[0]) == (2 if adapters else 1)
    for pair in zip(*exports, strict=True):
        weights = [load_file(path) for path in pair]
        assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    manifest = json.loads(next((whole / "checkpoints").glob("step_*/manifest.json")).read_text())
    names = manifest["engines"]["generator"]["parameters"]
    assert all("lora_" in name for name in names) == adapters


@pytest.fixture(scope="module")
def short(launch_ranks, tmp_path_factory) -> Path:
    return runs(launch_ranks, tmp_path_factory.mktemp("text_ranks"), SHORT, 4)


@pytest.fixture(scope="module")
def long(launch_ranks, tmp_path_factory) -> Path:
    return runs(launch_ranks, tmp_path_factory.mktemp("text_ranks_long"), LONG, 20)


@pytest.mark.slow
@pytest.mark.parametrize("adapters,stage", SHORT)
def test_two_ranks_equal_one_and_a_stop_leaves_no_trace(short, adapters, stage):
    check(short, adapters, stage, 4)


@pytest.mark.slow
@pytest.mark.parametrize("adapters,stage", LONG)
def test_so_at_every_stage_with_adapters_and_whole_copies(long, adapters, stage):
    check(long, adapters, stage, 20)
