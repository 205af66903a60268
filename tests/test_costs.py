"""The features' cost: its gradient, its place in a training, and what is refused. Elementwise ones: tests/kernels."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from material import FakeLPIPS, save_script

from rdmd_fast.config import load_config, validate_config
from rdmd_fast.costs import CostOptions, FeatureCost
from rdmd_fast.errors import InputError
from rdmd_fast.networks.feature_networks import FeatureNetwork
from rdmd_fast.planning.dry_run import dry_run
from rdmd_fast.processes.world import join_world
from rdmd_fast.trainer import run


class OfImages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.second(self.dropout(torch.tanh(self.first(images))))


class OfPixels(OfImages):
    def forward(self, img, return_features: bool = False):
        return self.second(torch.tanh(self.first(img / 127.5 - 1)))


class OfPoints(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(2, 5)

    def forward(self, points):
        return torch.tanh(self.linear(points))


class Bytes(torch.nn.Module):
    def forward(self, images):
        return images.to(torch.uint8).flatten(1).float()


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.mean(0, keepdim=True)


class Cusp(torch.nn.Module):
    def forward(self, images):
        return (images - images).flatten(1).sqrt()


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2)]


def of(path, shape=(3, 8, 8), **options):
    return FeatureCost.of(CostOptions(kind="features", features=str(path), **options), shape, torch.device("cpu"))


def test_the_gradient_agrees_with_finite_differences_and_with_autograd_of_the_whole(tmp_path, pair):
    x, y = pair
    cost = of(save_script(OfImages().double(), tmp_path / "f.pt"))
    value, derivative = cost(x, y)
    assert value.dtype == derivative.dtype == torch.float64

    network = OfImages().double().eval()
    variable = y.clone().requires_grad_()
    whole = (network(x) - network(variable)).square().flatten(1).sum(1)
    torch.testing.assert_close(value, whole.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(derivative, torch.autograd.grad(whole.sum(), variable)[0], rtol=1e-10, atol=1e-10)

    directions = torch.randn(5, *y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for direction in directions:
        ahead, behind = (cost(x, y + step * direction)[0].sum() for step in (1e-5, -1e-5))
        assert ((ahead - behind) / 2e-5).item() == pytest.approx((derivative * direction).sum().item(), rel=1e-6)
    assert cost(x, x)[0].abs().max() == 0 and cost(x, x)[1].abs().max() == 0


def test_a_network_of_pixels_gives_the_cost_of_the_images_it_shows(tmp_path, pair):
    x, y = (each.float() for each in pair)
    of_pixels = of(save_script(OfPixels(), tmp_path / "p.pt"))
    of_images = of(save_script(OfImages(), tmp_path / "i.pt"))
    for ours, expected in zip(of_pixels(x, y), of_images(x, y), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert of(tmp_path / "p.pt", feature_input="float")(x, y)[0].max() < 0.01 * of_images(x, y)[0].min()


def test_the_network_is_frozen_and_in_evaluation_mode(tmp_path, pair):
    network = FeatureNetwork(save_script(OfImages().train(), tmp_path / "f.pt"))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    x, y = (each.float() for each in pair)
    with torch.no_grad():  # as in the trainer's scores; dropout would differ each time
        first, second = FeatureCost(network)(x, y), FeatureCost(network)(x, y)
    assert first[0].equal(second[0]) and first[1].equal(second[1])
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("module", "message"), [
    (Bytes, "lets no gradient through"), (Mean, "samples for 2"), (Cusp, "not finite"), (OfPoints, "does not take"),
])  # fmt: skip
def test_a_network_that_cannot_serve_is_refused_before_the_training(tmp_path, module, message):
    with pytest.raises(InputError, match=message):
        of(save_script(module(), tmp_path / "f.pt"))


def test_a_file_that_is_missing_is_named_with_its_key(tmp_path):
    with pytest.raises(InputError, match=f"rdmd.cost.features: {tmp_path}/none.pt: no such file"):
        of(tmp_path / "none.pt")


def test_lpips_where_it_is_not_installed_is_one_line():
    message = r"rdmd.cost.features: lpips: cannot be used \(.*pip install rdmd_fast\[lpips\]"
    with pytest.raises(InputError, match=message):
        of("lpips")


def test_lpips_is_its_own_distance(monkeypatch, pair):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=FakeLPIPS))
    x, y = (each.float() for each in pair)
    value, derivative = of("lpips")(x, y)
    torch.testing.assert_close(value, 0.5 * (x - y).square().mean((1, 2, 3)))
    torch.testing.assert_close(derivative, (y - x) / 192)


@pytest.mark.parametrize(("cost", "message"), [
    ({"kind": "features"}, "features: missing"),
    ({"feature_weight": 2.0}, "say nothing without features"),
    ({"features": "f.pt", "feature_weight": 0.0}, "feature_weight"),
    ({"features": "f.pt", "feature_input": "int"}, "feature_input"),
    ({"kind": "lpips"}, "kind"),
])  # fmt: skip
def test_costs_that_mean_nothing_are_refused(cost, message):
    with pytest.raises(InputError, match=f"rdmd.cost.*{message}"):
        validate_config({"stage": "rdmd", "run_dir": "r", "rdmd": {"cost": cost}}, "c.yaml")


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return join_world()


@pytest.fixture(scope="module")
def points_file(tmp_path_factory):
    return save_script(OfPoints(), tmp_path_factory.mktemp("features") / "points.pt")


def configuration(file, run_dir, *overrides):
    """A linear generator that starts turned by 100 degrees, where every cost is high."""
    options = [f"run_dir={run_dir}", f"rdmd.cost.features={file}", "rdmd.transport_weight=2", "generator.angle=100"]
    options += ["train.steps=30", "train.global_batch_size=64", "train.micro_batch_size=64", "rdmd.fake_warmup=0"]
    options += ["rdmd.fake_updates=1", "telemetry.log_every=10", "validation.every=0", "validation.count=50"]
    options += ["rdmd.generator_optimizer.lr=0.06", "rdmd.generator_optimizer.warmup=0"]
    return load_config("configs/toy/gaussian_to_gaussian.yaml", [*options, "telemetry.tensorboard=false", *overrides])


def trained(world, file, run_dir, *overrides):
    config = configuration(file, run_dir, *overrides)
    assert run(config, "never", world, run_dir, SimpleNamespace(requested=None)) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "fake_loss" in line]


def test_a_training_brings_the_cost_down_and_reports_it_with_the_elementwise_one(world, points_file, tmp_path):
    lines = trained(world, points_file, tmp_path / "run", "rdmd.cost.kind=features")
    assert lines[-1]["feature_cost"] < 0.2 * lines[0]["feature_cost"]
    assert lines[0]["seconds"]["feature_cost"] > 0
    for line in lines:
        assert line["transport_cost"] == pytest.approx(line["feature_cost"], rel=1e-6)
    assert not any("expected" in key for line in lines for key in line)  # no closed form of this cost

    one = ["train.steps=1", "telemetry.log_every=1"]
    alone = trained(world, points_file, tmp_path / "alone", "rdmd.cost.features=null", *one)
    first = trained(world, points_file, tmp_path / "first", "rdmd.cost.feature_weight=3.0", *one)
    assert "feature_cost" not in alone[0]
    expected = alone[0]["transport_cost"] + 3 * first[0]["feature_cost"]
    assert first[0]["transport_cost"] == pytest.approx(expected, rel=1e-6)


SHORT = ["rdmd.cost.kind=features", "train.steps=6", "telemetry.log_every=3"]


@pytest.fixture(scope="module")
def plain(world, points_file, tmp_path_factory):
    return trained(world, points_file, tmp_path_factory.mktemp("plain") / "run", *SHORT)


@pytest.mark.parametrize(("overrides", "tolerance"), [
    (["train.micro_batch_size=16"], 1e-5),
    (["deepspeed.zero_optimization={stage: 3, reduce_bucket_size: 1000}"], 1e-5),
    (["train.dtype=bf16"], 0.2),
])  # fmt: skip
def test_micro_batches_zero_and_bf16_follow_one_training(world, points_file, plain, tmp_path, overrides, tolerance):
    other = trained(world, points_file, tmp_path / "other", *SHORT, *overrides)
    assert plain[1]["feature_cost"] < plain[0]["feature_cost"]
    for ours, theirs in zip(other, plain, strict=True):
        assert ours["feature_cost"] == pytest.approx(theirs["feature_cost"], rel=tolerance)
        assert ours["fake_loss"] == pytest.approx(theirs["fake_loss"], rel=tolerance)


def test_a_dry_run_names_what_it_does_not_count(points_file, tmp_path, capsys):
    assert dry_run(configuration(points_file, tmp_path / "run", "rdmd.cost.kind=features")) == 0
    assert f"not counted: the feature network of rdmd.cost.features, {points_file}" in capsys.readouterr().out


def test_a_network_that_does_not_fit_the_memory_is_not_blamed_on_the_shape(tmp_path, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FeatureNetwork, "forward", forward)
    with pytest.raises(InputError, match=r"f\.pt: does not fit the memory of cpu, lower train\.micro_batch_size$"):
        of(save_script(OfImages(), tmp_path / "f.pt"))
