"""EGSDE's network from training to file, and ``rdmd baseline`` from the command line."""

import json

import numpy as np
import pytest
import torch
from material import error_line, files_of, pack, pixels_of, random_pixels, save_images
from PIL import Image
from safetensors.torch import load_file, save_file

from rdmd_fast import cli, load_denoiser
from rdmd_fast.baselines import Models, parse_options, translate
from rdmd_fast.baselines.energy import (
    ClassifierOptions,
    EnergyConfig,
    EnergyTrainingOptions,
    build_energy,
    load_energy,
    noised_batch,
    train_energy,
)
from rdmd_fast.diffusion import DiffusionOptions, LogUniformSigma
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks import build_network
from rdmd_fast.networks.options import SongUNetOptions
from rdmd_fast.pixels import to_uint8
from rdmd_fast.randomness import Philox

SHAPE = (3, 4, 4)
SMALL = ClassifierOptions(model_channels=16, channel_mult=[1], num_blocks=1, dropout=0.0)


class Stripes:
    """A domain of two images and their negatives: stripes along an axis."""

    shape = SHAPE

    def __init__(self, axis):
        stripes = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(4, 4)
        self.image = (stripes if axis else stripes.t()).expand(SHAPE)

    def batch(self, positions):
        sign = 1 - 2 * (positions % 2)
        return (127.5 + 100 * sign[:, None, None, None] * self.image).to(torch.uint8)


def training(**changes):
    options = dict(
        network=SMALL, steps=60, batch_size=16, lr=3e-3, sigma=LogUniformSigma(sigma_min=0.05, sigma_max=1.0)
    )
    return EnergyTrainingOptions(**options | changes)


@pytest.fixture(scope="module")
def trained():
    return train_energy(training(), Stripes(0), Stripes(1), 0, torch.device("cpu"))


def test_training_tells_two_domains_apart_at_the_levels_it_saw(trained):
    energy, accuracy = trained
    assert accuracy > 0.95
    positions = torch.arange(50)
    for label, axis in enumerate((0, 1)):
        clean = Stripes(axis).batch(positions) / 127.5 - 1
        noisy = clean + 0.5 * Philox(9).normal(0, positions, SHAPE)
        assert float(((energy(noisy, 0.5) > 0) == label).float().mean()) > 0.9
    assert not energy.training
    assert not any(parameter.requires_grad for parameter in energy.parameters())


def test_untrained_network_does_not_and_training_repeats(trained):
    first, accuracy = train_energy(training(steps=2), Stripes(0), Stripes(0), 0, torch.device("cpu"))
    again, _ = train_energy(training(steps=2), Stripes(0), Stripes(0), 0, torch.device("cpu"))
    other, _ = train_energy(training(steps=1, lr=1e-12), Stripes(0), Stripes(0), 1, torch.device("cpu"))
    assert accuracy < 0.95  # one domain in both places
    weights = [each.model.dec["head"].weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert (weights[0] - weights[2]).abs().max() > 0.05  # another initialisation: two updates move less than 0.01


def test_batches_hold_both_domains_noised_to_levels_of_their_own():
    options = training(batch_size=512)
    state, sigma, labels = noised_batch(options, Stripes(0), Stripes(1), Philox(0), 3, torch.device("cpu"))
    clean = torch.cat([Stripes(axis).batch(3 * 256 + torch.arange(256)) / 127.5 - 1 for axis in (0, 1)])
    noise = (state - clean) / sigma[:, None, None, None]
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(labels, torch.arange(512) // 256.0)
    assert (sigma.min() < 0.06, sigma.max() > 0.9) == (True, True)
    assert 0.05 <= sigma.min() <= sigma.max() <= 1.0


def test_network_reads_states_as_edm_scales_them(trained):
    """c_in = 1 / sqrt(σ² + σ_data²) and c_noise = ln(σ) / 4, of one level or of one a sample."""
    energy, _ = trained
    x, levels = torch.randn(3, *SHAPE), torch.tensor([0.1, 0.5, 2.0])
    scaled = x / (levels**2 + 0.25).sqrt()[:, None, None, None]
    expected = energy.model(scaled, levels.log() / 4)
    torch.testing.assert_close(energy(x, levels), expected)
    torch.testing.assert_close(energy(x, 0.5)[1], expected[1])
    assert not torch.allclose(energy.model(scaled, levels.log()), expected, rtol=1e-4)


def test_training_refuses_what_does_not_fit():
    other = Stripes(0)
    other.shape = (3, 8, 8)
    with pytest.raises(InputError, match=r"samples of shape \(3, 4, 4\) and \(3, 8, 8\)"):
        train_energy(training(), Stripes(0), other, 0, torch.device("cpu"))
    deep = ClassifierOptions(model_channels=16, channel_mult=[1, 1, 1, 1])
    with pytest.raises(InputError, match=r"side divides by 8, these are 4×4: set network\.channel_mult"):
        train_energy(training(network=deep), Stripes(0), Stripes(1), 0, torch.device("cpu"))
    with pytest.raises(InputError, match="diverged within 60 updates: lower lr=1"):
        train_energy(training(lr=1.0, weight_decay=10.0, batch_size=2), Stripes(0), Stripes(1), 0, torch.device("cpu"))


# -- files -------------------------------------------------------------------------------------------------------------


def config_of(**changes):
    return EnergyConfig(network=SMALL, sample_shape=list(SHAPE), sigma_data=0.5, step=60).model_copy(update=changes)


@pytest.fixture
def export(tmp_path):
    torch.manual_seed(0)
    energy = build_energy(config_of(), dropout=False).eval()
    write_export(tmp_path / "energy", energy.config, energy.model.state_dict())
    return tmp_path / "energy", energy


def test_export_is_two_files_that_rebuild_the_network(export):
    folder, energy = export
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "energy.safetensors"]
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(load_energy(folder)(x, 0.3), energy(x, 0.3).detach(), atol=0, rtol=0)


def edited(change):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def reweighted(change):
    def damage(folder):
        weights = load_file(folder / "energy.safetensors")
        save_file(change(weights), folder / "energy.safetensors")

    return damage


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: (folder / "config.json").unlink(), r"no energy network there \(no config.json\)"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
    (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: not readable as JSON"),
    (edited(lambda v: v.update(role="teacher")), "holds a teacher, an energy network is needed"),
    (edited(lambda v: v.update(extra=1)), "config.json: unknown option extra"),
    (edited(lambda v: v["network"].update(num_blocks=64)), "too few for the layers"),
    (edited(lambda v: v["network"].update(model_channels=32)), "weight .* has shape"),
    (edited(lambda v: v.update(sample_shape=[3, 4, 5])), "needs square images"),
    (lambda folder: (folder / "energy.safetensors").write_bytes(b"x"), "not a whole safetensors file"),
    (lambda folder: (folder / "energy.safetensors").unlink(), "not a whole safetensors file"),
    (reweighted(lambda w: w | {"dec.head.bias": w["dec.head.bias"] * torch.nan}), "values that are not finite"),
    (reweighted(lambda w: {k: v for k, v in w.items() if k != "dec.head.bias"}), "has no weight dec.head.bias"),
])  # fmt: skip
def test_damaged_exports_are_refused_in_one_line(export, damage, said):
    folder, _ = export
    damage(folder)
    with pytest.raises(InputError, match=said) as error:
        load_energy(folder)
    assert str(folder) in str(error.value)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two untrained teachers, an energy network, seven images and two shard sets."""
    root = tmp_path_factory.mktemp("baseline")
    options = SongUNetOptions(
        kind="song_unet", model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.0
    )
    for number, name in enumerate(("source", "target")):
        torch.manual_seed(number)
        network = build_network(options, SHAPE)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_uniform_(parameter)
        config = ExportConfig(role="teacher", network=options, sample_shape=list(SHAPE), diffusion=DiffusionOptions())
        write_export(root / name, config, network.state_dict())
    energy = build_energy(config_of())
    write_export(root / "energy", energy.config, energy.model.state_dict())
    for domain in "ab":
        pixels = random_pixels(ord(domain), 7, 4, 4, 3)
        save_images(root / domain / "sub", {f"{number}.png": image for number, image in enumerate(pixels)})
        assert pack(root / domain, "--out", root / f"shards_{domain}", "--workers", 1, "--resolution", 4) == 0
    return root


def command(folder, method, *arguments):
    models = ["--teacher", f"{folder}/target", "--device", "cpu"]
    if method in ("ddib", "cyclediffusion"):
        models += ["--source-teacher", f"{folder}/source"]
    if method == "egsde":
        models += ["--energy", f"{folder}/energy"]
    return cli.main(["baseline", method, *models, "--input", f"{folder}/a", *map(str, arguments)])


@pytest.mark.parametrize("method", ["sdedit", "ilvr", "egsde", "ddib", "cyclediffusion"])
def test_command_writes_what_the_library_returns_under_the_same_names(folder, tmp_path, capsys, method):
    settings = ["steps=3"] + ["factor=2"] * (method in ("ilvr", "egsde"))
    assert command(folder, method, "--output", tmp_path, "--seed", 4, "--batch-size", 3, *settings) == 0
    paths = sorted(tmp_path.rglob("*.png"))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [f"sub/{i}.png" for i in range(7)]
    sources = np.stack([pixels_of(folder / "a" / "sub" / f"{i}.png") for i in range(7)])
    x = torch.from_numpy(sources).permute(0, 3, 1, 2) / 127.5 - 1
    values = {"method": method, "steps": 3} | ({"factor": 2} if len(settings) > 1 else {})
    models = Models(load_denoiser(folder / "target"), load_denoiser(folder / "source"), load_energy(folder / "energy"))
    expected = translate(parse_options(values), models, x, Philox(4), torch.arange(7))
    written = np.stack([pixels_of(path) for path in paths]).astype(int)
    np.testing.assert_allclose(written, to_uint8(expected.outputs).permute(0, 2, 3, 1).numpy(), atol=1)
    assert f"7 images, {expected.evaluations:g} network evaluations each" in capsys.readouterr().out


def library(folder, x, numbers, seed=0, **values):
    """Outputs of ``translate`` for images in [-1, 1], in the batch that they are given in."""
    models = Models(load_denoiser(folder / "target"))
    return translate(parse_options(values), models, x, Philox(seed), torch.tensor(numbers)).outputs


def test_skipped_samples_leave_the_others_their_noise(folder, tmp_path, capsys):
    arguments = ["--output", tmp_path, "--batch-size", 3, "steps=3"]  # 2 and 5 are of two batches, then of one
    assert command(folder, "sdedit", *arguments) == 0
    first, pixels = files_of(tmp_path), [pixels_of(tmp_path / f"sub/{number}.png") for number in range(7)]
    (tmp_path / "sub/2.png").unlink()
    (tmp_path / "sub/5.png").write_bytes(first["sub/5.png"][:-3])
    written = (tmp_path / "sub/6.png").stat().st_mtime_ns
    capsys.readouterr()
    assert command(folder, "sdedit", *arguments, "--skip-existing") == 0
    assert "2 images, 3 network evaluations each, 5 were there" in capsys.readouterr().out
    for number in range(7):
        np.testing.assert_allclose(pixels_of(tmp_path / f"sub/{number}.png"), pixels[number].astype(int), atol=1)
    assert (tmp_path / "sub/6.png").stat().st_mtime_ns == written


def test_two_processes_write_what_one_writes(folder, tmp_path, capfd):
    settings = ["--batch-size", 3, "--seed", 2, "steps=2", "factor=2", "lambda_s=5"]
    said = []
    for workers in (1, 2):
        assert command(folder, "egsde", "--output", tmp_path / str(workers), "--workers", workers, *settings) == 0
        said.append(capfd.readouterr().out.partition(": ")[2])
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert len(files_of(tmp_path / "1")) == 7
    assert said == ["7 images, 2 network evaluations each and 4 of the energy network\n"] * 2


def test_resized_images_come_back_at_their_own_size_under_names_of_their_own(folder, tmp_path):
    names = enumerate(("a.bmp", "a.png", "deep/b.c.png"))
    photos = {name: random_pixels(number, 8 + number, 20, 3) for number, name in names}
    save_images(tmp_path / "in", photos)
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--size", "resize", "steps=2"]
    assert command(folder, "sdedit", *flags) == 0
    small = [Image.fromarray(photo).resize((4, 4), Image.Resampling.LANCZOS) for photo in photos.values()]
    x = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1
    outputs = to_uint8(library(folder, x, [0, 1, 2], method="sdedit", steps=2)).permute(0, 2, 3, 1).numpy()
    assert sorted(files_of(tmp_path / "out")) == ["a_bmp.png", "a_png.png", "deep/b.c.png"]
    for name, output, photo in zip(sorted(files_of(tmp_path / "out")), outputs, photos.values(), strict=True):
        expected = Image.fromarray(output).resize(photo.shape[1::-1], Image.Resampling.LANCZOS)
        np.testing.assert_allclose(pixels_of(tmp_path / "out" / name), np.asarray(expected).astype(int), atol=2)


class Halving(torch.nn.Module):
    """In the place of an autoencoder: means of 2×2 pixels, and each value as 2×2 of them."""

    channels, factor = 3, 2

    def __init__(self, folder):
        super().__init__()

    def image_shape(self, shape):
        return shape[0], 2 * shape[1], 2 * shape[2]

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images, 2)

    def decode(self, latents):
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_autoencoder_stands_before_and_after(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rdmd_fast.model_files.autoencoder.Autoencoder", Halving)
    photo = random_pixels(0, 8, 8, 3)
    save_images(tmp_path / "in", {"a.png": photo})
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--autoencoder", "ae", "steps=2"]
    assert command(folder, "sdedit", *flags) == 0
    x = torch.from_numpy(photo).permute(2, 0, 1).reshape(1, 3, 4, 2, 4, 2).float().mean((3, 5)) / 127.5 - 1
    expected = library(folder, x, [0], method="sdedit", steps=2)[0]
    np.testing.assert_allclose(np.load(tmp_path / "out/a.npy"), expected, rtol=0, atol=1e-4)
    levels = ((expected.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    np.testing.assert_allclose(pixels_of(tmp_path / "out/a.png")[::2, 1::2], levels, atol=0.6)


def test_train_energy_writes_a_network_that_egsde_takes(folder, tmp_path, capsys):
    out = tmp_path / "energy"
    domains = ["--source", f"{folder}/shards_a", "--target", f"{folder}/shards_b", "--out", str(out), "--device", "cpu"]
    assert cli.main(["baseline", "train-energy", *domains, "steps=2", "batch_size=4", "network.model_channels=16"]) == 0
    energy = load_energy(out)
    assert (energy.config.step, energy.config.network.model_channels) == (2, 16)
    assert tuple(energy.config.sample_shape) == SHAPE
    assert "tells the domains apart in" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "arguments", "said"), [
    ("sdedit", ["sigma=1"], "sdedit: unknown option sigma"),
    ("sdedit", ["sigma0"], "override 'sigma0': write it as key=value"),
    ("sdedit", ["--batch-size", "0"], "--batch-size 0"),
    ("egsde", ["factor=3"], "factor 3"),
    ("ddib", ["--source-teacher", "nowhere"], "teacher nowhere: not there"),
    ("egsde", ["--energy", "nowhere"], "nowhere: no energy network there"),
    ("sdedit", ["--input", "nowhere"], "nowhere"),
    ("ddib", ["--size", "tiles"], "--size tiles: is for `rdmd translate`"),
    ("sdedit", ["--seed", "-1"], "seed -1 is outside"),
    ("sdedit", ["--workers", "0"], "--workers 0: must be at least 1"),
    ("egsde", ["lambda_i=1000000000", "factor=2"], "egsde: the translation of sub/0 is not finite"),
])  # fmt: skip
def test_command_says_what_is_wrong(folder, tmp_path, capsys, method, arguments, said):
    assert command(folder, method, "--output", tmp_path / "out", *arguments) == 2
    assert said in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_train_energy_keeps_folders_that_are_not_its_own(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    domains = ["--source", f"{folder}/shards_a", "--target", f"{folder}/shards_b", "--out", str(tmp_path)]
    assert cli.main(["baseline", "train-energy", *domains, "steps=1"]) == 2
    assert "exists and is no energy network" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(("method", "option"), [("sdedit", "steps=50"), ("train-energy", "lr=0.0003")])
def test_help_lists_options_with_their_defaults(capsys, method, option):
    with pytest.raises(SystemExit) as end:
        cli.main(["baseline", method, "--help"])
    assert end.value.code == 0
    assert f"  {option}  " in capsys.readouterr().out
