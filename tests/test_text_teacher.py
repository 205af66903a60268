"""Distillation from a text-to-image pipeline, all weights trained: on latents of the pipeline's own autoencoder."""

import json
from pathlib import Path

import pytest
import torch
from material import pack
from safetensors.torch import load_file
from text_pipelines import NEGATIVE, PROMPT, pipeline_and_latents, run_values, sources, train_run

from benchmarks.step_sides import Ours
from rdmd_fast import load_denoiser, load_generator
from rdmd_fast.commands.export import read_network
from rdmd_fast.config import validate_config
from rdmd_fast.diffusion import Reading, denoise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pipeline_and_latents(tmp_path_factory.mktemp("text"), xl=False)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def either(request, folder, tmp_path_factory) -> Path:
    """Of both families."""
    return folder if request.param == "sd" else pipeline_and_latents(tmp_path_factory.mktemp("text_xl"), xl=True)


def train(folder: Path, run: Path, *words: str, **sections) -> int:
    return train_run(run_values(folder, run, **sections), *words)


@torch.no_grad()
def test_the_generator_begins_as_the_unguided_teacher_and_the_teacher_stays(either, tmp_path):
    ours = Ours(validate_config(run_values(either, tmp_path / "run"), "here"))
    networks, export, x = ours.networks(), ours.experiment.export, sources(either)
    teacher = load_denoiser(either / "pipeline", PROMPT, NEGATIVE)
    reading = Reading.of("teacher", export.diffusion, export.generator_sigma)
    initial = reading(networks["generator"], x)
    assert torch.equal(initial, reading(teacher.model, x))
    # of noise zero, in the units of the process: D(x_t) at x_t = α x
    torch.testing.assert_close(initial, teacher(x, export.generator_sigma), rtol=1e-5, atol=1e-5)
    timestep = networks["generator"].timestep(torch.tensor([reading.c_noise]))
    assert timestep == timestep.round() and abs(export.generator_sigma - 1) < 0.01

    frozen = networks["teacher"]
    c_noise = torch.linspace(-1, 0.6, len(x))
    guided = load_denoiser(either / "pipeline", PROMPT, NEGATIVE, 2.0)
    before, weights = frozen(x, c_noise), {name: value.clone() for name, value in frozen.state_dict().items()}
    assert torch.equal(before, guided.model(x, c_noise))
    with torch.enable_grad():
        for _ in range(3):
            ours.iteration()
    assert torch.equal(frozen(x, c_noise), before)
    assert all(torch.equal(value, weights[name]) for name, value in frozen.state_dict().items())
    start, trained = dict(teacher.model.named_parameters()), dict(networks["generator"].named_parameters())
    assert [name for name in start if torch.equal(start[name], trained[name])] == []
    ours.experiment.close()


def test_a_run_goes_on_bit_for_bit_and_its_export_is_whole(folder, tmp_path):
    assert train(folder, tmp_path / "whole") == 0
    assert train(folder, tmp_path / "halves", "train.steps=2") == 0
    assert train(folder, tmp_path / "halves") == 0
    whole, halves = (tmp_path / run / "export" for run in ("whole", "halves"))
    weights, again = (load_file(run / "generator.safetensors") for run in (whole, halves))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "halves")]
    one, other = (json.loads(line) for line in lines)
    assert one["fake_loss"] == other["fake_loss"] and one["transport_cost"] == other["transport_cost"]

    stored = load_file(tmp_path / "whole/prompts.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in stored if name.startswith("prompt."))
    assert not [name for name in weights if name.startswith("negative.")]
    x = sources(folder)
    y = load_generator(whole)(x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    config, fake = read_network(next((tmp_path / "whole/checkpoints").glob("step_*4")), "fake_score", "raw")
    assert config.sample_shape == [4, 8, 8] and fake.keys() == weights.keys()


def test_prompts_are_embedded_once(folder, tmp_path, monkeypatch):
    from rdmd_fast.model_files import prompts

    calls, embed = [], prompts.embed_prompts
    monkeypatch.setattr(prompts, "embed_prompts", lambda *each: calls.append(each) or embed(*each))
    said = []
    for _ in range(2):
        prompts.store_prompts(
            tmp_path / "p.safetensors", folder / "pipeline", {"prompt.": PROMPT}, None, 16, said.append
        )
    assert len(calls) == 1
    prompts.store_prompts(
        tmp_path / "p.safetensors", folder / "pipeline", {"prompt.": "a tiger"}, None, 16, said.append
    )
    assert len(calls) == 2 and not said


def test_dry_run_counts_the_guided_teacher(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--dry-run") == 0
    assert "generator" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_activation_checkpointing_changes_no_gradient(either):
    x, gradients = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    network = load_denoiser(either / "pipeline", PROMPT).model.requires_grad_(True)
    for network.checkpointing in (False, True):
        assert network.checkpointing == network.unet.is_gradient_checkpointing == bool(gradients)
        network.zero_grad()
        network(x, torch.zeros(2)).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@torch.no_grad()
def test_guidance_is_linear_in_the_output(folder):
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 3.0], dtype=torch.float64)
    outputs = []
    for guidance in (0.0, 1.0, 4.0):
        denoiser = load_denoiser(folder / "pipeline", PROMPT, NEGATIVE, guidance)
        outputs.append(denoise(denoiser.model, x, sigma, denoiser.config.diffusion))
    torch.testing.assert_close(outputs[2], outputs[0] + 4 * (outputs[1] - outputs[0]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[2], outputs[1], rtol=1e-3)


BAD = {
    "no prompt": (
        {"teacher_prompt": None, "teacher_negative_prompt": None, "teacher_guidance": None},
        "teacher_prompt",
    ),
    "guidance alone": ({"teacher_prompt": None, "teacher_negative_prompt": None}, "teacher_guidance: belongs to a"),
    "a range of λ": ({"rdmd": {"transport_weight": {"log_uniform": [0.1, 1.0]}}}, "is of one λ only, give a number"),
    "another generator": ({"generator": {"kind": "mlp"}}, "generator.kind: a text-to-image pipeline's generator is"),
    "a class": ({"data": {"source": "shards", "target_class": 1}}, "data.target_class: the network has no classes"),
    "analytic": (
        {"teacher": "analytic", "data": {"source": {"toy": "gaussian"}}},
        "teacher_prompt: is for a text-to-image",
    ),
    "no pipeline": ({"teacher": "other"}, "teacher_prompt: teacher"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_one_line_and_exit_2(folder, tmp_path, capsys, case):
    changes, expected = BAD[case]
    if "data" in changes and changes["data"]["source"] == "shards":
        changes = {"data": changes["data"] | {"source": str(folder / "shards")}}
    if changes.get("teacher") == "other":
        changes = {"teacher": str(Path(__file__).parent / "networks/fixtures/diffusers_unet")}
    assert train(folder, tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_pictures_that_are_no_latents_are_refused(folder, tmp_path, capsys):
    assert pack(folder / "pictures", "--out", tmp_path / "shards", "--resolution", 16) == 0
    assert train(folder, tmp_path / "run", data={"source": str(tmp_path / "shards")}) == 2
    assert "takes latents of 4 channels and sides that divide by 2" in capsys.readouterr().err


def test_the_teacher_stage_is_refused(folder, tmp_path, capsys):
    changes = dict(stage="teacher", data={"target": str(folder / "shards")}, teacher_prompt=None)
    changes |= dict(teacher_negative_prompt=None, teacher_guidance=None)
    assert train(folder, tmp_path / "run", **changes) == 2
    assert "teacher_prompt: missing" in capsys.readouterr().err
