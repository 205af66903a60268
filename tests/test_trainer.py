"""A whole run on packed digits: files, metrics, pictures, export, translation, signals."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rdmd_fast import cli, load_denoiser, load_generator
from rdmd_fast.checkpoints import checkpoint
from rdmd_fast.config import load_config
from rdmd_fast.processes.signals import StopRequest
from rdmd_fast.processes.world import join_world
from rdmd_fast.trainer import main, run

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Digits, a teacher of three steps, and a distillation of four, validated twice."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["pack", "digits", "--out", str(folder / "shards"), "--hues", "1"]) == 0
    teacher = [f"run_dir={folder}/teacher", f"data.target={folder}/shards/3/train", "train.steps=3"]
    batch = ["train.global_batch_size=4", "telemetry.log_every=1"]
    assert main(["--config", str(CONFIGS / "digits/teacher_3.yaml"), *teacher, *batch]) == 0
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *distillation(folder, "rdmd"), *batch]) == 0
    return folder


def distillation(folder, name):
    return [
        f"run_dir={folder}/{name}", f"teacher={folder}/teacher/export",
        f"data.source={folder}/shards/2/train",
        f"data.source_holdout={folder}/shards/2/test",
        f"data.target_holdout={folder}/shards/3/test",
        f"validation.judge={folder}/shards",
        "validation.every=2", "telemetry.sample_every=2", "checkpoint.every=2", "rdmd.fake_updates=2", "train.steps=4",
    ]  # fmt: skip


UNMEASURED = ["validation.judge=null", "validation.every=0", "telemetry.sample_every=0", "telemetry.tensorboard=false"]


def test_run_folder_holds_what_the_contract_names(runs):
    run = runs / "rdmd"
    assert yaml.safe_load((run / "config.yaml").read_text())["rdmd"]["generator_sigma"] == 1.0
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000004"
    assert {path.name for path in (run / "samples").iterdir()} == {"step_00000002.png", "final.png"}
    assert {path.name for path in (run / "export").iterdir()} == {"README.md", "config.json", "generator.safetensors"}
    assert (run / "best/generator.safetensors").exists()
    assert list((run / "tensorboard").glob("events*"))
    assert (runs / "teacher/export/teacher.safetensors").exists()
    assert not list(run.rglob("*.partial"))


def test_metrics_lines_say_what_was_trained(runs):
    lines = [json.loads(text) for text in (runs / "rdmd/metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "fake_loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert [line["samples"] for line in training] == [4, 8, 12, 16]
    for line in training:
        expected = {"transport_cost", "score_gradient_rms", "images_per_second", "seconds", "lr/generator"}
        assert expected | {"grad_norm/generator", "grad_norm/fake_score"} <= line.keys()
        assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))
    validations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validations] == [2, 4]
    assert {"l2", "psnr", "share_3nn", "frechet", "colour_cosine"} <= validations[0]["validation"].keys()


def test_best_export_is_the_one_with_the_lowest_metric(runs):
    lines = [json.loads(text) for text in (runs / "rdmd/metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation"]["frechet"] for line in lines if "validation" in line}
    assert json.loads((runs / "rdmd/best/config.json").read_text())["step"] == min(scores, key=scores.get)


def test_picture_has_four_rows(runs):
    with Image.open(runs / "rdmd/samples/final.png") as picture:
        assert picture.height > 4 * 48 and picture.width > 16 * 48


def test_translation_is_the_exported_generator(runs, tmp_path):
    output, source = tmp_path / "out", runs / "shards/2/test"
    places = ["--input", str(source), "--output", str(output)]
    assert cli.main(["translate", "--model", str(runs / "rdmd/export"), *places]) == 0
    from rdmd_fast.data.shards.shard_set import ShardSet

    shards, generator = ShardSet(source), load_generator(runs / "rdmd/export")
    written = sorted(output.glob("*.png"))
    assert [path.stem for path in written] == sorted(shards.keys)
    index = shards.keys.index(written[0].stem)
    x = torch.tensor(shards.read(index)).permute(2, 0, 1)[None].float() / 127.5 - 1
    y = generator(x)[0].permute(1, 2, 0)
    with Image.open(written[0]) as image:
        np.testing.assert_allclose(np.asarray(image), ((y + 1) * 127.5).clamp(0, 255).numpy(), atol=0.51)


def test_folder_of_images_keeps_names_and_structure(runs, tmp_path):
    for name in ("a.png", "sub/b.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (13, 9), (200, 30, 30)).save(path)
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert cli.main(["translate", "--model", str(runs / "rdmd/export"), *places]) == 0
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["a.png", "sub/b.png"]


def test_untrained_generator_is_the_teacher_read_at_generator_sigma(runs):
    """G starts from the teacher's weights: a run of no steps exports the teacher's denoiser at σ = 1."""
    arguments = [*distillation(runs, "untrained"), *UNMEASURED, "train.steps=0"]
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments]) == 0
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    teacher = load_denoiser(runs / "teacher/export")
    torch.testing.assert_close(load_generator(runs / "untrained/export")(x), teacher(x, 1.0), rtol=1e-5, atol=1e-5)


def test_finished_run_is_left_alone(runs, capsys):
    before = (runs / "rdmd/metrics.jsonl").read_bytes()
    arguments = [*distillation(runs, "rdmd"), "train.global_batch_size=4"]
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (runs / "rdmd/metrics.jsonl").read_bytes() == before


def test_config_changed_between_runs_is_refused(runs, capsys):
    arguments = [*distillation(runs, "rdmd"), "train.global_batch_size=4", "rdmd.transport_weight=3", "train.steps=6"]
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments]) == 2
    message = capsys.readouterr().err
    assert "rdmd.transport_weight = 0.1" in message and "3" in message


def test_broken_checkpoint_is_passed_over(runs, capsys):
    checkpoints = runs / "rdmd/checkpoints"
    victim = checkpoints / "step_00000004/generator/00000.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-7])
    arguments = [*distillation(runs, "rdmd"), "train.global_batch_size=4", "telemetry.log_every=1"]
    try:
        assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments]) == 0
    finally:
        victim.write_bytes(whole) if victim.exists() and victim.stat().st_size != len(whole) else None
    printed = capsys.readouterr().out
    assert "passed over" in printed and "resumed" in printed and "step_00000002" in printed


def test_dry_run_trains_nothing(runs, capsys):
    arguments = [*distillation(runs, "dry"), "deepspeed.zero_optimization.stage=2"]
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    size = sum(tensor.numel() for tensor in load_denoiser(runs / "teacher/export").parameters())
    assert f"{size / 1e6:.3f} M parameters" in printed
    assert any(line.startswith("  ZeRO 2") and line.endswith("<- configured") for line in printed.splitlines())
    assert not (runs / "dry").exists()


def toy_arguments(run_dir, steps):
    toy = ["--config", str(CONFIGS / "toy/gaussian_to_gaussian.yaml"), f"run_dir={run_dir}", f"train.steps={steps}"]
    return [*toy, "telemetry.log_every=5", "validation.every=0", "validation.count=50", "rdmd.fake_warmup=0"]


def test_stop_with_a_due_checkpoint_writes_it_once(tmp_path, monkeypatch):
    saved, save = [], checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *state: saved.append(state[1]) or save(*state))

    class Stop:
        requested = property(lambda self: StopRequest("SIGTERM") if saved else None)

    _, path, *overrides = [*toy_arguments(tmp_path / "run", 5), "checkpoint.every=2", "telemetry.tensorboard=false"]
    config = load_config(path, overrides)
    (tmp_path / "run").mkdir()
    assert run(config, "auto", join_world(), tmp_path / "run", Stop()) == 75
    assert saved == [2]


def test_sigterm_saves_exits_75_and_the_same_command_goes_on(rank_server, tmp_path):
    log = tmp_path / "log"
    (process,) = rank_server.start(toy_arguments(tmp_path / "run", 100000), 1, log)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process, signal.SIGTERM)
    assert rank_server.wait([process]) == [75], log.read_text()
    stopped = int((tmp_path / "run/checkpoints/latest").read_text().strip().removeprefix("step_"))
    assert main(toy_arguments(tmp_path / "run", stopped + 5)) == 0
    steps = [json.loads(text)["step"] for text in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and stopped < steps[-1] <= stopped + 5


def test_class_conditional_teacher_is_distilled_at_its_target_class(runs):
    """The label must reach all three networks: another class gives another untrained generator."""
    run = runs / "classes"
    target = f"data.target={runs}/shards/3/train"
    config = ["--config", str(CONFIGS / "digits/teacher_3.yaml"), f"run_dir={run}", target]
    small = ["train.steps=2", "train.global_batch_size=4", "telemetry.tensorboard=false"]
    assert main([*config, *small, "network.label_dim=4", "data.target_class=1"]) == 0
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    outputs = []
    for label in (1, 2):
        arguments = [
            *distillation(runs, f"class_{label}"),
            f"teacher={run}/export",
            f"data.target_class={label}",
            *UNMEASURED,
        ]
        assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments, *small, "train.steps=1"]) == 0
        outputs.append(load_generator(runs / f"class_{label}/export")(x))
    expected = load_denoiser(run / "export")(x, 1.0, torch.tensor([2, 2]))
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], expected, rtol=0, atol=0.05)  # one step of training away


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_trains_and_exports_at_every_zero_stage(runs, stage):
    arguments = [*distillation(runs, f"bf16_{stage}"), *UNMEASURED, "train.dtype=bf16", "train.global_batch_size=4"]
    zero = [f"deepspeed.zero_optimization.stage={stage}", "telemetry.log_every=1"]
    assert main(["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments, *zero]) == 0
    run = runs / f"bf16_{stage}"
    exact, rounded = (
        [
            line
            for text in (folder / "metrics.jsonl").read_text().splitlines()
            if "fake_loss" in (line := json.loads(text))
        ]
        for folder in (runs / "rdmd", run)
    )
    assert len(exact) == 4
    for line, other in zip(exact, rounded, strict=True):
        assert other["fake_loss"] == pytest.approx(line["fake_loss"], rel=3e-2)
        assert other["transport_cost"] == pytest.approx(line["transport_cost"], rel=3e-2)


def test_starting_anew_sets_old_checkpoints_aside(runs):
    arguments = [*distillation(runs, "anew"), *UNMEASURED, "train.global_batch_size=4"]
    config = ["--config", str(CONFIGS / "digits/rdmd_2to3.yaml"), *arguments]
    assert main([*config, "train.steps=2"]) == 0
    assert main([*config, "train.steps=1", "--resume", "never"]) == 0
    run = runs / "anew"
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert [path.name for path in (run / "checkpoints.old").glob("step_*")] == ["step_00000002"]
    assert json.loads((run / "export/config.json").read_text())["step"] == 1


def test_evaluation_puts_baselines_beside_the_generator(runs, capsys):
    shards, report = runs / "shards", runs / "report.json"
    arguments = ["--model", f"{runs}/rdmd/export", "--teacher", f"{runs}/teacher/export", "--judge", str(shards)]
    arguments += ["--source", f"{shards}/2/test", "--target", f"{shards}/3/test", "--label", "3", "--out", str(report)]
    assert cli.main(["evaluate", *arguments, "--picture", f"{runs}/grid.png"]) == 0
    printed = capsys.readouterr().out
    rows = {row["name"].split()[0]: row for row in json.loads(report.read_text())["rows"]}
    assert set(rows) == {"RDMD", "identity", "untrained"} and all(name in printed for name in rows)
    assert rows["identity"]["l2"] == 0 and rows["identity"]["colour_cosine"] == pytest.approx(1)
    assert rows["identity"]["share_3nn"] < 0.1
    # Four steps from it at a small rate, the generator is still close to the untrained one.
    assert rows["RDMD"]["l2"] == pytest.approx(rows["untrained"]["l2"], rel=0.2)
    assert (runs / "grid.png").exists()


def test_evaluation_of_a_toy_run_prints_the_closed_form(tmp_path, capsys):
    assert main([*toy_arguments(tmp_path / "run", 3), "generator.scale=1.4", "telemetry.tensorboard=false"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert "closed form 1.3233, 1.3233" in printed
    assert report["scale"] == pytest.approx(1.4, abs=0.02)
