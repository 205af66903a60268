"""Teachers from anywhere give one denoiser; both stages take them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from material import error_line

from rdmd_fast import cli, load_denoiser, load_generator
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.engine import freeze_teacher
from rdmd_fast.engine.options import TrainOptions
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.teachers import read_teacher, read_teacher_config
from rdmd_fast.trainer import main

CONFIGS = Path(__file__).parents[2] / "configs"
SIGMAS = torch.tensor([0.002, 0.5, 1.0, 80.0])


def noisy(sigmas=SIGMAS):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(sigmas), 3, 8, 8, generator=generator) * 2 - 1
    return images + sigmas[:, None, None, None] * torch.randn(images.shape, generator=generator)


def preconditioned(network, x, sigma, labels, sigma_data=0.5):
    """D of EDM's Table 1, fp64."""
    s = sigma.double()[:, None, None, None]
    scale = (s**2 + sigma_data**2).sqrt()
    output = network.double()(x.double() / scale, sigma.double().log() / 4, labels)
    return (sigma_data / scale) ** 2 * x.double() + s * sigma_data / scale * output


def relative(actual, expected):
    return max((a.double() - b).norm() / b.norm() for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", ["tiny", "ncsnpp", "adm"])
def test_denoiser_of_a_pickle_is_edms(edm, tmp_path, form):
    network = edm(tmp_path / "a.pkl", getattr(edm, form))
    denoiser = load_denoiser(tmp_path / "a.pkl")
    assert list(denoiser.state_dict()) == [f"model.{name}" for name in network.state_dict()]
    assert not denoiser.training and not any(parameter.requires_grad for parameter in denoiser.parameters())
    classes = network.label_dim
    index = torch.tensor([0, 2, 1, 2])
    labels = torch.eye(classes)[index] if classes else None
    expected = preconditioned(network, noisy(), SIGMAS, labels)
    with torch.no_grad():
        given = index if classes else None
        assert relative(denoiser(noisy(), SIGMAS, given), expected) < 1e-5
        assert torch.equal(denoiser(noisy(), SIGMAS, labels), denoiser(noisy(), SIGMAS, given))
        assert relative(denoiser.to(torch.bfloat16)(noisy(), SIGMAS, given), expected) < 3e-2


def test_frozen_weights_lie_as_activations_do(edm, tmp_path):
    """A contiguous weight would be copied by every convolution of every call. Values are the same."""
    network = edm(tmp_path / "a.pkl", edm.tiny)
    loaded = load_denoiser(tmp_path / "a.pkl").model
    layout = BatchLayout(4, 4, 1, 0, 1)
    teacher = freeze_teacher(copy.deepcopy(network), layout, TrainOptions(), {}, torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    x, c_noise = noisy(), SIGMAS.log() / 4
    for frozen in (loaded, teacher):
        kernels = [weight for weight in frozen.parameters() if weight.ndim == 4]
        assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
        assert all(torch.equal(weight, network.state_dict()[name]) for name, weight in frozen.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(frozen(x, c_noise), network(x, c_noise), rtol=1e-5, atol=1e-6)


def test_without_class_the_denoiser_is_unconditional(edm, tmp_path):
    network = edm(tmp_path / "a.pkl", edm.adm)
    denoiser = load_denoiser(tmp_path / "a.pkl")
    with torch.no_grad():
        expected = preconditioned(network, noisy(), SIGMAS, torch.zeros(4, 4))
        assert relative(denoiser(noisy(), SIGMAS), expected) < 1e-5
        assert relative(denoiser(noisy(), SIGMAS, torch.zeros(4)), expected) > 1e-4
        denoiser.config = denoiser.config.model_copy(update={"target_class": 3})
        assert torch.equal(denoiser(noisy(), SIGMAS), denoiser(noisy(), SIGMAS, torch.full((4,), 3)))


@pytest.mark.parametrize("labels", [[0, 1, 2, 4], [-1, 0, 0, 0], [0, 1], [[0, 1]] * 4])
def test_classes_that_a_network_does_not_have(edm, tmp_path, labels):
    edm(tmp_path / "a.pkl", edm.adm)
    with pytest.raises(InputError, match="class_labels"):
        load_denoiser(tmp_path / "a.pkl")(noisy(), SIGMAS, torch.tensor(labels))


def test_imported_export_is_the_pickle(edm, tmp_path, capsys):
    edm(tmp_path / "a.pkl", edm.ncsnpp)
    for _ in range(2):  # a second import replaces the first
        assert cli.main(["import-edm", str(tmp_path / "a.pkl"), "--out", str(tmp_path / "teacher")]) == 0
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "song_unet" in printed and "8×8" in printed and "3 classes" in printed
    written = {path.name for path in (tmp_path / "teacher").iterdir()}
    assert written == {"README.md", "config.json", "teacher.safetensors"}
    assert "\nlicense: cc-by-nc-sa-4.0\n" in (tmp_path / "teacher/README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"a.pkl", "teacher"}
    (config, weights), (copy, copied) = read_teacher(tmp_path / "a.pkl"), read_teacher(tmp_path / "teacher")
    assert config == copy == read_teacher_config(tmp_path / "a.pkl") == read_teacher_config(tmp_path / "teacher")
    assert weights.keys() == copied.keys() and all(torch.equal(weights[name], copied[name]) for name in weights)


def test_import_never_replaces_what_is_no_export(edm, tmp_path, capsys):
    edm(tmp_path / "a.pkl")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/config.json").write_text("{}")
    (tmp_path / "photos/cat.png").write_bytes(b"cat")
    for out in ("photos", "a.pkl", "a.pkl/x"):
        assert cli.main(["import-edm", str(tmp_path / "a.pkl"), "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "photos/cat.png").read_bytes() == b"cat"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pkl", "photos"}


def test_what_is_no_teacher(edm, tmp_path):
    with pytest.raises(InputError, match=r"none\.pkl: not there"):
        read_teacher(tmp_path / "none.pkl")
    with pytest.raises(InputError, match="no config"):
        read_teacher(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json"):
        read_teacher_config(tmp_path)


SHORT = ["train.steps=2", "train.global_batch_size=2", "telemetry.tensorboard=false", "telemetry.log_every=1"]


def test_pickle_is_fine_tuned_and_distilled(edm, tmp_path, shards, capsys):
    """Augmentation labels included: EDM's published networks have them, and get none here."""
    network = edm(tmp_path / "a.pkl", edm.tiny | dict(augment_dim=9))
    teacher = [f"teacher={tmp_path}/a.pkl", f"data.target={shards}/3/train", "network=null", *SHORT]
    config = str(CONFIGS / "digits/teacher_3.yaml")
    assert main(["--config", config, f"run_dir={tmp_path}/dry", *teacher, "--dry-run"]) == 0
    size = sum(parameter.numel() for parameter in network.parameters())
    assert f"{size / 1e6:10.3f} M parameters" in capsys.readouterr().out
    assert main(["--config", config, f"run_dir={tmp_path}/tuned", *teacher]) == 0
    tuned = load_denoiser(tmp_path / "tuned/export").model.state_dict()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, tuned[name])}
    assert "enc.8x8_conv.weight" in moved and "map_augment.weight" not in moved
    assert all((value - tuned[name]).abs().max() < 0.01 for name, value in network.state_dict().items())

    source = [f"teacher={tmp_path}/a.pkl", f"data.source={shards}/2/train", *SHORT, "train.steps=1"]
    plain = ["data.source_holdout=null", "data.target_holdout=null", "validation.judge=null"]
    run = tmp_path / "rdmd"
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), f"run_dir={run}", *source, *plain]) == 0
    x = noisy()
    expected = load_denoiser(tmp_path / "a.pkl")(x, 1.0)
    torch.testing.assert_close(load_generator(run / "export")(x), expected, rtol=0, atol=0.05)
    assert json.loads((run / "export/config.json").read_text())["network"]["augment_dim"] == 9


def test_bad_pickle_ends_a_run_with_status_2(tmp_path, shards, capsys):
    (tmp_path / "a.pkl").write_bytes(b"<html></html>")
    arguments = [f"teacher={tmp_path}/a.pkl", f"data.target={shards}/3/train", "network=null", *SHORT]
    for extra in ([], ["--dry-run"]):
        capsys.readouterr()
        run = ["--config", str(CONFIGS / "digits/teacher_3.yaml"), f"run_dir={tmp_path}/run", *arguments, *extra]
        assert main(run) == 2
        assert "web page" in error_line(capsys, "[20")
