"""Adapters over one base: distillation from a text-to-image pipeline, and the teacher stage of one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from text_pipelines import (
    NEGATIVE,
    PROMPT,
    flux_pipeline,
    pipeline_and_latents,
    run_values,
    sd3_pipeline,
    sources,
    train_run,
)

from benchmarks.step_sides import Ours
from rdmd_fast import cli, load_denoiser, load_generator
from rdmd_fast.commands.export import read_network
from rdmd_fast.config import validate_config
from rdmd_fast.diffusion import Reading
from rdmd_fast.engine.fp32_masters import gather_parameters
from rdmd_fast.errors import InputError
from rdmd_fast.extras import require
from rdmd_fast.model_files.autoencoder import Autoencoder
from rdmd_fast.model_files.weights import rebuild
from rdmd_fast.networks.adapters import add_adapters, merged
from rdmd_fast.networks.flops import distillation_flops
from rdmd_fast.networks.text_options import LoRAOptions
from rdmd_fast.pixels import to_uint8

ALL = {"rank": 3, "alpha": 6.0, "targets": "all"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pipeline_and_latents(tmp_path_factory.mktemp("lora"), xl=False)


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "flux"])
def either(request, folder, tmp_path_factory) -> Path:
    """Of each family."""
    if request.param in ("sd", "flux"):
        return folder if request.param == "sd" else request.getfixturevalue("flux")
    made = sd3_pipeline() if request.param == "sd3" else None
    return pipeline_and_latents(tmp_path_factory.mktemp(request.param), xl=True, made=made)


def values(folder: Path, run: Path, **sections) -> dict:
    rates = {name: {"lr": 1e-2} for name in ("generator_optimizer", "fake_optimizer")}
    return run_values(folder, run, **{"rdmd": rates, "lora": ALL, **sections})


def train(folder: Path, run: Path, *words: str, **sections) -> int:
    return train_run(values(folder, run, **sections), *words)


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return pipeline_and_latents(tmp_path_factory.mktemp("flux"), made=flux_pipeline())


@torch.no_grad()
def test_one_base_is_in_memory_and_never_moves(either, tmp_path):
    ours = Ours(validate_config(values(either, tmp_path / "run"), "here"))
    networks, export, x = ours.networks(), ours.experiment.export, sources(either)
    teacher = load_denoiser(either / "pipeline", PROMPT, NEGATIVE)
    reading = Reading.of("teacher", export.diffusion, export.generator_sigma)
    assert torch.equal(reading(networks["generator"], x), reading(teacher.model, x))

    frozen, c_noise = networks["teacher"], torch.linspace(-1, 0.6, len(x))
    before = frozen(x, c_noise)
    assert torch.equal(before, load_denoiser(either / "pipeline", PROMPT, NEGATIVE, 2.0).model(x, c_noise))
    assert torch.equal(networks["fake_score"](x, c_noise), teacher.model(x, c_noise))
    base = {name: value.clone() for name, value in frozen.library_network.state_dict().items()}
    with torch.enable_grad():
        for _ in range(3):
            ours.iteration()
    state = gather_parameters(ours.experiment.state.engines["generator"])
    exported = rebuild(export, ours.experiment.exported(state), "here")
    torch.testing.assert_close(exported(x, c_noise), networks["generator"](x, c_noise), rtol=1e-4, atol=1e-4)
    assert (exported(x, c_noise) - teacher.model(x, c_noise)).abs().max() > 1e-2
    assert torch.equal(frozen(x, c_noise), before)
    assert all(torch.equal(value, base[name]) for name, value in frozen.library_network.state_dict().items())

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
    assert sum(unique.values()) == sum(p.numel() for p in frozen.parameters()) + adapters
    ours.experiment.close()


def test_the_export_is_an_adapter_that_the_library_loads(either, tmp_path):
    assert train(either, tmp_path / "whole") == 0
    assert train(either, tmp_path / "halves", "train.steps=2") == 0
    assert train(either, tmp_path / "halves") == 0
    files = "generator.safetensors", "pytorch_lora_weights.safetensors"
    for file in files:
        weights, again = (load_file(tmp_path / run / "export" / file) for run in ("whole", "halves"))
        assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    export, x = tmp_path / "whole/export", sources(either)
    assert set(load_file(export / files[0])) == {f"prompt.{name}" for name in prompt_parts(either)}
    generator = load_generator(export)
    y = generator(x)
    assert (y - load_denoiser(either / "pipeline", PROMPT)(x, generator.config.generator_sigma)).abs().max() > 1e-2

    diffusers = require("diffusers", "text")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(either / "pipeline", local_files_only=True)
    pipeline.load_lora_weights(export, weight_name=files[1])
    part = generator.model.part
    generator.model.add_module(part, getattr(pipeline, part))
    torch.testing.assert_close(generator(x).detach(), y, rtol=1e-4, atol=1e-4)

    card = (export / "README.md").read_text()
    name = "U-Net" if part == "unet" else part
    assert f"a low-rank adapter over the {name} of the pipeline `{either / 'pipeline'}`" in card
    assert f"| prompt | `{PROMPT}` |" in card and "| adapter | `rank 3, alpha 6.0, targets all` |" in card

    pictures = tmp_path / "pictures"
    words = ["translate", "--model", export, "--input", either / "pictures", "--output", pictures, "--device", "cpu"]
    assert cli.main(list(map(str, words))) == 0
    names = [path.name for path in sorted((either / "pictures").iterdir())]
    assert [path.name for path in sorted(pictures.iterdir())] == names
    decoded = Autoencoder(either / "pipeline").decode(y)
    first = torch.from_numpy(np.array(Image.open(pictures / names[0]))).permute(2, 0, 1)
    assert (first.int() - to_uint8(decoded)[0].int()).abs().max() <= 1

    assert cli.main(["export", str(export), "--merge", "--out", str(tmp_path / "merged")]) == 0
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"config.json", "README.md", files[0]}
    assert torch.equal(load_generator(tmp_path / "merged")(x), y)
    assert cli.main(["export", str(tmp_path / "whole"), "--merge", "--out", str(tmp_path / "of_run")]) == 0
    assert torch.equal(load_generator(tmp_path / "of_run")(x), y)

    checkpoint = next((tmp_path / "whole/checkpoints").glob("step_*4"))
    config, weights = read_network(checkpoint, "generator")
    assert config == load_generator(export).config.model_copy(update={"base_sha256": config.base_sha256})
    assert all(torch.equal(weights[name], value) for name, value in load_file(export / files[1]).items())
    fake, state = read_network(checkpoint, "fake_score", "raw")
    assert fake.role == "teacher" and state.keys() == weights.keys()


def test_a_teacher_stage_and_a_distillation_of_its_export(folder, tmp_path):
    """The one adapter that is exported at the end holds both, of 3 and of 2 rows."""
    own = {"teacher_negative_prompt": None, "teacher_guidance": None, "rdmd": {}}
    stage = {
        "stage": "teacher",
        "data": {"target": str(folder / "shards")},
        "teacher_stage": {"optimizer": {"lr": 1e-2}},
    }
    assert train(folder, tmp_path / "teacher", **own, **stage) == 0
    teacher = tmp_path / "teacher/export"
    x, sigma = sources(folder), torch.full((8,), 1.5, dtype=torch.float64)
    adapted = load_denoiser(teacher)
    with torch.no_grad():
        assert (adapted(x, sigma) - load_denoiser(folder / "pipeline", PROMPT)(x, sigma)).abs().max() > 1e-2

    few = {"teacher": str(teacher), "lora": {"rank": 2, "targets": "attention"}}
    ours = Ours(validate_config(values(folder, tmp_path / "begun", **few), "here"))
    reading = Reading.of("teacher", ours.experiment.export.diffusion, ours.experiment.export.generator_sigma)
    with torch.no_grad():
        torch.testing.assert_close(reading(ours.networks()["generator"], x), reading(adapted.model, x))
    ours.experiment.close()

    assert train(folder, tmp_path / "run", **few) == 0
    held = load_file(tmp_path / "run/export/pytorch_lora_weights.safetensors")
    rows = {len(tensor) for name, tensor in held.items() if name.endswith("lora_A.weight")}
    assert rows == {3, 5}
    generator = load_generator(tmp_path / "run/export")
    pipeline = require("diffusers", "text").DiffusionPipeline.from_pretrained(
        folder / "pipeline", local_files_only=True
    )
    pipeline.load_lora_weights(tmp_path / "run/export", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        y = generator(x)
        generator.model.unet = pipeline.unet
        torch.testing.assert_close(generator(x), y, rtol=1e-4, atol=1e-4)
    _config, weights = read_network(next((tmp_path / "run/checkpoints").glob("step_*4")), "generator")
    assert all(torch.equal(weights[name], value) for name, value in held.items())


def test_the_fake_score_can_have_a_prompt_of_its_own(folder, tmp_path):
    ours = Ours(validate_config(values(folder, tmp_path / "run", fake_prompt="a cat"), "here"))
    networks, x = ours.networks(), sources(folder)
    with torch.no_grad():
        cat = load_denoiser(folder / "pipeline", "a cat").model
        torch.testing.assert_close(networks["fake_score"](x, torch.zeros(8)), cat(x, torch.zeros(8)))
        lion = load_denoiser(folder / "pipeline", PROMPT).model
        torch.testing.assert_close(networks["generator"](x, torch.zeros(8)), lion(x, torch.zeros(8)))
        assert (networks["generator"](x, torch.zeros(8)) - cat(x, torch.zeros(8))).abs().max() > 1e-3
    ours.experiment.close()


@torch.no_grad()
def test_generator_and_fake_score_can_have_a_guidance_embedding_of_their_own(flux, tmp_path):
    told = dict(guidance_embedding=2.5, student_guidance_embedding=1.0, teacher_guidance=None, fake_prompt="a cat")
    ours = Ours(validate_config(values(flux, tmp_path / "run", **told), "here"))
    networks, x, c_noise = ours.networks(), sources(flux), torch.zeros(8)
    assert networks["teacher"].guidance == 1  # its embedding is the guidance
    for role, prompt, embedding in (("teacher", PROMPT, 2.5), ("generator", PROMPT, 1.0), ("fake_score", "a cat", 1.0)):
        expected = load_denoiser(flux / "pipeline", prompt, guidance_embedding=embedding).model
        torch.testing.assert_close(networks[role](x, c_noise), expected(x, c_noise))
    ours.experiment.close()


def test_dry_run_counts_one_base_and_two_adapters(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--dry-run", "--gpu-memory", "1") == 0
    said = capsys.readouterr().out
    teacher = load_denoiser(folder / "pipeline", PROMPT).model
    base = sum(parameter.numel() for parameter in teacher.parameters())
    layers = [layer for layer in teacher.unet.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    adapter = sum(3 * (layer.weight[0].numel() + len(layer.weight)) for layer in layers)
    line = next(line for line in said.splitlines() if line.startswith("  ZeRO 0"))
    assert float(line.split()[2]) == pytest.approx(4 * (base + 2 * adapter) / 2**20, abs=0.06)
    assert train(folder, tmp_path / "run", "--dry-run", "--gpu-memory", "0.001", lora=None) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        "memory: 0.0 GiB are needed and a GPU has 0.0: use lora, train.activation_checkpointing=true, a lower" in line
    )
    assert f"generator    {adapter / 1e6:10.3f} M" in said and f"teacher      {base / 1e6:10.3f} M" in said


def test_adapters_spare_the_gradients_of_frozen_weights():
    """Forward passes of G 2, teacher 3, fake score 5: backward passes count as two, as one with adapters."""
    whole = 3 * 2 + 3 + 5 + 2 * 3 * 5 + 2
    assert distillation_flops(2, 3, 5, 2) == whole
    assert distillation_flops(2, 3, 5, 2, adapters=True) == whole - 2 - 2 * 5


def prompt_parts(folder: Path) -> list[str]:
    names = json.loads((folder / "pipeline/model_index.json").read_text())
    more = {"StableDiffusionXLPipeline": ["pooled", "time_ids"], "StableDiffusion3Pipeline": ["pooled"]}
    more["FluxPipeline"] = ["pooled", "guidance"]
    return ["embeds", *more.get(names["_class_name"], [])]


BAD = {
    "no prompt": (
        {"teacher_prompt": None, "teacher_negative_prompt": None, "teacher_guidance": None},
        "lora: belongs to a teacher_prompt",
    ),
    "rank 0": ({"lora": {"rank": 0}}, "lora.rank: "),
    "unknown targets": ({"lora": {"targets": "everything"}}, "lora.targets: "),
    "no guidance embedding": ({"student_guidance_embedding": 1.0}, "is not told its guidance, remove the key"),
    "another teacher": ({"teacher": "other", "teacher_prompt": PROMPT}, "is no text-to-image pipeline"),
    "guidance of a teacher stage": (
        {"stage": "teacher", "data": {"target": "shards"}, "teacher_negative_prompt": None, "rdmd": {}},
        "teacher_guidance: is for stage rdmd",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_one_line_and_exit_2(folder, tmp_path, capsys, case):
    changes, expected = BAD[case]
    if changes.get("teacher") == "other":
        changes = changes | {"teacher": str(Path(__file__).parent / "networks/fixtures/diffusers_unet")}
    assert train(folder, tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_targets_that_match_nothing_are_named(tmp_path):
    """A U-Net without attention."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match=r"lora.targets: attention finds no layer in this Sequential, use all"):
        add_adapters(network, LoRAOptions(rank=1))


def test_adapters_over_another_pipeline_are_refused(folder, tmp_path):
    base = {"x.weight": torch.zeros(3, 2, 1, 1), "y.weight": torch.zeros(3, 2)}
    down, up = torch.randn(1, 2, 1, 1), torch.randn(3, 1, 1, 1)
    result = merged(base, {"x.lora_A.weight": down, "x.lora_B.weight": up}, "here")
    torch.testing.assert_close(result["x.weight"], torch.einsum("rihw,or->oihw", down, up[..., 0, 0]))
    assert torch.equal(result["y.weight"], base["y.weight"])
    with pytest.raises(InputError, match=r"here: x has half an adapter, x.lora_A.weight alone"):
        merged(base, {"x.lora_A.weight": down}, "here")
    for name, tensors in (("z", (down, up)), ("y", (torch.zeros(1, 5), torch.zeros(3, 1)))):
        adapter = {f"{name}.lora_A.weight": tensors[0], f"{name}.lora_B.weight": tensors[1]}
        with pytest.raises(InputError, match=rf"here: {name}.lora_A.weight fits no layer of the base"):
            merged(base, adapter, "here")


def test_a_base_that_is_away_or_another_is_named(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "train.steps=1") == 0
    path = tmp_path / "run/export/config.json"
    text, pipeline = path.read_text(), str(folder / "pipeline")
    path.write_text(text.replace(pipeline, "/nowhere"))
    with pytest.raises(InputError, match=r"over the pipeline /nowhere, which is not there: put it back"):
        load_generator(tmp_path / "run/export")
    path.write_text(text.replace(json.loads(text)["base_sha256"], "0" * 64))
    with pytest.raises(InputError, match=r"over another pipeline than .* is now"):
        load_generator(tmp_path / "run/export")
