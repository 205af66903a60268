"""`make demo-text`, its commands one by one: a sentence makes "3"s of held-out "2"s. Half an hour on two cores.

A pipeline that is trained already is taken from the folder that DIGITS_PIPELINE names.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import text_pipelines  # noqa: F401 (skips where the libraries are missing)

from rdmd_fast import cli
from rdmd_fast.trainer import main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def rdmd(*words: object) -> None:
    assert cli.main(list(map(str, words))) == 0


def measured(run: Path, model: Path) -> dict:
    """Of held-out "2"s that a generator translates, shrunk to 8×8."""
    rdmd("translate", "--model", model, "--input", "shards/digits16/2/test", "--output", run / "translated")
    rdmd(
        "evaluate", "--outputs", run / "translated", "--source", "shards/digits/2/test", "--target",
        "shards/digits/3/test", "--judge", "shards/digits", "--label", 3, "--out", run / "report.json",
    )  # fmt: skip
    return json.loads((run / "report.json").read_text())["rows"][-1]


def test_twos_become_threes_of_the_same_colour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rdmd("pack", "digits", "--out", "shards/digits")
    rdmd("pack", "digits", "--out", "shards/digits16", "--resolution", 16)
    pipeline = Path(os.environ.get("DIGITS_PIPELINE") or "models/digits")
    if "DIGITS_PIPELINE" not in os.environ:
        monkeypatch.syspath_prepend(str(ROOT))
        from benchmarks.digits_pipeline import main as train_pipeline

        assert train_pipeline(["--data", "shards/digits16", "--judge", "shards/digits", "--out", str(pipeline)]) == 0
    real = json.loads((pipeline / "report.json").read_text())
    rdmd("pack", "digits", "--out", "shards/digits_latents", "--resolution", 16, "--encoder", pipeline)

    config = ["--config", str(ROOT / "configs/digits/text_2to3.yaml"), f"teacher={pipeline}"]
    still = ["train.steps=1", "rdmd.generator_optimizer.lr=1e-12", "run_dir=untrained", "validation.every=0"]
    assert main([*config, *still]) == 0
    assert main([*config, "run_dir=run"]) == 0
    before, after = (measured(Path(run), Path(run) / "export") for run in ("untrained", "run"))
    print(json.dumps({"untrained": before, "trained": after, "pipeline": real}, indent=1), file=sys.stderr)
    assert after["share_3nn"] >= min(0.95, real["vae"]["called_right"]["3"] - 0.03)
    assert after["colour_cosine"] >= 0.95
    assert after["frechet"] < before["frechet"]
