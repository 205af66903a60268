"""``rdmd export``: networks out of checkpoints, without a job. Shards of two ranks: engine/test_distributed.py."""

import json
import shutil

import pytest
import torch
from material import toy_rdmd
from safetensors.torch import load_file

from rdmd_fast import cli, load_denoiser, load_generator
from rdmd_fast.trainer import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A toy's folder with checkpoints of steps 2, 4 and 5."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    config = run.parent / "toy.json"
    values = toy_rdmd(
        run_dir=str(run),
        generator={"kind": "mlp", "hidden": 8, "depth": 2},
        rdmd={"weighting": "uniform", "generator_optimizer": {"lr": 0.01}, "ema": {"half_life": 32.0, "ramp": 1.0}},
        train={"steps": 5, "global_batch_size": 16},
        checkpoint={"every": 2, "keep": 3},
    )
    config.write_text(json.dumps(values))
    assert main(["--config", str(config)]) == 0
    return run


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def test_newest_checkpoint_is_what_the_run_exported(run):
    assert export(run) == 0
    own, read = (load_file(run / folder / "generator.safetensors") for folder in ("export", "exports/step_00000005"))
    assert own.keys() == read.keys() and all(own[name].equal(read[name]) for name in own)
    x = torch.randn(4, 2)
    torch.testing.assert_close(load_generator(run / "exports/step_00000005")(x), load_generator(run / "export")(x))


def test_cards_are_of_the_run_and_of_the_step(run, tmp_path):
    assert export(f"{run}@4", "--out", tmp_path / "four", "--license", "mit") == 0
    assert export(run, "--weights", "raw", "--out", tmp_path / "raw") == 0
    (measured,) = [line["validation"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                   if "validation" in line]  # fmt: skip
    own, four, raw = (
        (folder / "README.md").read_text() for folder in (run / "export", tmp_path / "four", tmp_path / "raw")
    )
    assert "| step | `5` |" in own and "| step | `4` |" in four and "license: mit\n" in four
    for name, value in measured.items():
        assert f"| `{name}` | {value:.4g} |" in own
    assert "## Metrics at step 5" in own and "## Metrics" not in four and "## Metrics" not in raw
    assert "| source data | toy `gaussian`" in own and "closed form" in own and str(run) not in own


def test_averages_follow_from_the_raw_weights_of_every_step(run, tmp_path):
    """Two checkpoints apart by one iteration: ema' = d ema + (1 - d) weights, d = 0.5^(batch / half-life)."""
    averages = []
    for step in (4, 5):
        assert export(f"{run}@{step}", "--out", tmp_path / f"{step}") == 0
        averages.append(load_file(tmp_path / f"{step}/generator.safetensors"))
    assert export(f"{run}@5", "--weights", "raw", "--out", tmp_path / "raw") == 0
    assert json.loads((tmp_path / "raw/config.json").read_text())["step"] == 5
    raw = load_file(tmp_path / "raw/generator.safetensors")
    decay = 0.5 ** (16 / 32)
    for name, value in raw.items():
        torch.testing.assert_close(averages[1][name], decay * averages[0][name] + (1 - decay) * value)
        assert not averages[1][name].equal(value)


def test_fake_score_denoises_what_the_generator_makes(run, tmp_path):
    assert export(run, "--network", "fake_score", "--weights", "raw", "--out", tmp_path / "fake") == 0
    denoiser = load_denoiser(tmp_path / "fake")
    assert {name: list(value.shape) for name, value in denoiser.model.state_dict().items()} == json.loads(
        (run / "checkpoints/step_00000005/manifest.json").read_text()
    )["engines"]["fake_score"]["parameters"]
    y = torch.randn(8, 2)
    torch.testing.assert_close(denoiser(y, 1e-4), y, atol=1e-3, rtol=0)  # without noise there is nothing to remove


@pytest.mark.parametrize("arguments,message", [
    (["--network", "fake_score"], "fake_score is not averaged, ask for --weights raw"),
    (["--network", "teacher"], "its teacher is a closed form"),
    (["--out", "{run}/samples"], "exists and is no export"),
])  # fmt: skip
def test_what_is_not_there_is_one_line(run, capsys, arguments, message):
    (run / "samples").mkdir(exist_ok=True)
    assert export(run, *(argument.format(run=run) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


def test_steps_that_are_there_are_named(run, tmp_path, capsys):
    assert export(f"{run}@3") == 2
    assert "has no checkpoint of step 3, there are 2, 4, 5" in capsys.readouterr().err
    assert export(tmp_path) == 2
    assert "no checkpoints there" in capsys.readouterr().err


def test_damaged_newest_checkpoint_is_passed_over_or_refused(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    victim = copy / "checkpoints/step_00000005/generator/00000.safetensors"
    whole = bytearray(victim.read_bytes())
    whole[-1] ^= 1
    victim.write_bytes(whole)
    assert export(copy) == 2
    assert "generator/00000.safetensors is not what was written" in capsys.readouterr().err
    victim.write_bytes(whole[:-1])
    assert export(copy) == 0
    assert "step 4" in capsys.readouterr().out
