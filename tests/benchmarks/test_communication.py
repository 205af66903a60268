"""Bytes that two ranks send, counted, against the formula; closed forms of the formula itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.communication import (
    EVERY_GATHER,
    INFINIBAND,
    NVLINK,
    at_stage,
    count,
    formula,
    on_paper,
    prepare_digits,
    seconds,
    toy,
)
from rdmd_fast.planning.communication import Payload, iteration_payload
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks
from rdmd_fast.planning.zero_memory import ZeroSettings

CASES = {
    "toy 0": (0, {}),
    "digits 0, accumulated": (0, {}),
    "toy 2": (2, {}),
    "toy 2, to owners": (2, {"use_multi_rank_bucket_allreduce": False}),
    "toy 3": (3, EVERY_GATHER),
    "digits 2, accumulated": (2, {}),
    "digits 3, accumulated, checkpointed": (3, EVERY_GATHER),
}


@pytest.fixture(scope="module")
def counted(launch_ranks, tmp_path_factory):
    """(plain configuration, what rank 0 of two sent) by case."""
    folder: Path = tmp_path_factory.mktemp("counted")
    digits = prepare_digits(folder, model_channels=32, channel_mult=[1], num_blocks=1)
    values_of = {}
    for name, (stage, zero) in CASES.items():
        values = values_of[name] = at_stage(toy() if name.startswith("toy") else digits, stage, **zero)
        if "accumulated" in name:
            values["train"] = {**values["train"], "dtype": "bf16", "micro_batch_size": 2}
        if "checkpointed" in name:
            values["train"]["activation_checkpointing"] = True
    results = count(
        list(values_of.values()), 2, folder, iterations=2, launch=launch_ranks
    )  # where all is gathered, each is alike
    return {name: (values, result) for (name, values), result in zip(values_of.items(), results, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_counted_bytes_are_the_formula(counted, case):
    values, result = counted[case]
    traces = result["by_operation"].get("broadcast_", 0)  # ZeRO-3's comparison of what its ranks traced
    # Norms and overflow checks come on top, and a few elements of padding.
    assert 0 <= result["sent"] - traces - formula(values, 2) <= 100
    assert result["votes"] == 8  # one int64 through an all-reduce


def of_size(*sizes):
    return PlannedNetwork(None, (2,), False, sizes, 0, 0)


def test_formula_is_the_textbook_one():
    """Ψ = 64 for G, 128 for fake score and teacher; fp32, 4 ranks, k = 3, two micro-batches."""
    score = of_size(128)
    networks = PlannedNetworks({"generator": of_size(64), "fake_score": score}, score, "generator")

    def sent(**zero):
        settings = ZeroSettings.of({"zero_optimization": zero})
        payload = iteration_payload(networks, settings, 4, "fp32", 2, 3, False)
        return {role: load.sent(4) / (4 * 3 / 4) for role, load in payload.items()}

    assert sent(stage=0) == {"generator": 2 * 64, "fake_score": 3 * 2 * 128}
    assert sent(stage=1) == {"generator": 3 * 64, "fake_score": 3 * 3 * 128}
    assert sent(stage=2) == {"generator": 5 * 64, "fake_score": 3 * 5 * 128}
    assert sent(stage=2, use_multi_rank_bucket_allreduce=False) == {"generator": 3 * 64, "fake_score": 3 * 3 * 128}
    # G: forward thrice, backward, reduce; fake: one forward without gradient, three of each; teacher: one forward.
    assert sent(stage=3) == {"generator": 2 * 5 * 64, "fake_score": 2 * (1 + 3 * 3) * 128, "teacher": 2 * 128}


def test_a_frozen_base_is_gathered_and_never_reduced():
    """G and fake score: 64 of an adapter over the teacher's 128; fp32, 4 ranks, k = 3."""
    score = replace(of_size(64), base=(128,))
    networks = PlannedNetworks({"generator": score, "fake_score": score}, of_size(128), "generator")

    def sent(stage):
        settings = ZeroSettings.of({"zero_optimization": {"stage": stage}})
        payload = iteration_payload(networks, settings, 4, "fp32", 1, 3, False)
        return {role: load.sent(4) / (4 * 3 / 4) for role, load in payload.items()}

    assert sent(0) == {"generator": 2 * 64, "fake_score": 3 * 2 * 64}
    whole = 64 + 128
    assert sent(3) == {"generator": 4 * whole + 64, "fake_score": (1 + 3 * 2) * whole + 3 * 64, "teacher": 128}


def test_one_rank_sends_nothing():
    assert Payload(all_reduce=8, all_gather=8).sent(1) == 0


def test_times_on_paper_follow_from_bytes_and_bandwidths():
    assert seconds(450e9, 8, 1.0) == 1.0 and seconds(450e9, 8, 0.5) == 2.0
    assert seconds(400e9, 64, 1.0) == 1.0  # eight adapters of 50 GB/s carry an eighth each
    assert (NVLINK, INFINIBAND) == (450e9, 50e9)
    table = on_paper()
    song = next(line for line in table.splitlines() if "SongUNet" in line)
    expected = [2 * 2 * 2 * 61.804419 * (n - 1) / n for n in (8, 64, 512)]  # two engines, all-reduce, bf16
    assert " / ".join(f"{value:.0f}" for value in expected) in song and "61.8 M" in song
