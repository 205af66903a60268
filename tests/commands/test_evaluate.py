"""``rdmd evaluate`` on images: which are measured, what stands in the report, what is refused."""

import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import material
import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
import torch
from PIL import Image

from rdmd_fast import cli, trainer
from rdmd_fast.errors import InputError
from rdmd_fast.metrics.feature_extractor import load_extractor
from rdmd_fast.metrics.frechet import frechet_distance
from rdmd_fast.metrics.image_distances import l2, psnr, ssim
from rdmd_fast.metrics.image_report import ImageReport
from rdmd_fast.metrics.image_sets import open_images
from rdmd_fast.metrics.kernel_distance import kernel_distance
from rdmd_fast.model_files.export_format import write_export
from rdmd_fast.networks.feature_networks import naming
from rdmd_fast.pixels import PixelImages

SIDE = 8
TOY = ["--config", str(Path(__file__).parents[2] / "configs/toy/gaussian_to_gaussian.yaml"), "rdmd.fake_warmup=0"]


class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.filters = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return torch.tanh(self.filters(images)).mean((2, 3))


def pictures(seed, count, height=SIDE, width=SIDE):
    return material.random_pixels(seed, count, height, width, 3)


def save(folder, images, names):
    material.save_images(folder, dict(zip(names, images, strict=True)))


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def export(folder, **more):
    config, network = material.generator_of(material.small_unet(1), (3, SIDE, SIDE), **more)
    weights = {name: 0.3 * torch.randn_like(value) for name, value in network.state_dict().items()}
    write_export(folder, config, weights)


NAMES = ["a.png", "deep/b.c.png", "deep/d.png", "e.png"]


@pytest.fixture
def folders(tmp_path):
    """Sources as files, targets as shards, a method's outputs beside them, a feature network."""
    source, target, outputs = pictures(0, 4), pictures(1, 6), pictures(2, 4)
    save(tmp_path / "source", source, NAMES)
    save(tmp_path / "cut", outputs, NAMES)
    material.write_shards(tmp_path / "target", target, 4, "{:03d}")
    material.save_script(Pooled(), tmp_path / "f.pt")
    return {"source": as_tensor(source), "target": as_tensor(target), "outputs": as_tensor(outputs)}


def evaluate(folder, *arguments):
    options = ["evaluate", "--source", f"{folder}/source", "--target", f"{folder}/target", "--out", f"{folder}/r.json"]
    status = cli.main([*options, "--cache", f"{folder}/cache", *map(str, arguments)])
    return json.loads((folder / "r.json").read_text()) if status == 0 else status


def test_outputs_of_any_method_are_paired_by_name_and_measured(folders, tmp_path, capsys):
    more = ["--features", tmp_path / "f.pt", "--picture", tmp_path / "g.png"]
    report = evaluate(tmp_path, "--outputs", tmp_path / "cut", *more)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["identity", "cut"]
    x, y, real = folders["source"], folders["outputs"], folders["target"]
    extractor = load_extractor(tmp_path / "f.pt")
    expected = {
        **{"images": 4, "real_images": 6, "l2": l2(x, y), "psnr": psnr(x, y), "ssim": ssim(x, y)},
        "fid": frechet_distance(extractor(y), extractor(real)),
        "kid": kernel_distance(extractor(y), extractor(real))[0],
    }
    for name, value in expected.items():
        assert rows["cut"][name] == pytest.approx(value, rel=1e-6), name
    assert rows["identity"]["l2"] == 0 and rows["identity"]["psnr"] is None
    assert report["seed"] == 0 and report["features"]["sha256"] == extractor.sha256
    assert report["target"]["images"] == 6 and len(report["source"]["sha256"]) == 64
    printed = capsys.readouterr().out
    assert "cut" in printed and report["target"]["sha256"][:16] in printed
    assert Image.open(tmp_path / "g.png").height > 3 * SIDE

    # The same pixels in another kind of folder are the same data, other pixels are not.
    pixels = (folders["target"].permute(0, 2, 3, 1).numpy() * 127.5 + 128).astype(np.uint8)
    save(tmp_path / "same", pixels, [f"{i}.png" for i in range(6)])
    again = evaluate(tmp_path, "--outputs", tmp_path / "cut", "--target", tmp_path / "same")
    assert again["target"]["sha256"] == report["target"]["sha256"] != report["source"]["sha256"]


def test_the_truth_is_measured_where_it_is_known(folders, tmp_path, capsys):
    """By SciPy's assignment and NumPy's least squares."""
    truth = pictures(5, 4)
    save(tmp_path / "truth", truth, NAMES)
    save(tmp_path / "right", truth, NAMES)
    outputs = ["--outputs", tmp_path / "cut", tmp_path / "right"]
    report = evaluate(tmp_path, *outputs, "--truth", tmp_path / "truth", "--picture", tmp_path / "g.png")
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["identity", "colour map (sees the truth)", "cut", "right"]
    x, y, real = folders["source"], folders["outputs"], as_tensor(truth)
    for name, images in (("identity", x), ("cut", y)):
        assert rows[name]["true_psnr"] == pytest.approx(psnr(real, images), rel=1e-6)
        distances = scipy.spatial.distance.cdist(images.flatten(1).double(), real.flatten(1).double())
        nearest = (distances.argmin(1) == np.arange(4)).mean()
        assert rows[name]["true_nearest"] == pytest.approx(nearest) and rows[name]["true_top5"] == 1
    assert rows["right"]["true_l2"] == 0 and rows["right"]["true_nearest"] == 1 and rows["right"]["true_psnr"] is None

    colours, true = (images.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy() for images in (x, real))
    design = np.column_stack([colours, np.ones(len(colours))])
    mapped = design @ np.linalg.lstsq(design, true, rcond=None)[0]
    mapped = np.rint((mapped + 1) * 127.5).clip(0, 255) / 127.5 - 1
    error = np.sqrt(np.square(mapped - true).reshape(4, -1).sum(1)).mean()
    assert rows["colour map (sees the truth)"]["true_l2"] == pytest.approx(error, rel=1e-3)

    costs = scipy.spatial.distance.cdist(x.flatten(1).double(), real.flatten(1).double(), "sqeuclidean")
    chosen = scipy.optimize.linear_sum_assignment(costs)[1]
    expected = {"true": costs.diagonal().mean(), "exact": costs[np.arange(4), chosen].mean()}
    expected["paired_alike"] = (chosen == np.arange(4)).mean()
    assert report["transport"] == pytest.approx(expected, rel=1e-6)
    assert "of exact optimal transport between the two sets" in capsys.readouterr().out
    (tmp_path / "truth/e.png").unlink()
    assert evaluate(tmp_path, *outputs, "--truth", tmp_path / "truth") == 2
    assert "--truth" in capsys.readouterr().err


def test_a_generator_is_measured_as_its_saved_images_are(folders, tmp_path):
    export(tmp_path / "export")
    model, places = (
        ["--model", f"{tmp_path}/export"],
        ["--input", f"{tmp_path}/source", "--output", f"{tmp_path}/saved"],
    )
    assert cli.main(["translate", *model, *places]) == 0
    rows = evaluate(tmp_path, *model, "--outputs", tmp_path / "saved", tmp_path / "cut")["rows"]
    assert [row.pop("name") for row in rows] == ["RDMD", "identity", "saved", "cut"]
    assert rows[0] == rows[2] != rows[3]
    assert rows[0]["l2"] > 0.1


def test_a_generator_of_a_range_has_a_row_for_each_weight(folders, tmp_path, capsys):
    export(tmp_path / "export", transport_weights=[0.1, 1.0])
    model = ["--model", tmp_path / "export", "--transport-weight"]
    rows = evaluate(tmp_path, *model, 0.1, 0.9)["rows"]
    assert [row.get("transport_weight") for row in rows] == [0.1, 0.9, None]
    assert rows[0]["l2"] != rows[1]["l2"]
    assert evaluate(tmp_path, *model, 7) == 2
    assert "transport_weight 7" in capsys.readouterr().err


def test_lpips_is_the_mean_over_the_pairs(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=material.FakeLPIPS))
    report = evaluate(tmp_path, "--outputs", tmp_path / "cut", "--lpips")
    assert report["rows"][0]["lpips"] == 0
    assert report["rows"][1]["lpips"] == pytest.approx(0.5 * report["rows"][1]["mse_per_pixel"], rel=1e-6)


def test_some_images_are_drawn_by_the_seed(folders, tmp_path):
    def measured(*arguments):
        report = evaluate(tmp_path, "--outputs", tmp_path / "cut", *arguments)
        return [report["rows"][1]["l2"], report["source"], report["target"]]

    all_of_them = measured()
    two = measured("--count", 2, "--seed", 3)
    assert two == measured("--count", 2, "--seed", 3)
    assert two[1]["images"] == two[2]["images"] == 2
    assert len({measured("--count", 2, "--seed", seed)[0] for seed in range(6)}) > 1
    assert measured("--count", 100, "--seed", 5) == all_of_them


def test_files_are_cropped_and_resized_alike(folders, tmp_path):
    save(tmp_path / "photos", pictures(5, 3, 20, 30), ["a.png", "b.png", "c.png"])
    save(tmp_path / "small", pictures(6, 3, 12, 12), ["a.png", "b.png", "c.png"])
    photos = ["--source", tmp_path / "photos", "--target", tmp_path / "photos", "--outputs", tmp_path / "small"]
    assert evaluate(tmp_path, *photos)["size"] == [12, 12]
    assert evaluate(tmp_path, *photos, "--resolution", 5)["size"] == [5, 5]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "missing --model or --outputs"),
    (["--outputs", "{0}/few"], r"{0}/few: has no translation of source 'deep/b_c' (3 of 4 are missing)"),
    (["--outputs", "{0}/cut", "--label", "3"], "--label: says nothing without --judge"),
    (["--outputs", "{0}/cut", "--teacher", "{0}"], "--teacher: says nothing without --model"),
    (["--outputs", "{0}/cut", "--transport-weight", "1"], "--transport-weight: says nothing without --model"),
    (["--outputs", "{0}/cut", "--count", "1"], "--count 1: must be at least 2"),
    (["--outputs", "{0}/cut", "--resolution", "9"], "--target {0}/target: has images of 8x8, 9x9 are measured"),
    (["--outputs", "{0}/cut", "--features", "{0}/a.pt"], "{0}/a.pt: no such file"),
    (["--outputs", "{0}/cut", "--lpips"], "lpips: cannot be used"),
    (["--outputs", "{0}/none"], "{0}/none"),
    (["--outputs", "{0}/torn"], "{0}/torn/a.png: not a readable image"),
    (["--model", "{0}/none"], "{0}/none: no export there"),
    (["--outputs", "{0}/cut", "{0}/source/../cut"], "--outputs: two rows would be {0}/cut, name it once"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(folders, tmp_path, capsys, arguments, message):
    save(tmp_path / "few", pictures(0, 1), ["a.png"])
    save(tmp_path / "torn", pictures(0, 4), NAMES)
    (tmp_path / "torn/a.png").write_bytes(b"\x89PNG")
    assert evaluate(tmp_path, *(each.format(tmp_path) for each in arguments)) == 2
    assert message.format(tmp_path) in material.error_line(capsys)


def test_a_generator_that_diverged_is_not_measured(folders, tmp_path, capsys):
    export(tmp_path / "export")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "export/generator.safetensors"
    save_file({name: 1e38 * value for name, value in load_file(path).items()}, path)
    assert evaluate(tmp_path, "--model", tmp_path / "export") == 2
    assert "gives NaN or infinity" in capsys.readouterr().err


def test_sets_are_kept_as_pixels_and_measured_as_the_images_they_are(folders, tmp_path):
    images = open_images(str(tmp_path / "source"), "--source").read((SIDE, SIDE)).images
    assert images.pixels.dtype == torch.uint8
    assert torch.equal(images[torch.arange(4)], folders["source"])

    pixels = [torch.from_numpy(pictures(seed, 70)).permute(0, 3, 1, 2) for seed in range(3)]  # more than a block
    lazy, whole = [PixelImages(each) for each in pixels], [each.float() / 127.5 - 1 for each in pixels]
    extractor = load_extractor(tmp_path / "f.pt")
    rows = [ImageReport(target, extractor=extractor).row("", x, y) for x, y, target in (lazy, whole)]
    for row in rows:
        row.pop("kid_std")  # undefined for so few
    assert rows[0] == rows[1] and rows[0]["ssim"] != 0


def test_one_row_of_images_is_held_at_a_time(folders, tmp_path, monkeypatch):
    held, made = weakref.WeakSet(), []
    create = PixelImages.__init__

    def counted(self, pixels):
        create(self, pixels)
        held.add(self)
        made.append(len(held))

    monkeypatch.setattr(PixelImages, "__init__", counted)
    export(tmp_path / "export", transport_weights=[0.1, 1.0])
    model = ["--model", tmp_path / "export", "--transport-weight", 0.1, 0.5, 0.9]
    evaluate(tmp_path, *model, "--outputs", tmp_path / "cut", "--picture", tmp_path / "g.png")
    assert made == [1, 2, 3, 3, 3, 3]  # source, target and one row


def test_rows_of_one_name_are_told_apart_or_refused(folders, tmp_path, capsys):
    export(tmp_path / "export", transport_weights=[0.1, 1.0])
    (tmp_path / "cut").rename(tmp_path / "RDMD")
    outputs, model = ["--outputs", tmp_path / "RDMD"], ["--model", tmp_path / "export"]
    names = [row["name"] for row in evaluate(tmp_path, *model, *outputs)["rows"]]
    assert names == ["RDMD", "identity", f"{tmp_path}/RDMD"]
    assert evaluate(tmp_path, *model, "--transport-weight", 0.5, 0.50000001) == 2
    assert "two rows would be RDMD λ=0.5" in capsys.readouterr().err


def test_results_below_the_sources_are_no_sources(folders, tmp_path, capsys):
    (tmp_path / "cut").rename(tmp_path / "source/cut")
    report = evaluate(tmp_path, "--outputs", tmp_path / "source/cut")
    assert report["source"]["images"] == 4 and [row["name"] for row in report["rows"]] == ["identity", "cut"]
    assert evaluate(tmp_path, "--outputs", tmp_path / "source")["source"]["images"] == 8  # all of it, not none

    (tmp_path / "all").mkdir()
    (tmp_path / "source/cut").rename(tmp_path / "all/cut")
    assert evaluate(tmp_path, "--source", tmp_path / "all", "--outputs", tmp_path / "all/cut") == 2
    assert f"--source {tmp_path}/all: no images below this folder, those in --outputs aside" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    RuntimeError("in the TorchScript interpreter.\nOutOfMemoryError: CUDA out of memory. Tried to allocate\n"),
])  # fmt: skip
def test_memory_that_is_not_there_is_not_blamed_on_the_shape(error):
    where = torch.device("cuda:0")
    with pytest.raises(InputError) as raised, naming("f.pt", (64, 3, 8, 8), where, "--batch-size"):
        raise error
    assert str(raised.value) == "f.pt: does not fit the memory of cuda:0, lower --batch-size"


def test_a_generator_that_does_not_fit_the_memory_is_one_line(folders, tmp_path, capsys, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    export(tmp_path / "export")
    monkeypatch.setattr("rdmd_fast.model_files.models.Generator.forward", forward)
    assert evaluate(tmp_path, "--model", tmp_path / "export") == 2
    assert "/export: does not fit the memory of cpu, lower --batch-size" in capsys.readouterr().err


def test_a_label_that_the_judge_does_not_know_is_refused_ahead_of_any_work(folders, tmp_path, capsys, monkeypatch):
    from rdmd_fast.metrics.image_sets import OpenImages
    from rdmd_fast.metrics.judges import DigitJudge

    def prepare(self, root):
        self.classes = np.array([2, 3])

    monkeypatch.setattr(DigitJudge, "__init__", prepare)
    monkeypatch.setattr(OpenImages, "read", lambda *_: pytest.fail("read"))
    assert evaluate(tmp_path, "--outputs", tmp_path / "cut", "--judge", tmp_path, "--label", 7) == 2
    assert "--label 7: digit 7 is not among [2, 3]" in capsys.readouterr().err


def test_a_toy_of_a_range_is_measured_at_the_weights_that_are_named(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "r.json"
    override = ["rdmd.transport_weight={log_uniform: [0.05, 0.8]}", "generator={kind: mlp, hidden: 8, depth: 1}"]
    steps = ["train.steps=2", "validation.count=20", "telemetry.tensorboard=false"]
    assert trainer.main([*TOY, f"run_dir={run}", *steps, *override]) == 0

    def measured(*arguments):
        capsys.readouterr()
        options = ["evaluate", "--run", str(run), "--count", "50", "--out", str(out), *map(str, arguments)]
        assert cli.main(options) == 0
        return json.loads(out.read_text()), capsys.readouterr().out

    middle, printed = measured()
    assert middle["transport_weight"] == pytest.approx(0.2) and middle["samples"] == 50
    assert "λ = 0.2, the middle of its range" in printed and "closed form 1.3233, 1.3233" in printed
    several, printed = measured("--transport-weight", 0.05, 0.2, "--picture", tmp_path / "toy.png")
    assert several["rows"][1] == middle and "λ = 0.05" in printed and "middle" not in printed
    assert several["rows"][0]["axis_scale_0_expected"] == pytest.approx(1.438, abs=1e-3)
    assert several["rows"][0]["scale"] != middle["scale"]
    assert Image.open(tmp_path / "toy.png").format == "PNG"
    assert measured("--seed", 0)[0] == middle != measured("--seed", 1)[0]

    for arguments, message in (
        (["--transport-weight", "7"], "transport_weight 7: the generator was trained for 0.05 to 0.8"),
        (["--source", "x"], "--source: is not for --run"),
        (["--batch-size", "3"], "--batch-size: is not for --run"),
        (["--count", "1"], "--count 1: must be at least 2"),
    ):
        assert cli.main(["evaluate", "--run", str(run), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
