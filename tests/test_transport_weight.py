"""One generator for a range of λ: how λ is drawn, told to the networks, exported and chosen."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import generator_of, pixels_of, random_pixels, save_images, small_unet
from safetensors.torch import load_file

from rdmd_fast import cli, load_denoiser, load_generator
from rdmd_fast.commands.export import _fake_score_config, read_network
from rdmd_fast.config import load_config
from rdmd_fast.diffusion import DiffusionOptions, LogNormalSigma, Reading
from rdmd_fast.engine.batch_layout import BatchLayout
from rdmd_fast.engine.stage_context import StageContext
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.export_format import read_export_config, write_export
from rdmd_fast.networks import build_network
from rdmd_fast.networks.condition_embedding import conditioning_weights
from rdmd_fast.networks.mlp import MLP
from rdmd_fast.pixels import to_uint8
from rdmd_fast.randomness import Philox
from rdmd_fast.rdmd import RDMD, Networks, RDMDOptions
from rdmd_fast.trainer import main
from rdmd_fast.transport_weight import LogUniformWeight, TransportWeights, WeightRange

CONFIGS = Path(__file__).parent.parent / "configs"
TOY = str(CONFIGS / "toy/gaussian_to_gaussian.yaml")
RANGE = LogUniformWeight(log_uniform=[0.01, 2.0])
LOW_HIGH = "rdmd.transport_weight={log_uniform: [0.05, 1.0]}"


# -- drawing -----------------------------------------------------------------------------------------------------------


def drawn(first, count, seed=3, stride=64):
    weights = TransportWeights(RANGE, Philox(seed), stride, torch.device("cpu"))
    return weights.draw(torch.arange(first, first + count))


def test_weight_and_condition_of_a_sample_are_a_function_of_seed_and_position():
    whole = drawn(640, 64)
    for first, count in ((640, 16), (656, 48), (700, 1)):
        for stride in (64, 7, 1000):
            part, rows = drawn(first, count, stride=stride), slice(first - 640, first - 640 + count)
            assert torch.equal(part.value, whole.value[rows])
            assert torch.equal(part.inputs["condition"], whole.inputs["condition"][rows])
    assert not torch.equal(drawn(640, 64, seed=4).value, whole.value)


def test_batches_drawn_in_turn_are_those_drawn_alone():
    weights = TransportWeights(RANGE, Philox(3), 8, torch.device("cpu"))
    for step in (0, 1, 2, 63, 64, 65, 500, 3):  # past a block, and back
        for slot in range(2):
            positions = torch.arange(8 * step + 4 * slot, 8 * step + 4 * slot + 4)
            assert torch.equal(weights.draw(positions, slot).value, drawn(int(positions[0]), 4).value)


@pytest.mark.parametrize("first", [0, 2**32 - 500, 2**40 + 12345])
def test_every_batch_covers_the_range_evenly_in_the_logarithm(first):
    batch = drawn(first, 64)
    share = (batch.value.double() / 0.01).log() / torch.tensor(200.0).double().log()
    torch.testing.assert_close(batch.inputs["condition"].double(), 2 * share - 1, rtol=0, atol=1e-5)
    # A golden-ratio sequence leaves no gap above (1 + golden) / n; independent draws leave some 5 / n.
    gaps = torch.cat([torch.zeros(1).double(), share.sort().values, torch.ones(1).double()]).diff()
    assert gaps.max() < 2.62 / 64
    assert drawn(first, 4096).inputs["condition"].mean().abs() < 1e-3


def test_a_number_is_passed_on_as_it_is():
    batch = TransportWeights(0.3, Philox(0), 64, torch.device("cpu")).draw(torch.arange(64))
    assert batch.value == 0.3 and isinstance(batch.value, float) and batch.inputs == {}


def test_conditions_are_the_logarithm_over_the_range():
    bounds = WeightRange(0.01, 1.0)
    weights = torch.tensor([0.01, 0.1, 1.0, 10**-0.5])
    torch.testing.assert_close(bounds.condition(weights, 4), torch.tensor([-1.0, 0.0, 1.0, 0.5]))
    assert bounds.middle == pytest.approx(0.1) and bounds.condition(0.1, 3).tolist() == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("weight", [0.009, 1.01, 0.0, -1.0, float("nan"), torch.tensor([0.1, 3.0])])
def test_a_weight_outside_the_range_is_refused_with_its_bounds(weight):
    with pytest.raises(InputError, match=r"trained for 0\.01 to 1"):
        WeightRange(0.01, 1.0).condition(weight, 2)


# -- an iteration ------------------------------------------------------------------------------------------------------


class Engine:
    """A network that keeps what it was told and the gradient of its update, and never changes."""

    def __init__(self, module):
        self.module, self.told, self.gradient = module, [], None
        self.guard = SimpleNamespace(before_step=lambda: None, after_step=lambda: None)

    def __call__(self, *arguments, condition=None):
        self.told.append(condition)
        return self.module(*arguments, condition=condition)

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def fp16_enabled(self):
        return False

    def is_gradient_accumulation_boundary(self):
        return True

    def step(self):
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in self.module.parameters()])


def mlp(seed, condition=True):
    """Of weights none of which is zero."""
    torch.manual_seed(seed)
    network = MLP(2, hidden=16, depth=2, embedding=8, conditioned=condition)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def iterate(layout, weight=RANGE, **options):
    """Engines of generator and fake score after one iteration, of eight samples over all ranks of ``layout``."""
    generator, fake_score = Engine(mlp(1)), Engine(mlp(2))
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(4))
    source = SimpleNamespace(shape=(2,), batch=lambda positions: points[positions % 64])
    telemetry = SimpleNamespace(phase=lambda name: contextlib.nullcontext(), add=lambda *_: None)
    rdmd = RDMD(
        RDMDOptions(transport_weight=weight, sigma=LogNormalSigma(), weighting="sigma2", **options),
        DiffusionOptions(), Reading.of("mlp", DiffusionOptions(), 1.0),
        Networks(generator, fake_score, mlp(3, False)), source,
        StageContext(Philox(7), layout, torch.device("cpu"), torch.float32, telemetry),
    )  # fmt: skip
    rdmd.iteration(0)
    return generator, fake_score


@pytest.mark.parametrize(("micro", "ranks"), [(4, 1), (2, 2), (1, 4)])
def test_gradients_do_not_depend_on_micro_batches_and_ranks(micro, ranks):
    whole = iterate(BatchLayout(8, 8, 1, 0, 1))
    parts = [iterate(BatchLayout(8, micro, 8 // micro // ranks, rank, ranks)) for rank in range(ranks)]
    for expected, *engines in zip(whole, *parts, strict=True):
        mean = sum(engine.gradient for engine in engines) / ranks  # as engines average; a rank's loss is its own mean
        assert (mean - expected.gradient).norm() < 1e-5 * expected.gradient.norm()


def test_generator_and_fake_score_are_told_the_same_number_of_each_sample():
    generator, fake_score = iterate(BatchLayout(8, 8, 1, 0, 1), fake_updates=3)
    expected = [drawn(first, 8, seed=7).inputs["condition"] for first in (0, 8, 16)]
    # G: its own update, then two fresh rollouts; the fake score: in G's update, then its own three.
    for engine, rows in ((generator, (0, 1, 2)), (fake_score, (0, 0, 1, 2))):
        assert len(engine.told) == len(rows)
        assert all(torch.equal(told, expected[row]) for told, row in zip(engine.told, rows, strict=True))


def test_gradient_is_the_mean_of_those_at_each_samples_own_weight(monkeypatch):
    whole, values = iterate(BatchLayout(8, 8, 1, 0, 1)), drawn(0, 8, seed=7)
    gradients = []
    for sample in range(8):
        condition = {"condition": values.inputs["condition"][sample : sample + 1]}
        alone = SimpleNamespace(value=float(values.value[sample]), inputs=condition)
        monkeypatch.setattr(TransportWeights, "draw", lambda *_, alone=alone: alone)
        generator, _ = iterate(BatchLayout(8, 1, 1, sample, 8))
        gradients.append(generator.gradient)
    expected = whole[0].gradient
    assert (torch.stack(gradients).mean(0) - expected).norm() < 1e-5 * expected.norm()


# -- a run -------------------------------------------------------------------------------------------------------------


NETWORK = "{kind: mlp, hidden: 32, depth: 2, embedding: 16}"
RUN = [
    "--config", TOY, LOW_HIGH, f"network={NETWORK}", f"generator={NETWORK}", "rdmd.weighting=sigma2",
    "rdmd.fake_updates=2", "rdmd.fake_warmup=100", "rdmd.generator_optimizer.lr=1e-3", "rdmd.fake_optimizer.lr=5e-3",
    "rdmd.ema.half_life=1000", "train.global_batch_size=64", "validation.every=0", "validation.count=200",
    "telemetry.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any_weight") / "run"
    assert main([*RUN, f"run_dir={folder}", "train.steps=200"]) == 0
    return folder


def test_more_weight_keeps_outputs_closer_to_their_sources_as_the_closed_form_says(run):
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    found = lines[-1]["validation"]
    suffixes = ("_at_0.05", "", "_at_1")
    costs = [found[f"transport_cost{suffix}"] for suffix in suffixes]
    assert costs[0] > 2 * costs[1] > 4 * costs[2]
    expected = [found[f"axis_scale_0_expected{suffix}"] for suffix in suffixes]
    assert [expected[0], expected[2]] == pytest.approx([1.2959, 1.0325], abs=1e-4)
    assert [found[f"scale{suffix}"] for suffix in suffixes] == pytest.approx(expected, rel=0.08)


def test_an_export_takes_any_weight_of_its_range(run):
    generator = load_generator(run / "export")
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert generator.transport_weights == (0.05, 1.0)
    weights = torch.tensor([0.05, 0.1, 0.3, 0.7, 1.0])
    together = generator(x, transport_weight=weights)
    for sample, weight in enumerate(weights.tolist()):
        torch.testing.assert_close(generator(x, weight)[sample], together[sample])
    torch.testing.assert_close(generator(x), generator(x, 0.05**0.5))
    assert (generator(x, 0.05) - generator(x, 1.0)).abs().max() > 0.05
    for weight in (0.04, 1.1, torch.full((5,), 2.0)):
        with pytest.raises(InputError, match=r"trained for 0\.05 to 1"):
            generator(x, weight)
    with pytest.raises(InputError, match=r"shape \[4\], give a number or \[5\]"):
        generator(x, weights[:4])


def test_a_fake_score_of_a_checkpoint_takes_them_as_well(run, tmp_path, capsys):
    [checkpoint] = [folder for folder in (run / "checkpoints").iterdir() if folder.is_dir()]
    config, weights = read_network(checkpoint, "fake_score", "raw")
    assert config.transport_weights == [0.05, 1.0]
    write_export(tmp_path / "fake", config, weights)
    denoiser, x = load_denoiser(tmp_path / "fake"), torch.randn(4, 2)
    low, high = (denoiser(x, 0.5, transport_weight=weight) for weight in (0.05, 1.0))
    assert (low - high).abs().max() > 1e-3
    with pytest.raises(InputError, match="trained for"):
        denoiser(x, 0.5, transport_weight=3)
    command = ["--config", TOY, f"run_dir={tmp_path}/again", "generator={kind: teacher}", "network=", "diffusion="]
    assert main([*command, f"teacher={tmp_path}/fake"]) == 2
    assert "is told a λ" in capsys.readouterr().err


def test_a_fake_score_beside_a_teachers_export_keeps_the_range(run, tmp_path):
    generator = read_export_config(run / "export", "generator")
    values = {"role": "teacher", "reading": None, "generator_sigma": None, "transport_weights": None, "step": 7}
    teacher = generator.model_copy(update=values)
    raw = build_network(teacher.network, (2,))
    write_export(tmp_path / "teacher", teacher, raw.state_dict())
    found = _fake_score_config({"teacher": str(tmp_path / "teacher")}, generator)
    assert (found.role, found.transport_weights, found.step) == ("teacher", [0.05, 1.0], generator.step)


def test_a_generator_of_one_weight_takes_none(run, tmp_path):
    config = read_export_config(run / "export", "generator").model_copy(update={"transport_weights": None})
    weights = load_file(run / "export/generator.safetensors")
    write_export(tmp_path / "one", config, {k: v for k, v in weights.items() if not k.startswith("map_condition.")})
    generator, x = load_generator(tmp_path / "one"), torch.randn(3, 2)
    assert generator.transport_weights is None and generator(x).shape == x.shape
    with pytest.raises(InputError, match="takes none"):
        generator(x, transport_weight=0.3)
    # An export of before there was a range.
    path = tmp_path / "one/config.json"
    values = json.loads(path.read_text())
    assert values.pop("transport_weights", "missing") is None
    path.write_text(json.dumps(values))
    assert torch.equal(load_generator(tmp_path / "one")(x), generator(x))


def test_weights_without_the_conditioning_layers_do_not_pass_for_a_conditioned_generator(run, tmp_path):
    config = read_export_config(run / "export", "generator")
    weights = load_file(run / "export/generator.safetensors")
    write_export(tmp_path / "bad", config, {k: v for k, v in weights.items() if not k.startswith("map_condition.")})
    with pytest.raises(InputError, match="has no weight map_condition"):
        load_generator(tmp_path / "bad")


def test_a_run_of_a_range_does_not_go_on_with_a_number(run, capsys):
    assert main([*RUN, f"run_dir={run}", "rdmd.transport_weight=0.2", "train.steps=201"]) == 2
    assert "rdmd.transport_weight = {'log_uniform': [0.05, 1.0]}" in capsys.readouterr().err


def test_translate_passes_the_weight_on(tmp_path):
    config, raw = generator_of(small_unet(1), (3, 8, 8), transport_weights=[0.05, 1.0])
    for parameter in raw.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(raw.map_condition.layer1.weight)
    write_export(tmp_path / "model", config, raw.state_dict())
    photo = random_pixels(0, 8, 8, 3)
    save_images(tmp_path / "in", {"a.png": photo})
    x = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
    command = ["translate", "--model", str(tmp_path / "model"), "--input", str(tmp_path / "in")]
    outputs = []
    for name, weight in (("low", 0.05), ("high", 1.0), ("middle", None)):
        flag = [] if weight is None else ["--transport-weight", str(weight)]
        assert cli.main([*command, "--output", str(tmp_path / name), *flag]) == 0
        with torch.no_grad():
            expected = to_uint8(load_generator(tmp_path / "model")(x, weight))[0].permute(1, 2, 0).numpy()
        outputs.append(pixels_of(tmp_path / name / "a.png").astype(int))
        assert np.abs(outputs[-1] - expected).max() <= 1
    assert np.abs(outputs[0] - outputs[1]).mean() > 1
    assert cli.main([*command, "--output", str(tmp_path / "none"), "--transport-weight", "2"]) == 2
    assert not (tmp_path / "none").exists()


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "words"), [
    ("{log_uniform: [2, 1]}", ["rdmd.transport_weight", "low below high"]),
    ("{log_uniform: [0, 1]}", ["rdmd.transport_weight.log_uniform.0", "greater"]),
    ("{log_uniform: [1]}", ["rdmd.transport_weight.log_uniform", "2 items"]),
    ("{log_uniform: [0.1, 1], low: 3}", ["unknown key rdmd.transport_weight.low"]),
    ("{uniform: [0, 1]}", ["rdmd.transport_weight.log_uniform: missing"]),
    ("-1", ["rdmd.transport_weight", "greater", "-1"]),
    ("much", ["rdmd.transport_weight", "valid number", "much"]),
    ("[0.1, 1]", ["rdmd.transport_weight", "valid number"]),
])  # fmt: skip
def test_what_is_no_weight_is_refused_by_name(value, words):
    with pytest.raises(InputError) as raised:
        load_config(TOY, [f"rdmd.transport_weight={value}", "generator={kind: mlp}"])
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_an_affine_generator_takes_no_range():
    with pytest.raises(InputError, match=r"rdmd\.transport_weight: an affine generator"):
        load_config(TOY, [LOW_HIGH, "generator={kind: affine}"])


def test_the_range_survives_the_resolved_configuration():
    config = load_config(TOY, [LOW_HIGH, "generator={kind: mlp}"])
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    assert WeightRange.of(config.rdmd.transport_weight) == (0.05, 1.0)


def test_conditioning_weights_are_those_of_the_condition_alone():
    assert conditioning_weights(mlp(0, False)) == {}
    names = set(mlp(0).state_dict()) - set(mlp(0, False).state_dict())
    assert set(conditioning_weights(mlp(0))) == names and len(names) == 4
