"""What --dry-run predicts, against what two ranks really hold and what real passes really keep."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import write_shards

from benchmarks.communication import at_stage, on_ranks, prepare_digits
from rdmd_fast.config import validate_config
from rdmd_fast.kernels import group_norm_silu
from rdmd_fast.networks import unet_layers
from rdmd_fast.networks.options import DhariwalUNetOptions, MLPOptions, SongUNetOptions
from rdmd_fast.planning.activations import activations
from rdmd_fast.planning.disk import disk_use
from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks, planned_networks, sample_shape
from rdmd_fast.planning.zero_memory import ZeroSettings, model_states
from rdmd_fast.trainer import main

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "configs/toy/gaussian_to_8gaussians.yaml")
BUCKET = 300_000
HOST = {"device": "cpu", "pin_memory": False}
# name -> (dtype, stage, further keys of zero_optimization)
CASES = {
    "fp32 0": ("fp32", 0, {}),
    "fp32 1": ("fp32", 1, {}),
    "bf16 0": ("bf16", 0, {}),
    "bf16 2": ("bf16", 2, {}),
    "bf16 3, offloaded": ("bf16", 3, {"offload_optimizer": HOST, "offload_param": HOST}),
}
SLOW_CASES = {
    "fp32 3": ("fp32", 3, {}),
    "bf16 3, all sharded": ("bf16", 3, {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}),
    "bf16 1, fp32 accumulation": ("bf16", 1, {}),
    "bf16 2, offloaded": ("bf16", 2, {"offload_optimizer": HOST}),
}
SMALL = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1}


def measure(folder, cases, launch):
    """(configuration, bytes that rank 0 of two held) by case."""
    base, values_of = prepare_digits(folder, **SMALL), {}
    for name, (dtype, stage, zero) in cases.items():
        values = values_of[name] = at_stage(base, stage, reduce_bucket_size=BUCKET, **zero)
        values["train"] = {**values["train"], "dtype": dtype}
        if "accumulation" in name:
            values["deepspeed"]["data_types"] = {"grad_accum_dtype": "fp32"}
    worker = str(Path(__file__).with_name("memory_worker.py"))
    found = on_ranks([worker], list(values_of.values()), 2, folder, launch)
    return {name: (values, result) for (name, values), result in zip(values_of.items(), found, strict=True)}


@pytest.fixture(scope="module")
def held(launch_ranks, tmp_path_factory):
    return measure(tmp_path_factory.mktemp("held"), CASES, launch_ranks)


@pytest.fixture(scope="module")
def held_slow(launch_ranks, tmp_path_factory):
    return measure(tmp_path_factory.mktemp("held_slow"), SLOW_CASES, launch_ranks)


def test_damaged_data_that_training_accepts_are_accepted(tmp_path):
    write_shards(tmp_path / "set", np.zeros((4, 3, 8, 8), np.float32), 2)
    (tmp_path / "set/shard-000000.tar").unlink()
    data = {"target": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    network = {"kind": "song_unet", **SMALL}
    config = {"stage": "teacher", "run_dir": "run", "data": data, "network": network}
    assert sample_shape(validate_config(config, "test")) == (3, 8, 8)


@pytest.mark.parametrize("case", CASES)
def test_model_states_are_what_a_rank_holds(held, case):
    check_model_states(case, *held[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_model_states_are_what_a_rank_holds_in_further_cases(held_slow, case):
    check_model_states(case, *held_slow[case])


def check_model_states(case, values, found):
    config = validate_config(values, case)
    networks, settings = planned_networks(config), ZeroSettings.of(config.deepspeed)
    states = model_states(networks, settings, 2, config.train.dtype, 1)
    parts = {part: states.device[part] + states.host[part] for part in states.device}
    engines = found["after"].values()
    # Flat tensors are padded to a multiple of 4 elements; ZeRO-3 shards parameter by parameter.
    padding = 16 * len(networks.named())
    assert sum(engine["parameters"] for engine in engines) + found["teacher"] == pytest.approx(
        parts["parameters"] - states.gathered, abs=padding
    )
    assert sum(engine["optimizer"] for engine in engines) == pytest.approx(parts["optimizer"], abs=padding)
    assert found["EMA"] == pytest.approx(parts["EMA"], abs=padding)
    # A shard of gradients ends inside a parameter, whose gradient is there whole.
    straddling = 4 * max(networks.trained["generator"].sizes)
    kept = sum(engine["gradients"] for engine in engines)
    passing = max(engine["gradients"] - found["after"][name]["gradients"] for name, engine in found["before"].items())
    allowed = straddling if settings.stage in (1, 2) else padding
    assert 0 <= kept + passing - parts["gradients"] <= allowed
    if settings.stage == 3:
        assert sum(engine["buckets"] for engine in engines) == parts["buckets"]
        assert found["gathered"] <= states.gathered + padding
    if not settings.offload_optimizer:
        above = found["update"] - parts["update"]  # at ZeRO-3 small parameters are gathered again, which stay
        assert -1000 - padding <= above <= 1000 + padding + states.gathered


def test_offloading_moves_bytes_and_makes_none(held):
    values, _ = held["bf16 3, offloaded"]
    config = validate_config(values, "case")
    networks = planned_networks(config)
    apart = model_states(networks, ZeroSettings.of(config.deepspeed), 2, "bf16", 1)
    plain = model_states(networks, ZeroSettings.of({"zero_optimization": {"stage": 3}}), 2, "bf16", 1)
    assert apart.device["optimizer"] == apart.device["EMA"] == apart.device["gradients"] == 0
    assert apart.host["optimizer"] == plain.device["optimizer"] > 0 and apart.host["EMA"] == plain.device["EMA"] > 0
    assert apart.device["parameters"] == apart.gathered < plain.device["parameters"]


TWO_LEVELS = {**SMALL, "channel_mult": [1, 2], "attn_resolutions": [4]}
NETWORKS = {
    "song_unet": (SongUNetOptions(kind="song_unet", **TWO_LEVELS), (3, 8, 8)),
    "dhariwal_unet": (DhariwalUNetOptions(kind="dhariwal_unet", **TWO_LEVELS), (3, 8, 8)),
    "mlp": (MLPOptions(kind="mlp"), (2,)),
}  # fmt: skip


def rdmd_of(options, shape):
    network = PlannedNetwork.of(options, shape, False)
    return PlannedNetworks({"generator": network, "fake_score": network}, network, "generator")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_what_real_passes_keep(name, dtype, checkpointing, monkeypatch):
    # What a CPU does in 16 bits, and no GPU: it attends by products, which it keeps, and norms in fp32 or contiguous.
    monkeypatch.setattr(unet_layers, "attention", lambda *tokens: F.scaled_dot_product_attention(*tokens))
    monkeypatch.setattr(
        group_norm_silu, "_group_norm", lambda x, groups, weight, bias, eps: F.group_norm(x, groups, weight, bias, eps)
    )
    networks = rdmd_of(*NETWORKS[name])
    predicted, real = (
        activations(networks, 8, 2, dtype, checkpointing, fused=False, device=device) for device in ("meta", "cpu")
    )
    assert predicted.saved == pytest.approx(real.saved, rel=0.01)
    assert predicted.peak == pytest.approx(real.peak, rel=0.03)


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_what_autograd_saves(name):
    """Counted another way, by autograd's own hooks."""
    options, shape = NETWORKS[name]
    planned = PlannedNetwork.of(options, shape, False)
    network, x, c_noise = planned.build("cpu"), torch.randn(8, *shape), torch.randn(8)
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers(), x, c_noise)}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x, c_noise)
    counted = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own) + output.nbytes
    predicted = activations(rdmd_of(options, shape), 8, 1, "fp32", False, fused=False)
    assert predicted.saved["generator"] == pytest.approx(counted, rel=0.01)


def test_fused_kernels_keep_what_is_predicted(interpreted):
    """Triton's interpreter runs the real autograd functions; it is chosen when the kernels are imported."""
    script = """if True:
        from rdmd_fast.networks import SongUNetOptions
        from rdmd_fast.planning.activations import activations
        from rdmd_fast.planning.planned_networks import PlannedNetwork, PlannedNetworks
        options = SongUNetOptions(kind="song_unet", model_channels=32, channel_mult=[1], num_blocks=1)
        networks = PlannedNetworks({"generator": PlannedNetwork.of(options, (3, 8, 8), False)}, None, "generator")
        for fused, device in ((True, "meta"), (True, "cpu"), (False, "meta")):
            print(activations(networks, 2, 1, "fp32", False, fused, device).saved["generator"])
    """
    predicted, real, unfused = map(int, interpreted(script).split())
    assert predicted == real < 0.9 * unfused


def rows_of(printed):
    """The table's numbers by stage, MiB, and which stage is marked."""
    lines = printed.splitlines()
    head = next(index for index, line in enumerate(lines) if "parameters   gradients" in line)
    names = lines[head].split()
    rows = [line.split()[1:] for line in lines[head + 1 : head + 5]]
    marked = [int(row[0]) for row in rows if row[-1] == "configured"]
    return [dict(zip(names, map(float, row[1:]), strict=False)) for row in rows], marked


def test_table_answers_for_ranks_that_are_not_there(capsys, tmp_path):
    zero = "deepspeed.zero_optimization={stage: 2, reduce_bucket_size: 1048576}"
    size = "network={kind: mlp, hidden: 1024, depth: 3}"
    arguments = [size, "generator={kind: mlp, hidden: 1024, depth: 3}", f"run_dir={tmp_path}/run", "train.dtype=bf16"]
    assert main(["--config", TOY, "--dry-run", "--ranks", "16", zero, "train.global_batch_size=64", *arguments]) == 0
    printed = capsys.readouterr().out
    rows, marked = rows_of(printed)
    elements = 2 * (64 * 3072 + 3072 + 2 * 1024 + 2 * 1024 * 1024 + 1024 * 2 + 2)  # G and fake score, by hand
    mebi = elements / 2**20
    assert marked == [2] and "16 ranks × 1 accumulated × 4" in printed
    assert [row["parameters"] for row in rows[:3]] == pytest.approx([2 * mebi] * 3, abs=0.06)
    assert [row["optimizer"] for row in rows] == pytest.approx([12 * mebi, *[12 * mebi / 16] * 3], abs=0.06)
    assert [row["EMA"] for row in rows] == pytest.approx([2 * mebi, *[2 * mebi / 16] * 3], abs=0.06)
    assert [row["buckets"] for row in rows] == [0, 2, 2, 4]
    assert [row["gradients"] for row in rows] == pytest.approx([mebi, mebi / 16, mebi / 16, 2 * mebi / 16], abs=0.06)
    assert all(row["total"] >= sum(list(row.values())[:5]) for row in rows)
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_divide_the_batch_are_refused(capsys):
    assert main(["--config", TOY, "--dry-run", "--ranks", "7", "train.global_batch_size=64"]) == 2
    assert "does not divide by 7 ranks" in capsys.readouterr().err
    assert main(["--config", TOY, "--ranks", "2"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_disk_is_twelve_bytes_a_parameter_and_four_of_the_average():
    network = PlannedNetwork.of(MLPOptions(kind="mlp", hidden=8, depth=1, embedding=4), (2,), False)
    elements = 4 * 8 + 8 + 2 * 8 + 8 * 2 + 2
    disk = disk_use(PlannedNetworks({"generator": network, "fake_score": network}, network, "generator"), keep=3)
    assert disk.checkpoint == 2 * 12 * elements + 4 * elements
    assert (disk.export, disk.peak) == (4 * elements, 4 * disk.checkpoint)


TIMED = ["--config", TOY, "--dry-run", "--time-iterations", "2", "train.steps=1000"]


def check_timing(printed, ranks, folder):
    assert printed.count("time: ") == 1 and f"on {ranks} ranks" in printed
    line = next(line for line in printed.splitlines() if line.startswith("time: "))
    seconds, hours = float(line.split()[1]), float(printed.split(line)[1].split()[0])
    assert seconds > 0 and hours == pytest.approx(1000 * seconds / 3600, rel=0.02)
    assert not (folder / "run").exists() and not list(folder.glob("rdmd-dry-run-*"))


def test_timed_iterations_leave_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main([*TIMED, f"run_dir={tmp_path}/run"]) == 0
    check_timing(capsys.readouterr().out, 1, tmp_path)


@pytest.mark.slow
def test_ranks_time_iterations_together(tmp_path):
    arguments = [*TIMED, f"run_dir={tmp_path}/run", "deepspeed.zero_optimization.stage=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "rdmd_fast/train.py"), *arguments],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_timing(done.stdout, 2, tmp_path)
