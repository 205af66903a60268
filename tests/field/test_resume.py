"""A run goes on with the data and the teacher that it began with, wherever they lie by now, and with no others."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from material import encoded, picture, write_shards, write_tar

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.trainer import main

POINTS = np.random.default_rng(0).normal(size=(2, 40, 2)).astype(np.float32)
NETWORK = {"kind": "mlp", "hidden": 8, "depth": 1}
QUIET = {
    "telemetry": {"log_every": 1, "sample_every": 0, "tensorboard": False},
    "checkpoint": {"every": 0},
    "train": {"steps": 1, "global_batch_size": 8},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of two sets and of a run of each stage, each of one step."""
    folder = tmp_path_factory.mktemp("made")
    for name, points in zip("ab", POINTS, strict=True):
        write_shards(folder / name, points, each=20)
    teacher = {"stage": "teacher", "run_dir": "teacher", "data": {"target": "a"}, "network": NETWORK}
    rdmd = {"stage": "rdmd", "run_dir": "run", "teacher": "teacher/export", "data": {"source": "b", "target": "a"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, values in (("teacher", teacher), ("rdmd", rdmd)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | QUIET))
            assert main(["--config", f"{name}.yaml"]) == 0
    return folder


@pytest.fixture
def go_on(made, tmp_path, monkeypatch, capsys):
    """``go_on(stage, override, …)`` continues for a step, in a copy of ``made``: (exit status, what was said)."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(stage, *overrides):
        capsys.readouterr()
        status = main(["--config", f"{stage}.yaml", "train.steps=2", *overrides])
        return status, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("place", ["a/", "./a", "{cwd}/a", "moved", "link", "[a]"])
def test_the_same_data_may_have_another_path(go_on, tmp_path, place):
    shutil.copytree("a", "moved")
    (tmp_path / "link").symlink_to("a")
    status, said = go_on("teacher", f"data.target={place.format(cwd=tmp_path)}")
    assert status == 0 and "resumed" in said


def test_other_data_under_the_same_name_are_refused(go_on):
    shutil.rmtree("a")
    shutil.copytree("b", "a")
    status, said = go_on("teacher")
    assert status == 2 and "was trained with another data.target than" in said and said.count("\n") == 1


def test_the_same_teacher_may_have_another_path(go_on):
    shutil.move("teacher", "elsewhere")
    status, said = go_on("rdmd", "teacher=elsewhere/export", "data.target=b", "data.source=./b")
    assert status == 0 and "resumed" in said


def test_another_teacher_under_the_same_name_is_refused(go_on):
    from safetensors.torch import load_file, save_file

    weights = load_file("teacher/export/teacher.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, "teacher/export/teacher.safetensors")
    status, said = go_on("rdmd")
    assert status == 2 and "was trained with another teacher than" in said


def test_a_checkpoint_that_tells_no_hashes_is_compared_by_name(go_on, tmp_path):
    from rdmd_fast.checkpoints.manifest import read_manifest, write_manifest

    folder = next((tmp_path / "teacher/checkpoints").glob("step_*"))
    manifest = read_manifest(folder)
    content = {key: value for key, value in manifest.items() if key not in ("format", "files", "sha256", "made_of")}
    write_manifest(folder, content, manifest["files"])
    assert go_on("teacher", "data.target=./a")[0] == 2
    assert go_on("teacher")[0] == 0


def test_the_hashes_of_a_set_are_of_its_content(tmp_path):
    for place, shift in (("here", 0), ("deep/there", 0), ("other", 1)):
        write_tar(tmp_path / place / "x.tar", {f"{n}.png": encoded(picture(n + shift)) for n in range(3)})
        write_shards(tmp_path / f"{place}_packed", POINTS[shift], each=20)
    for kind, count in (("", 1), ("_packed", 2)):
        here, there, other = (
            ShardSet(tmp_path / f"{place}{kind}").shard_hashes() for place in ("here", "deep/there", "other")
        )
        assert here == there and len(here) == count and not set(here) & set(other)
    both = ShardSet([str(tmp_path / "here_packed"), str(tmp_path / "other_packed")]).shard_hashes()
    assert both == ShardSet(tmp_path / "here_packed").shard_hashes() + other


def test_a_shard_that_is_damaged_by_now_is_no_other_data(tmp_path):
    for n in range(2):
        write_tar(tmp_path / f"set/{n}.tar", {f"{n}{m}.png": encoded(picture(m)) for m in range(3)})
    whole = ShardSet(tmp_path / "set", tolerant=True, cache_dir=tmp_path / "cache").shard_hashes()
    (tmp_path / "set/1.tar").write_bytes(b"")
    damaged = ShardSet(tmp_path / "set", tolerant=True, cache_dir=tmp_path / "cache").shard_hashes()
    assert None not in whole and damaged == [whole[0], None]


def test_a_teachers_hash_is_of_what_it_computes():
    from rdmd_fast.model_files.export_format import ExportConfig, network_sha256

    config = ExportConfig.model_validate(
        {"role": "teacher", "network": NETWORK, "sample_shape": [2], "diffusion": {}, "step": 5}
    )
    weights = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    digest = network_sha256(config, weights)
    assert digest == network_sha256(config.model_copy(update={"step": 6}), dict(reversed(weights.items())))
    assert digest != network_sha256(config, weights | {"b": torch.full((3,), 1.0000001)})
