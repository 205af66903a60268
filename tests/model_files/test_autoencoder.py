"""Latents of any channel count through both stages, translation and validation; the autoencoder beside diffusers."""

import json
import shutil
import sys
from pathlib import Path

import material
import numpy as np
import pytest
import torch
import yaml
from material import npy, pixels_of, small_unet
from PIL import Image
from safetensors.torch import load_file, save_file

from rdmd_fast import cli, load_generator
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.autoencoder import Autoencoder
from rdmd_fast.trainer import main

SHAPE = (5, 8, 8)


def train(folder: Path, name: str, **sections) -> int:
    telemetry = {"tensorboard": False, "log_every": 1, "sample_count": 2} | sections.pop("telemetry", {})
    steps = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4}
    config = sections | {"run_dir": str(folder / name), "train": steps, "telemetry": telemetry}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return main(["--config", str(folder / f"{name}.yaml")])


def teacher_stage(folder: Path, name: str, **sections) -> int:
    data = {"target": str(folder / "target")}
    sections |= {"network": small_unet(1, 2), "diffusion": {"sigma_data": 1.0}}
    return train(folder, name, stage="teacher", data=data, **sections)


def rdmd_stage(folder: Path, name: str, targets: bool = True, **sections) -> int:
    data = {"source": str(folder / "source"), "source_holdout": str(folder / "source")}
    data |= {"target_holdout": str(folder / "target")} if targets else {}
    return train(folder, name, stage="rdmd", data=data, teacher=str(folder / "teacher/export"), **sections)


def metrics(run: Path, key: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents of two domains, a teacher of two steps and a distillation of two."""
    folder = tmp_path_factory.mktemp("latents")
    for seed, name in enumerate(("source", "target")):
        latents = np.random.default_rng(seed).standard_normal((12, *SHAPE), dtype=np.float32)
        material.write_shards(folder / name, latents, key="sample\N{NARROW NO-BREAK SPACE}{:02d}")
    assert teacher_stage(folder, "teacher") == 0
    assert rdmd_stage(folder, "rdmd") == 0
    return folder


def translate(folder: Path, model: Path, source: Path, *extra: str) -> int:
    arguments = ["--model", str(model), "--input", str(source), "--output", str(folder), "--device", "cpu", *extra]
    return cli.main(["translate", *arguments])


# -- without a decoder -------------------------------------------------------------------------------------------------


def test_both_stages_train_on_latents(folder):
    for run in ("teacher", "rdmd"):
        config = json.loads((folder / run / "export/config.json").read_text())
        assert config["sample_shape"] == list(SHAPE) and config["diffusion"]["sigma_data"] == 1.0
        assert not list((folder / run).rglob("*.png"))
    assert len(metrics(folder / "teacher", "loss")) == len(metrics(folder / "rdmd", "fake_loss")) == 2
    assert all(np.isfinite(metrics(folder / "rdmd", "transport_cost")))


def test_validation_measures_latents_in_their_own_units(folder):
    (validation,) = metrics(folder / "rdmd", "validation")
    assert validation.keys() == {"l2", "sliced_w2"}
    shards = ShardSet(folder / "source")
    x = torch.from_numpy(np.stack([shards.read(index) for index in range(len(shards))]))
    y = load_generator(folder / "rdmd/best")(x)
    assert validation["l2"] == pytest.approx((y - x).flatten(1).norm(dim=1).mean().item(), rel=1e-5)


def test_the_run_says_once_that_there_are_no_pictures(folder, capsys):
    assert rdmd_stage(folder, "said", telemetry={"sample_every": 1}) == 0
    output = capsys.readouterr().out
    assert output.count("no pictures: samples of 5 channels are drawn where telemetry.decoder names a decoder") == 1
    assert "final.png" not in output


def test_without_targets_no_export_is_the_best(folder):
    assert rdmd_stage(folder, "faithful", targets=False) == 0
    (validation,) = metrics(folder / "faithful", "validation")
    assert validation.keys() == {"l2"} and not (folder / "faithful/best").exists()


def test_judge_of_digits_is_refused(folder, capsys):
    assert rdmd_stage(folder, "judged", validation={"judge": str(folder), "judge_label": 3}) == 2
    assert "validation.judge: judges images, data.source holds arrays" in capsys.readouterr().err


def test_translation_of_shards_and_of_arrays_is_the_generator(folder, tmp_path):
    model = folder / "rdmd/export"
    assert translate(tmp_path / "out", model, folder / "source") == 0
    shards = ShardSet(folder / "source")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{key}.npy" for key in shards.keys]
    x = torch.from_numpy(np.stack([shards.read(index) for index in range(len(shards))]))
    y = np.stack([np.load(tmp_path / f"out/{key}.npy") for key in shards.keys])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, load_generator(model)(x).numpy(), rtol=1e-5, atol=1e-5)

    (tmp_path / "in/deep").mkdir(parents=True)
    np.save(tmp_path / "in/a.npy", x[0].numpy())
    np.save(tmp_path / "in/deep/b.c.npy", x[1].double().numpy())
    assert translate(tmp_path / "again", model, tmp_path / "in", "--batch-size", "1") == 0
    for index, name in enumerate(("a.npy", "deep/b.c.npy")):
        np.testing.assert_allclose(np.load(tmp_path / "again" / name), y[index], rtol=1e-5, atol=1e-5)


LATENT, BLACK = npy(np.zeros(SHAPE, np.float32)), material.encoded(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(("files", "expected"), [
    ({"a.npy": npy(np.zeros((4, 8, 8), np.float32))}, "a.npy: has shape (4, 8, 8), the network takes (5, 8, 8)"),
    ({"a.npy": npy(np.array([{}]), allow_pickle=True)}, "a.npy: not a .npy array of floats"),
    ({"a.npy": b"<html>"}, "a.npy: not a .npy array of floats"),
    (
        {"a.npy": npy(np.zeros(SHAPE, np.int32))},
        "a.npy: not a .npy array of floats (holds int32; save float32 or float16)",
    ),
    ({"a.npy": LATENT[:-4]}, "a.npy: not a .npy array of floats"),
    ({"a.npy": LATENT, "b.png": BLACK}, "holds images (b.png) and .npy files (a.npy)"),
    ({"b.png": BLACK}, "image files are RGB, the network takes 5 channels"),
], ids=["shape", "objects", "text", "integers", "longer than the file", "mixed", "images"])  # fmt: skip
def test_bad_inputs_of_translate_are_one_line(folder, tmp_path, capsys, files, expected):
    material.write_files(tmp_path / "in", files)
    assert translate(tmp_path / "out", folder / "rdmd/export", tmp_path / "in") == 2
    assert expected in material.error_line(capsys)
    assert not list(tmp_path.glob("out/*"))


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"diffusers is not installed: run `pip install rdmd_fast\[diffusers\]`"):
        Autoencoder(tmp_path)


@pytest.mark.parametrize(("text", "expected"), [
    (None, "config.json: missing"),
    ("{", "not readable as JSON"),
    ('{"_class_name": "VQModel"}', "_class_name is 'VQModel', supported: AutoencoderKL"),
])  # fmt: skip
def test_folder_without_an_autoencoder_is_one_line(tmp_path, text, expected):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        Autoencoder(tmp_path)
    assert expected in str(error.value) and "\n" not in str(error.value)


# -- with diffusers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A small autoencoder of 16 × 16 images, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=5, shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(path)
    return path, model


def test_encoding_and_decoding_are_those_of_diffusers(saved):
    path, model = saved
    images = torch.rand(20, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = (model.encode(images).latent_dist.mode() - 0.1) * 0.5
        decoded = model.decode(expected / 0.5 + 0.1).sample.clamp(-1, 1)
    autoencoder = Autoencoder(path)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.image_shape(SHAPE)) == (5, 2, (3, 16, 16))
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="sides that divide by 2"):
        autoencoder.encode(images[..., 1:])
    with pytest.raises(InputError, match="decodes 5 channels"):
        autoencoder.decode(latents[:, 1:])


def test_large_pictures_go_by_the_librarys_tiles(saved, monkeypatch):
    """Others in as many at a time as fit the pixels that there is memory for."""
    autoencoder = Autoencoder(saved[0])
    seen = []
    decode = autoencoder._decode
    monkeypatch.setattr(
        autoencoder, "_decode", lambda part: seen.append((len(part), autoencoder.model.use_tiling)) or decode(part)
    )
    latents = torch.randn(3, autoencoder.channels, 8, 8)
    pixels = (8 * autoencoder.factor) ** 2
    whole = autoencoder.decode(latents)
    monkeypatch.setattr(Autoencoder, "CHUNK", 2 * pixels)
    torch.testing.assert_close(autoencoder.decode(latents), whole)
    monkeypatch.setattr(Autoencoder, "LARGEST", pixels - 1)
    autoencoder.decode(latents)
    assert seen == [(3, False), (2, False), (1, False), (2, True), (1, True)]


def test_old_attention_weights_are_read(saved, tmp_path):
    path, _ = saved
    weights = load_file(path / "diffusion_pytorch_model.safetensors")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, name in old.items():
        weights = {key.replace(new, name): tensor for key, tensor in weights.items()}
    weights = {key: t[..., None, None] if ".query.weight" in key else t for key, t in weights.items()}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(Autoencoder(tmp_path).encode(images), Autoencoder(path).encode(images))


@pytest.mark.parametrize("changes", [{"block_out_channels": "x"}, {"scaling_factor": 0}, {"latent_channels": -1}])
def test_damaged_configuration_is_one_line(saved, tmp_path, changes):
    path, _ = saved
    (tmp_path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    shutil.copy(path / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(InputError, match=r"config.json: describes no AutoencoderKL") as error:
        Autoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_pictures_are_decoded_and_change_nothing_else(folder, saved):
    path, _ = saved
    assert rdmd_stage(folder, "decoded", telemetry={"decoder": str(path)}) == 0
    with Image.open(folder / "decoded/samples/final.png") as picture:
        assert picture.height > 4 * 48  # four rows of 16 × 16 images, enlarged
    exports = [load_file(folder / run / "export/generator.safetensors") for run in ("rdmd", "decoded")]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])
    assert teacher_stage(folder, "decoded_teacher", telemetry={"decoder": str(path)}) == 0
    assert (folder / "decoded_teacher/samples/final.png").exists()


def test_translation_through_the_autoencoder(folder, saved, tmp_path):
    path, _ = saved
    pixels = material.random_pixels(0, 16, 16, 3)
    material.save_images(tmp_path / "in", {"a.png": pixels})
    assert translate(tmp_path / "out", folder / "rdmd/export", tmp_path / "in", "--autoencoder", str(path)) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.npy", "a.png"]
    autoencoder = Autoencoder(path)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    y = load_generator(folder / "rdmd/export")(autoencoder.encode(x))
    np.testing.assert_allclose(np.load(tmp_path / "out/a.npy"), y[0].numpy(), rtol=1e-4, atol=1e-4)
    expected = ((autoencoder.decode(y)[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    np.testing.assert_allclose(pixels_of(tmp_path / "out/a.png"), expected, atol=0.6)
    # Latents come out as arrays and pictures, too.
    assert translate(tmp_path / "both", folder / "rdmd/export", folder / "source", "--autoencoder", str(path)) == 0
    assert len(list((tmp_path / "both").glob("*.npy"))) == len(list((tmp_path / "both").glob("*.png"))) == 12
