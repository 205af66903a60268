"""Folders of diffusers in all their layouts, damaged and foreign ones, and a distillation from one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from material import random_pixels, write_shards
from safetensors.torch import load_file, save_file

from rdmd_fast import load_denoiser
from rdmd_fast.diffusion import denoise
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.diffusers_folder import is_diffusers_folder, read_diffusers, read_diffusers_config
from rdmd_fast.model_files.export_format import write_export
from rdmd_fast.model_files.weights import load_weights, rebuild
from rdmd_fast.networks.diffusers_options import FlowSchedule
from rdmd_fast.networks.flops import forward_flops
from rdmd_fast.trainer import main

FOLDER = Path(__file__).parents[1] / "networks/fixtures/diffusers_unet"
MODEL, SCHEDULER, WEIGHTS = "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("reference*")))


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys() and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_config_says_how_to_build_and_read_the_network():
    config, weights = read_diffusers(FOLDER)
    assert config == read_diffusers_config(FOLDER)
    assert (config.role, config.sample_shape, config.network.label_dim) == ("teacher", [3, 8, 8], 3)
    assert config.diffusion.parameterization == "epsilon"
    assert config.network.schedule.beta_end == 0.02
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_pipeline_folder_and_its_unet_read_like_the_bare_folder(folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    (pipeline / "scheduler").mkdir(parents=True)
    shutil.copy(folder / SCHEDULER, pipeline / "scheduler")
    shutil.copytree(folder, pipeline / "unet", ignore=shutil.ignore_patterns(SCHEDULER))
    (pipeline / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    assert_same(read_diffusers(pipeline), read_diffusers(folder))
    assert_same(read_diffusers(pipeline / "unet"), read_diffusers(folder))
    assert is_diffusers_folder(pipeline) and is_diffusers_folder(pipeline / "unet") and is_diffusers_folder(folder)


def test_weights_in_several_files_under_an_index(folder):
    expected = read_diffusers(folder)
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    parts = {"part-1.safetensors": names[:50], "part-2.safetensors": names[50:]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_diffusers(folder), expected)


def test_old_names_of_attention_weights(folder):
    expected = read_diffusers(folder)
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / WEIGHTS)
    for new, old in renamed.items():
        weights = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, folder / WEIGHTS)
    assert_same(read_diffusers(folder), expected)


@pytest.mark.parametrize(("changes", "parameterization", "kind"), [
    (dict(prediction_type="v_prediction"), "v", "vp"),
    (dict(prediction_type="sample", _class_name="DDIMScheduler"), "x0", "vp"),
    (dict(prediction_type=None, _class_name="EulerDiscreteScheduler"), "epsilon", "vp"),
    (dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0), "flow", "flow"),
])  # fmt: skip
def test_scheduler_decides_the_parameterization(folder, changes, parameterization, kind):
    edit(folder / SCHEDULER, **changes)
    config = read_diffusers_config(folder)
    assert (config.diffusion.parameterization, config.network.schedule.kind) == (parameterization, kind)


def test_flow_timesteps_scale_with_the_scheduler(folder):
    edit(folder / SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=500)
    assert read_diffusers_config(folder).network.schedule == FlowSchedule(num_train_timesteps=500)


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def pickled_weights(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def index_that_leaves_the_folder(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"conv_in.weight": "../secret.safetensors"}}')


BAD = {
    "no config": (remove(MODEL), "no config.json or unet/config.json"),
    "no scheduler": (remove(SCHEDULER), "scheduler_config.json: missing"),
    "no weights": (remove(WEIGHTS), f"{WEIGHTS}: missing"),
    "pickled weights": (pickled_weights, "a pickle, which is not loaded: save the model as safetensors"),
    "damaged weights": (write(WEIGHTS, "<html>"), "not a whole safetensors file"),
    "index outside": (index_that_leaves_the_folder, "weight_map: does not list files of this folder"),
    "damaged config": (write(MODEL, "{"), "not readable as JSON"),
    "config is a list": (write(MODEL, "[]"), "not a mapping"),
    "nested to death": (write(MODEL, "[" * 100_000), "not readable as JSON"),
    "other network": (change(MODEL, _class_name="UNet2DConditionModel"), "_class_name is 'UNet2DConditionModel'"),
    "no size": (change(MODEL, sample_size=None), "sample_size: missing"),
    "other block": (change(MODEL, down_block_types=["SkipDownBlock2D"] * 2), "down_block_types.0: input should be"),
    "other embedding": (change(MODEL, time_embedding_type="fourier"), "time_embedding_type: input should be"),
    "unknown key": (change(MODEL, gates=True), "gates: is not a key that is known here"),
    "wrong type": (change(MODEL, layers_per_block="2"), "layers_per_block: input should be a valid integer, found '2'"),
    "levels": (change(MODEL, block_out_channels=[8]), "down_block_types has 2 entries, block_out_channels 1"),
    "learned variance": (change(MODEL, out_channels=6), "out_channels is 6, in_channels 3"),
    "groups": (change(MODEL, norm_num_groups=3), "8 does not divide by norm_num_groups = 3"),
    "heads": (change(MODEL, attention_head_dim=17), "attention_head_dim: 17 is wider than a block that attends"),
    "other scheduler": (change(SCHEDULER, _class_name="ScoreSdeVeScheduler"), "_class_name is 'ScoreSdeVeScheduler'"),
    "no scheduler name": (change(SCHEDULER, _class_name=[1]), "_class_name is [1], supported: DDPMScheduler"),
    "prediction": (change(SCHEDULER, prediction_type="flow_prediction"), "prediction_type 'flow_prediction' is not"),
    "betas": (change(SCHEDULER, beta_schedule="laplace"), "beta_schedule: input should be 'linear'"),
    "no betas": (change(SCHEDULER, beta_start=None), "beta_start: missing"),
    "beta": (change(SCHEDULER, trained_betas=[0.1, 1.5]), "trained_betas.1: input should be less than 1"),
    "continuous": (change(SCHEDULER, timestep_type="continuous"), "timestep_type 'continuous' is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_clear_line(folder, case):
    damage, expected = BAD[case]
    damage(folder)
    with pytest.raises(InputError) as error:
        read_diffusers(folder)
    assert expected in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


def test_weights_of_another_network_are_named(folder):
    edit(folder / MODEL, block_out_channels=[8, 32])
    config, weights = read_diffusers(folder)
    with pytest.raises(InputError, match=r"weight \S+ has shape"):
        rebuild(config, weights, str(folder))


def test_other_folders_are_not_diffusers(tmp_path):
    assert not is_diffusers_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1}')
    assert not is_diffusers_folder(tmp_path)


# -- as a teacher ------------------------------------------------------------------------------------------------------


def test_export_rebuilds_the_network(tmp_path):
    config, weights = read_diffusers(FOLDER)
    write_export(tmp_path / "teacher", config, weights)
    denoiser = load_denoiser(tmp_path / "teacher")
    assert denoiser.config == config
    x, classes = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    labels = torch.nn.functional.one_hot(classes, 3).float()
    network = rebuild(config, weights, "here")
    expected = denoise(network, x, torch.tensor(0.7, dtype=torch.float64), config.diffusion, labels)
    assert torch.equal(denoiser(x, 0.7, classes), expected)


def test_flops_are_counted_without_weights():
    config = read_diffusers_config(FOLDER)
    assert forward_flops(config.network, (3, 8, 8)) > 1e6
    with pytest.raises(InputError, match="sides that divide by 2"):
        forward_flops(config.network, (3, 7, 7))


def test_distillation_from_a_diffusers_network(tmp_path):
    config, weights = read_diffusers(FOLDER)
    write_export(tmp_path / "teacher", config, weights)
    write_shards(tmp_path / "shards", random_pixels(0, 8, 8, 8, 3))
    (tmp_path / "config.yaml").write_text(
        f"{{stage: rdmd, run_dir: {tmp_path}/run, teacher: {tmp_path}/teacher, "
        f"data: {{source: {tmp_path}/shards, target_class: 1}}, "
        "train: {steps: 2, global_batch_size: 2, micro_batch_size: 2, dtype: bf16}, "
        "telemetry: {tensorboard: false, sample_count: 2, log_every: 1}}"
    )
    assert main(["--config", str(tmp_path / "config.yaml")]) == 0
    trained = load_file(tmp_path / "run/export/generator.safetensors")
    load_weights(rebuild(config, weights, "here"), trained, "export")
    moved = [name for name in weights if not torch.equal(trained[name], weights[name])]
    assert len(moved) == len(weights)
