"""Adapters over one base: distillation from a text-to-image pipeline, and the teacher stage of one."""

from pathlib import Path

import pytest
import torch
import yaml
from material import pack, write_pictures
from safetensors.torch import load_file
from text_pipelines import saved

from benchmarks.step_sides import Ours
from rdmd_fast import load_denoiser, load_generator
from rdmd_fast.commands.export import read_network
from rdmd_fast.config import validate_config
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.diffusion import Reading
from rdmd_fast.extras import require
from rdmd_fast.trainer import main

PROMPT, NEGATIVE = "a lion", "blurry"
ALL = {"rank": 3, "alpha": 6.0, "targets": "all"}


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "sdxl"])
def folder(request, tmp_path_factory) -> Path:
    """A pipeline, and eight pictures of 16×16 packed by its autoencoder to latents of 4×8×8."""
    folder = tmp_path_factory.mktemp("lora")
    saved(folder / "pipeline", request.param)
    write_pictures(folder / "pictures", *(f"{number}.png" for number in range(8)))
    encoder = ("--encoder", folder / "pipeline", "--resolution", 16, "--device", "cpu")
    assert pack(folder / "pictures", "--out", folder / "shards", *encoder) == 0
    return folder


def values(folder: Path, run: Path, **sections) -> dict:
    telemetry = {"tensorboard": False, "log_every": 1, "sample_every": 0}
    train = {"steps": 4, "global_batch_size": 2, "micro_batch_size": 2}
    found = {"stage": "rdmd", "run_dir": str(run), "data": {"source": str(folder / "shards")}, "train": train}
    found |= {"teacher": str(folder / "pipeline"), "teacher_prompt": PROMPT, "teacher_negative_prompt": NEGATIVE}
    rates = {name: {"lr": 1e-2} for name in ("generator_optimizer", "fake_optimizer")}
    found |= {"telemetry": telemetry, "teacher_guidance": 2.0, "checkpoint": {"every": 2}, "rdmd": rates, "lora": ALL}
    return found | sections


def train(folder: Path, run: Path, *words: str, **sections) -> int:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values(folder, run, **sections)))
    return main(["--config", str(path), *words])


def sources(folder: Path) -> torch.Tensor:
    shards = ShardSet(folder / "shards")
    return torch.stack([torch.tensor(shards.read(index)) for index in range(len(shards))])


@torch.no_grad()
def test_one_base_is_in_memory_and_never_moves(folder, tmp_path):
    ours = Ours(validate_config(values(folder, tmp_path / "run"), "here"))
    networks, export, x = ours.networks(), ours.experiment.export, sources(folder)
    teacher = load_denoiser(folder / "pipeline", PROMPT, NEGATIVE)
    reading = Reading.of("teacher", export.diffusion, export.generator_sigma)
    assert torch.equal(reading(networks["generator"], x), reading(teacher.model, x))

    frozen, c_noise = networks["teacher"], torch.linspace(-1, 0.6, len(x))
    before = frozen(x, c_noise)
    assert torch.equal(before, load_denoiser(folder / "pipeline", PROMPT, NEGATIVE, 2.0).model(x, c_noise))
    assert torch.equal(networks["fake_score"](x, c_noise), teacher.model(x, c_noise))
    base = {name: value.clone() for name, value in frozen.unet.state_dict().items()}
    with torch.enable_grad():
        for _ in range(3):
            ours.iteration()
    assert torch.equal(frozen(x, c_noise), before)
    assert all(torch.equal(value, base[name]) for name, value in frozen.unet.state_dict().items())

    adapters = 0
    held = {parameter.data_ptr() for parameter in frozen.parameters()}
    for role in ("generator", "fake_score"):
        network, engine = networks[role], ours.experiment.state.engines[role]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        assert {p.data_ptr() for p in network.parameters() if not p.requires_grad} == held
        assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
        assert {id(p) for group in engine.optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}
        adapters += sum(p.numel() for p in trained)
    unique = {p.data_ptr(): p.numel() for network in networks.values() for p in network.parameters()}
    assert sum(unique.values()) == sum(value.numel() for value in base.values()) + adapters
    ours.experiment.close()


def test_the_export_is_an_adapter_that_the_library_loads(folder, tmp_path):
    assert train(folder, tmp_path / "whole") == 0
    assert train(folder, tmp_path / "halves", "train.steps=2") == 0
    assert train(folder, tmp_path / "halves") == 0
    files = "generator.safetensors", "pytorch_lora_weights.safetensors"
    for file in files:
        weights, again = (load_file(tmp_path / run / "export" / file) for run in ("whole", "halves"))
        assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    export, x = tmp_path / "whole/export", sources(folder)
    assert set(load_file(export / files[0])) == {f"prompt.{name}" for name in prompt_parts(folder)}
    generator = load_generator(export)
    y = generator(x)
    assert (y - load_denoiser(folder / "pipeline", PROMPT)(x, generator.config.generator_sigma)).abs().max() > 1e-2

    diffusers = require("diffusers", "text")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline", local_files_only=True)
    pipeline.load_lora_weights(export, weight_name=files[1])
    generator.model.unet = pipeline.unet
    torch.testing.assert_close(generator(x).detach(), y, rtol=1e-4, atol=1e-4)

    checkpoint = next((tmp_path / "whole/checkpoints").glob("step_*4"))
    config, weights = read_network(checkpoint, "generator")
    assert config == load_generator(export).config.model_copy(update={"base_sha256": config.base_sha256})
    assert all(torch.equal(weights[name], value) for name, value in load_file(export / files[1]).items())
    fake, state = read_network(checkpoint, "fake_score", "raw")
    assert fake.role == "teacher" and state.keys() == weights.keys()


def prompt_parts(folder: Path) -> list[str]:
    return ["embeds", "pooled", "time_ids"] if (folder / "pipeline/text_encoder_2").is_dir() else ["embeds"]
