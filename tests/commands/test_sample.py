"""``rdmd sample``: what it writes, for which classes, and what it refuses."""

import sys
import types

import numpy as np
import pytest
import torch
from material import error_line
from PIL import Image

from rdmd_fast import cli, load_denoiser
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks import build_network
from rdmd_fast.networks.options import MLPOptions, SongUNetOptions
from rdmd_fast.randomness import Philox, Stream
from rdmd_fast.samplers import Churn, churn_noise, heun_sample, karras_levels


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained teachers with weights large enough to tell classes and noise apart."""
    folder = tmp_path_factory.mktemp("models")
    unet = dict(kind="song_unet", model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.0)
    cases = {
        "plain": (SongUNetOptions(**unet), (3, 8, 8), None),
        "classes": (SongUNetOptions(**unet, label_dim=3), (3, 8, 8), None),
        "target": (SongUNetOptions(**unet, label_dim=3), (3, 8, 8), 1),
        "grey": (SongUNetOptions(**unet), (1, 8, 8), None),
        "latents": (SongUNetOptions(**unet), (5, 8, 8), None),
        "points": (MLPOptions(kind="mlp", hidden=8, depth=1), (2,), None),
    }
    for name, (options, shape, target_class) in cases.items():
        torch.manual_seed(0)
        network = build_network(options, shape)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_uniform_(parameter)
        config = ExportConfig(
            role="teacher", network=options, sample_shape=list(shape), diffusion=DiffusionOptions(),
            target_class=target_class,
        )  # fmt: skip
        write_export(folder / name, config, network.state_dict())
    return folder


def sample(model, out, *options):
    return cli.main(["sample", "--model", str(model), "--out", str(out), "--steps", "3", "--device", "cpu", *options])


def pixels(folder, suffix="png"):
    paths = sorted(folder.rglob(f"*.{suffix}"))
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def test_folder_holds_the_library_samples_as_numbered_pngs(models, tmp_path, capsys):
    assert sample(models / "plain", tmp_path, "--count", "5", "--seed", "7") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(5)]
    noise = Philox(7).normal(Stream.SAMPLER, torch.arange(5), (3, 8, 8))
    expected = heun_sample(load_denoiser(models / "plain"), noise, karras_levels(3))
    expected = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pixels(tmp_path), expected, atol=0.51)
    assert "5 samples" in capsys.readouterr().out


def test_options_of_levels_and_churn_reach_the_sampler(models, tmp_path):
    levels = ["--sigma-min", "0.01", "--sigma-max", "20", "--rho", "5"]
    churn = ["--churn", "2", "--s-min", "0.02", "--s-max", "30", "--s-noise", "1.1"]
    assert sample(models / "plain", tmp_path, "--count", "4", *levels, *churn) == 0
    philox, positions, shape = Philox(0), torch.arange(4), (3, 8, 8)
    expected = heun_sample(
        load_denoiser(models / "plain"), philox.normal(Stream.SAMPLER, positions, shape),
        karras_levels(3, 0.01, 20.0, 5.0), Churn(2.0, 0.02, 30.0, 1.1), churn_noise(philox, positions, shape),
    )  # fmt: skip
    expected = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pixels(tmp_path), expected, atol=0.51)


def test_samples_do_not_depend_on_the_batch_size(models, tmp_path):
    for size in (2, 64):
        assert (
            sample(models / "plain", tmp_path / str(size), "--count", "5", "--churn", "1", "--batch-size", f"{size}")
            == 0
        )
    assert np.abs(pixels(tmp_path / "2") - pixels(tmp_path / "64")).max() <= 1


def test_low_precision_stays_close(models, tmp_path):
    for dtype in ("fp32", "bf16", "fp16"):
        assert sample(models / "plain", tmp_path / dtype, "--count", "2", "--dtype", dtype) == 0
    exact = pixels(tmp_path / "fp32")
    for dtype, levels in (("bf16", 8), ("fp16", 1)):
        error = np.abs(pixels(tmp_path / dtype) - exact).mean()
        assert 0 < error < levels, dtype


def test_grid_is_one_picture(models, tmp_path):
    assert sample(models / "grey", tmp_path / "new" / "grid.PNG", "--count", "9") == 0
    with Image.open(tmp_path / "new/grid.PNG") as picture:
        assert picture.width > 8 * 48 and 2 * 48 < picture.height < 3 * 48  # a row of eight and a row of one
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.PNG"]


def test_classes_have_a_row_of_the_grid_and_a_folder_each(models, tmp_path):
    assert sample(models / "classes", tmp_path / "grid.png", "--class", "all", "--count", "2") == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.height > 3 * 48 and picture.width < 4 * 48
    assert sample(models / "classes", tmp_path / "all", "--class", "all", "--count", "2") == 0
    names = sorted(str(path.relative_to(tmp_path / "all")) for path in (tmp_path / "all").rglob("*.png"))
    assert names == ["0/000000.png", "0/000001.png", "1/000002.png", "1/000003.png", "2/000004.png", "2/000005.png"]


def test_each_sample_is_of_its_class(models, tmp_path):
    """Number i has one noise whatever the class: samples 2 and 3 of class 1 stand in both folders."""
    assert sample(models / "classes", tmp_path / "all", "--class", "all", "--count", "2") == 0
    assert sample(models / "classes", tmp_path / "one", "--class", "1", "--count", "4") == 0
    assert sample(models / "target", tmp_path / "target", "--count", "4") == 0
    of_all, of_one = pixels(tmp_path / "all"), pixels(tmp_path / "one")
    assert np.array_equal(of_all[2:4], of_one[2:4]) and not np.array_equal(of_all[:2], of_one[:2])
    assert np.array_equal(pixels(tmp_path / "target"), of_one)


def test_random_classes_are_even_and_drawn_by_number(models, tmp_path):
    from argparse import Namespace

    from rdmd_fast.commands.sample import sample_classes

    drawn = sample_classes(Namespace(count=3000, classes="random", seed=1), 3, None)
    assert np.abs(torch.bincount(drawn, minlength=3).numpy() - 1000).max() < 4 * np.sqrt(1000)
    assert torch.equal(drawn[:50], sample_classes(Namespace(count=50, classes="random", seed=1), 3, None))
    assert sample(models / "classes", tmp_path, "--class", "random", "--count", "6") == 0
    folders = {path.parent.name for path in tmp_path.rglob("*.png")}
    assert folders <= {"0", "1", "2"} and len(folders) > 1


def test_no_class_is_said_and_is_no_class(models, tmp_path, capsys):
    assert sample(models / "classes", tmp_path / "none", "--count", "1") == 0
    assert "without a class" in capsys.readouterr().err
    for label in range(3):
        assert sample(models / "classes", tmp_path / f"{label}", "--count", "1", "--class", f"{label}") == 0
        assert not np.array_equal(pixels(tmp_path / "none"), pixels(tmp_path / f"{label}"))


def test_latents_are_arrays_or_decoded(models, tmp_path, monkeypatch):
    assert sample(models / "latents", tmp_path / "arrays", "--count", "3") == 0
    arrays = [np.load(tmp_path / f"arrays/{i:06d}.npy", allow_pickle=False) for i in range(3)]
    assert all(array.shape == (5, 8, 8) and array.dtype == np.float32 for array in arrays)

    class Autoencoder(torch.nn.Module):
        def __init__(self, folder):
            super().__init__()
            assert folder == "decoder"

        def decode(self, latents):
            return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    module = types.ModuleType("rdmd_fast.model_files.autoencoder")
    module.Autoencoder = Autoencoder
    monkeypatch.setitem(sys.modules, "rdmd_fast.model_files.autoencoder", module)
    assert sample(models / "latents", tmp_path / "images", "--count", "3", "--autoencoder", "decoder") == 0
    expected = ((arrays[2][:3].transpose(1, 2, 0) + 1) * 127.5).clip(0, 255)
    np.testing.assert_allclose(pixels(tmp_path / "images")[2][::2, ::2], expected, atol=0.51)
    assert sample(models / "latents", tmp_path / "grid.png", "--count", "3", "--autoencoder", "decoder") == 0


@pytest.mark.parametrize("model,out,options,words", [
    ("plain", "o", ["--class", "1"], "no classes"),
    ("classes", "o", ["--class", "3"], "from 0 to 2"),
    ("classes", "o", ["--class", "-1"], "from 0 to 2"),
    ("classes", "o", ["--class", "cat"], "from 0 to 2"),
    ("latents", "o.png", [], "5 channels"),
    ("points", "o", [], "points"),
    ("nowhere", "o", [], "nowhere"),
    ("plain", "o", ["--steps", "1"], "--steps"),
    ("plain", "o", ["--count", "0"], "--count"),
    ("plain", "o", ["--batch-size", "0"], "--batch-size"),
    ("plain", "o", ["--sigma-min", "0"], "--sigma-min"),
    ("plain", "o", ["--sigma-min", "90"], "--sigma-min"),
    ("plain", "o", ["--sigma-max", "nan"], "--sigma-max"),
    ("plain", "o", ["--rho", "0"], "--rho"),
    ("plain", "o", ["--churn", "-1"], "--churn"),
    ("plain", "o", ["--s-noise", "nan"], "--s-noise"),
    ("plain", "o", ["--s-min", "3", "--s-max", "2"], "--s-min"),
    ("plain", "o", ["--seed", "-1"], "seed"),
    ("plain", "o", ["--device", "cuda:99"], "--device"),
    ("plain", "file", [], "choose another"),
    ("plain", "folder.png", [], "choose another"),
    ("plain", "file/below", [], "cannot be written"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(models, tmp_path, capsys, model, out, options, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert sample(models / model, tmp_path / out, "--count", "2", *options) == 2
    assert words in error_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
