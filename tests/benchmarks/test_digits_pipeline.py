"""benchmarks.digits_pipeline at toy size: what it saves is read as a teacher, by the library and by us."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from material import pack, pixels_of

from benchmarks import digits_pipeline
from rdmd_fast import load_denoiser
from rdmd_fast.model_files.text_pipeline import read_text_pipeline


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits16")
    assert pack("digits", "--out", folder, "--hues", 1, "--resolution", 16) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline(large, shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "pipeline"
    small = ("--vae-steps", "3", "--unet-steps", "3", "--vae-batch", "4", "--unet-batch", "4", "--samples", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_pipeline, "SAMPLING_STEPS", 2)
        assert digits_pipeline.main(["--data", str(large), "--judge", str(shards), "--out", str(out), *small]) == 0
    return out


@torch.no_grad()
def test_the_pipeline_is_read_as_a_teacher(pipeline):
    config, _ = read_text_pipeline(pipeline)
    assert config.sample_shape == [4, 8, 8] and config.diffusion.parameterization == "v"
    teachers = [load_denoiser(pipeline, digits_pipeline.prompt_of(digit)) for digit in (2, 3)]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    two, three = (teacher(x, 1.0) for teacher in teachers)
    assert two.shape == x.shape and torch.isfinite(two).all() and not torch.equal(two, three)


def test_the_longest_prompt_is_not_cut():
    tokenizer = digits_pipeline.build_parts()["tokenizer"]
    counts = [len(tokenizer(digits_pipeline.prompt_of(digit)).input_ids) for digit in range(10)]
    assert max(counts) <= digits_pipeline.TOKENS and len(set(counts)) > 1


def test_the_report_tells_the_quality(pipeline):
    report = json.loads((pipeline / "report.json").read_text())
    assert report["parameters"]["unet"] <= 3_000_000
    assert report["vae"]["without_vae"]["all"] > 0.97  # of digits that were enlarged and shrunk again
    assert report["samples_called_right"].keys() == {"1.0", "1.5", "3.0"}
    assert all(0 <= share <= 1 for shares in report["samples_called_right"].values() for share in shares.values())
    assert pixels_of(pipeline / "samples.png").shape[1] > 10 * 16


@pytest.mark.parametrize(("words", "said"), [
    ((), "images are [8, 8, 3], pack digits with --resolution 16"),
    (("--unet-steps", "0"), "--unet-steps 0 must be at least 1"),
    (("--judge", "nowhere"), "nowhere: no digit folders such as 2/train and 3/train"),
])  # fmt: skip
def test_what_cannot_be_used_is_one_line(shards, tmp_path, capsys, words, said):
    folders = ("--data", str(shards), "--judge", str(shards), "--out", str(tmp_path / "out"))
    with pytest.raises(SystemExit):
        digits_pipeline.main([*folders, *words])
    assert said in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "out").exists()
