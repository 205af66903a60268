"""What --dry-run predicts of text-to-image pipelines: one base and two adapters, on each rank and in each pass."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_dry_run import check_model_states
from text_pipelines import pipeline_and_latents, saved

from benchmarks.communication import on_ranks
from rdmd_fast.model_files.teachers import read_teacher_config
from rdmd_fast.networks.text_options import LoRAOptions
from rdmd_fast.planning.activations import activations
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks

CASES = {"fp32 0": ("fp32", 0), "bf16 0": ("bf16", 0), "fp32 2": ("fp32", 2), "bf16 3": ("bf16", 3)}


@pytest.fixture(scope="module")
def held(launch_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    pipeline_and_latents(folder)
    values = [
        {
            "stage": "rdmd", "run_dir": str(folder / f"run_{stage}_{dtype}"), "teacher": str(folder / "pipeline"),
            "data": {"source": str(folder / "shards")}, "teacher_prompt": "a lion", "teacher_guidance": 1.0,
            "lora": {"rank": 2, "targets": "attention_feed_forward"},
            "train": {"steps": 2, "global_batch_size": 4, "dtype": dtype},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
        for dtype, stage in CASES.values()
    ]  # fmt: skip
    worker = str(Path(__file__).with_name("memory_worker.py"))
    return dict(zip(CASES, zip(values, on_ranks([worker], values, 2, folder, launch_ranks), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_one_base_and_two_adapters(held, case):
    check_model_states(case, *held[case])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_activations_are_what_real_passes_keep(tmp_path, adapters, checkpointing):
    options = read_teacher_config(saved(tmp_path / "pipeline", False)).network
    teacher = PlannedNetwork.of(options, (4, 8, 8), False)
    lora = LoRAOptions(rank=2, targets="all") if adapters else None
    score = PlannedNetwork.of(options.model_copy(update={"lora": lora}), (4, 8, 8), False)
    networks = PlannedNetworks({"generator": score, "fake_score": score}, teacher, "generator")
    predicted, real = (
        activations(networks, 4, 1, "fp32", checkpointing, fused=False, device=device) for device in ("meta", "cpu")
    )
    assert predicted.saved == pytest.approx(real.saved, rel=0.02)
    # A norm comes out in another layout there, as on a GPU: a copy for a moment.
    assert predicted.peak == pytest.approx(real.peak, rel=0.08)
