"""Bad input: exit 2, one line, no traceback, nothing half-written."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from material import error_line, npy, random_pixels, write_shards, write_tar

from rdmd_fast import cli
from rdmd_fast.config import load_config
from rdmd_fast.trainer import main

CONFIGS = Path(__file__).parents[2] / "configs"
TEACHER, RDMD = CONFIGS / "digits/teacher_3.yaml", CONFIGS / "digits/rdmd_2to3.yaml"


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory):
    """A teacher of 8×8 digits, trained for one step."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    options = [f"data.target={shards}/3/train", "train.steps=1", "train.global_batch_size=2"]
    options.append("telemetry.tensorboard=false")
    assert main(["--config", str(TEACHER), f"run_dir={run}", *options]) == 0
    return run / "export"


def fails(capsys, config, run_dir, *overrides):
    """The one line of a run that must end with status 2 and leave no run folder behind half-written."""
    capsys.readouterr()
    assert main(["--config", str(config), f"run_dir={run_dir}", *overrides]) == 2
    line = error_line(capsys, "[20")
    written = [path.name for path in Path(run_dir).rglob("*") if path.is_file() and path.name != ".lock"]
    assert not written, written
    return line


@pytest.mark.parametrize(("overrides", "words"), [
    (["data.target={folder}/nowhere"], ["nowhere"]),
    (["train.step=3"], ["train.step", "train.steps"]),
    (["train.steps=a"], ["train.steps"]),
    (["data.target={shards}/3/train", "train.micro_batch_size=7"], ["train.micro_batch_size 7"]),
    (["data.target={shards}/3/train", "deepspeed.zero_optimization.stagee=1"], ["stagee"]),
    (["data.target={shards}/3/train", "data.target_class=3"], ["no classes"]),
], ids=["folder", "key", "type", "batch", "deepspeed", "class"])  # fmt: skip
def test_bad_options_of_a_teacher(capsys, tmp_path, shards, overrides, words):
    overrides = [each.format(folder=tmp_path, shards=shards) for each in overrides]
    line = fails(capsys, TEACHER, tmp_path / "run", *overrides)
    assert all(word in line for word in words), line


def test_teacher_of_another_shape(capsys, tmp_path, shards, teacher):
    write_shards(tmp_path / "packed", random_pixels(0, 2, 16, 16, 3))
    options = [f"teacher={teacher}", f"data.source={tmp_path}/packed", "data.source_holdout=null"]
    line = fails(capsys, RDMD, tmp_path / "run", *options)
    assert "(3, 8, 8)" in line and "(3, 16, 16)" in line


def test_truncated_safetensors(capsys, tmp_path, shards, teacher):
    broken = altered(teacher, tmp_path / "export")
    whole = (teacher / "teacher.safetensors").read_bytes()
    options = [f"teacher={broken}", f"data.source={shards}/2/train"]
    for size in (len(whole) - 1000, 200, 4, 0):
        (broken / "teacher.safetensors").write_bytes(whole[:size])
        line = fails(capsys, RDMD, tmp_path / "run", *options)
        assert "teacher.safetensors" in line


def test_export_of_another_network(capsys, tmp_path, shards, teacher):
    values = json.loads((teacher / "config.json").read_text())
    values["network"]["model_channels"] = 64
    other = altered(teacher, tmp_path / "export", **values)
    options = [f"teacher={other}", f"data.source={shards}/2/train"]
    assert "has shape" in fails(capsys, RDMD, tmp_path / "run", *options)
    for text in ("{", "[]", '{"format": 1}', json.dumps({**values, "surprise": 1})):
        (other / "config.json").write_text(text)
        assert "config.json" in fails(capsys, RDMD, tmp_path / "run", *options)


def test_run_folder_that_is_a_file(capsys, tmp_path, shards):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, TEACHER, tmp_path / "file/run", f"data.target={shards}/3/train")


def test_run_folder_in_use(capsys, tmp_path, shards):
    from rdmd_fast.processes.run_lock import run_lock

    with run_lock(tmp_path / "run"):
        assert "another job" in fails(capsys, TEACHER, tmp_path / "run", f"data.target={shards}/3/train")


def test_resume_from_what_is_no_checkpoint(capsys, tmp_path, shards):
    (tmp_path / "step_00000001").mkdir()
    capsys.readouterr()
    arguments = ["--config", str(TEACHER), f"run_dir={tmp_path}/run"]
    arguments += [f"data.target={shards}/3/train", "--resume", str(tmp_path / "step_00000001")]
    assert main(arguments) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_translate_refuses_what_it_cannot_use(capsys, tmp_path, shards, teacher):
    for model, source in ((tmp_path, shards / "2/test"), (teacher, shards / "2/test")):
        capsys.readouterr()
        arguments = ["translate", "--model", str(model), "--input", str(source), "--output", str(tmp_path / "out")]
        assert cli.main(arguments) == 2
        assert error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_real_process_exits_with_2_and_one_line(tmp_path):
    """Through the script itself, as a scheduler would see it."""
    script = CONFIGS.parent / "rdmd_fast/train.py"
    command = [sys.executable, str(script), "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


LETTERS = "abcdefghij"
LAUGHS = "deepspeed: {a: &a [x, x, x], " + ", ".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(LETTERS)
)
MERGES = "deepspeed: {a: &a {k: 1}, " + ", ".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}" for old, new in pairwise(LETTERS)
)


@pytest.mark.parametrize(("text", "says"), [
    ('seed: !!int ""', "not valid YAML"),
    ("seed: !!bool maybe", "not valid YAML"),
    ("seed: !!timestamp maybe", "not valid YAML"),
    ('seed: !!python/object/apply:os.system ["touch executed"]', "not valid YAML"),
    (LAUGHS + "}", "remove aliases"),
    (MERGES + "}", "too many values"),
    ("data: {target: [" + "a.tar, " * 30_000 + "]}", "write a long list of shards as a pattern"),
    ("deepspeed: &a {b: *a}", "nested deeper"),
    ("deepspeed: {a: &a {k: 1, b: &b {<<: [*a, *a]}}}", "nested deeper"),
    ("deepspeed: {a: &a {" + "".join(f"k{i}: 1, " for i in range(3000)) + "}, b: {<<: [*a, *a, *a]}}", "too many"),
    ("deepspeed: {a: &a " + "x" * 10**5 + ", b: [" + "*a , " * 9000 + '], c: "\\0"}', "c: holds control"),
    ("deepspeed: {a: .nan}", "deepspeed.a: is nan"),
    ("deepspeed: {a: 2001-01-01}", "deepspeed.a: is a date"),
    ("deepspeed: {1: 2}", "key '1' is no name"),
    ('deepspeed: {"a\\nb": 2}', r"key 'a\nb' is no name"),
    ("seed: 0x" + "f" * 5000, "huge number"),
    ('teacher: "a\\0b"', "teacher: holds control characters"),
    ('teacher: "a\\x9bb"', "teacher: holds control characters"),
    ('teacher: "\\ud800"', "teacher: holds control characters"),
    ("train: {steps: " + "[" * 20 + "]" * 20 + "}", "train.steps"),
    (f"train: {{steps: {'x' * 10**5}}}", "train.steps"),
], ids=lambda value: value[:30])  # fmt: skip
def test_yaml_that_is_no_configuration(capsys, tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"{text}\nstage: teacher\n")
    line = fails(capsys, tmp_path / "config.yaml", tmp_path / "run")
    assert says in line and line.isprintable() and len(line) < 900
    assert not (tmp_path / "executed").exists()


def test_texts_that_people_write_are_accepted(tmp_path):
    """Spaces that `str.isprintable` knows not (French, macOS, Japanese), and commands of several lines."""
    names = "photos\u00a0d\u2019\u00e9t\u00e9\u202f!/\u3000\u732b"
    command = "pipe:cat a.tar |\n\tzstd -d\n"
    head = f"stage: rdmd\nrun_dir: {names}\nteacher: t\ndata:\n  target: {names}\n  source: |\n    "
    text = head + command.replace("\n", "\n    ") + "\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    config = load_config(str(tmp_path / "config.yaml"))
    assert (config.run_dir, config.data.target, config.data.source) == (names, names, command)


def test_a_list_of_thousands_of_shards_is_read(tmp_path):
    shards = [f"https://storage.example.org/datasets/photos/256x256/train/{number:06d}.tar" for number in range(4000)]
    config = {"stage": "teacher", "run_dir": "r", "teacher": "t", "data": {"target": shards}}
    (tmp_path / "config.yaml").write_text(json.dumps(config, indent=1))
    assert load_config(str(tmp_path / "config.yaml")).data.target == shards


def test_config_that_is_no_file(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("#" * 2**20)
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", tmp_path / "long", tmp_path / ("x" * 300)):
        line = fails(capsys, path, tmp_path / "run")
        assert "cannot be read" in line and ("as a pattern" in line) == (path == tmp_path / "long")


def test_a_class_that_the_teacher_does_not_have(capsys, tmp_path, shards, teacher):
    from safetensors.torch import load_file, save_file

    network = json.loads((teacher / "config.json").read_text())["network"]
    labelled = altered(teacher, tmp_path / "labelled", network=network | {"label_dim": 3})
    weights = load_file(labelled / "teacher.safetensors")
    name = next(name for name in weights if name.endswith("map_layer0.weight"))
    weights[name.replace("map_layer0", "map_label")] = weights[name][:, :3].contiguous()
    save_file(weights, labelled / "teacher.safetensors")
    options = [f"teacher={labelled}", f"data.source={shards}/2/train", "data.source_holdout=null"]
    for wrong in (["data.target_class=3"], []):
        line = fails(capsys, RDMD, tmp_path / "run", *options, *wrong)
        assert "data.target_class: the network has 3 classes, name one from 0 to 2" in line


@pytest.mark.parametrize("override", [
    "train.steps=10000000000000", "train.global_batch_size=100000000", "network.model_channels=1000000",
    "network.channel_mult=[1,-1]", "network.num_blocks=1000", "teacher_stage.optimizer.lr=.inf",
    "teacher_stage.optimizer.lr=1e-300", "teacher_stage.optimizer.betas=[0.9,1.0]", "diffusion.sigma_data=1e-30",
    "teacher_stage.sigma={kind: log_uniform, sigma_min: 2, sigma_max: 1}", "deepspeed.zero_optimization.stage=true",
])  # fmt: skip
def test_options_that_nobody_means(capsys, tmp_path, override):
    line = fails(capsys, TEACHER, tmp_path / "run", "data.target=nowhere", override)
    assert override.partition("=")[0].split(".")[-1] in line


def test_a_network_larger_than_the_machine_is_counted_or_refused(capsys, tmp_path, shards):
    options = [f"data.target={shards}/3/train", "network.model_channels=16384", "network.channel_mult=[64]"]
    arguments = ["--config", str(TEACHER), f"run_dir={tmp_path}/run", "--dry-run", *options]
    assert main(arguments) == 0
    assert "M parameters" in capsys.readouterr().out


def altered(teacher, folder, **changes):
    """A copy of an export whose config.json says something else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((teacher / "config.json").read_text()) | changes))
    (folder / "teacher.safetensors").write_bytes((teacher / "teacher.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(("changes", "says"), [
    ({"role": "generator"}, "reading and generator_sigma"),
    ({"reading": "as it is"}, "reading"),
    ({"sample_shape": [3, -8, 8]}, "sample_shape"),
    ({"sample_shape": []}, "sample_shape"),
    ({"diffusion": {"sigma_data": float("nan")}}, "sigma_data"),
    ({"diffusion": {"sigma_data": 1e300}}, "sigma_data"),
    ({"target_class": -1}, "target_class"),
    ({"network": {"kind": "song_unet", "model_channels": 16384, "channel_mult": [64], "num_blocks": 1}}, "has shape"),
    ({"network": {"kind": "song_unet", "channel_mult": [1] * 10, "num_blocks": 64}}, "too few for the layers"),
])  # fmt: skip
def test_exports_that_say_what_they_are_not(tmp_path, teacher, changes, says):
    from rdmd_fast import load_denoiser
    from rdmd_fast.errors import InputError

    folder = altered(teacher, tmp_path / "export", **changes)
    with pytest.raises(InputError, match="export") as refusal:
        load_denoiser(folder)
    assert says in str(refusal.value)


def test_weights_that_are_no_numbers(tmp_path, teacher):
    import torch
    from safetensors.torch import load_file, save_file

    from rdmd_fast import load_denoiser
    from rdmd_fast.errors import InputError

    whole = load_file(teacher / "teacher.safetensors")
    name = sorted(whole)[0]
    for odd, says in ((whole[name] * float("nan"), "not finite"), (whole[name].to(torch.complex64), "complex64")):
        folder = altered(teacher, tmp_path / says.replace(" ", "_"))
        save_file(whole | {name: odd}, folder / "teacher.safetensors")
        with pytest.raises(InputError, match=says):
            load_denoiser(folder)
    folder = altered(teacher, tmp_path / "pipe")
    (folder / "teacher.safetensors").unlink()
    os.mkfifo(folder / "teacher.safetensors")
    with pytest.raises(InputError, match="missing"):
        load_denoiser(folder)


def test_translate_writes_no_file_outside_its_output(capsys, tmp_path, teacher):
    """The keys of other people's tars are file names of their choice."""
    import numpy as np

    from rdmd_fast.data.shards.shard_set import ShardSet
    from rdmd_fast.model_files.export_format import read_export, write_export

    config, weights = read_export(teacher, "teacher")
    update = {"role": "generator", "reading": "teacher", "generator_sigma": 1.0}
    write_export(tmp_path / "generator", config.model_copy(update=update), weights)
    array = npy(np.zeros((3, 8, 8), np.float32))
    for name in ("../outside.npy", "/tmp/rdmd_outside.npy", "a/../../outside.npy"):
        write_tar(tmp_path / "in/a.tar", {"good.npy": array, name: array})
        assert len(ShardSet(tmp_path / "in")) == 2
        arguments = ["--model", str(tmp_path / "generator"), "--input", str(tmp_path / "in")]
        assert cli.main(["translate", *arguments, "--output", str(tmp_path / "out/put")]) == 2
        assert "no name for a file below" in capsys.readouterr().err
    assert not list(tmp_path.rglob("outside*")) and not (tmp_path / "out").exists()
